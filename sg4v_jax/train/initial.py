"""The parameters a run starts from: given checkpoints for some parts, random values for the rest."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from sg4v_jax.convert.load import open_part
from sg4v_jax.convert.params import check, read_params
from sg4v_jax.convert.tensors import ConversionError
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import init_params
from sg4v_jax.parallel.placement import place
from sg4v_jax.train import groups

log = logging.getLogger(__name__)

PARTS = ("vision", "projector", "text")


def initial_params(
    config: ModelConfig, sources: dict[str, str], shapes: Any, shardings: Any, seed: int
) -> dict[str, Any]:
    """Places loaded parts first and initialises only what is missing, directly sharded.

    Args:
      config: the model.
      sources: for each of `PARTS`, a model or a part of one in any known format (see
        `convert.load.open_part`), or "" for random values.
      shapes: ShapeDtypeStructs of the parameters, with the dtypes wanted.
      shardings: where they go.
      seed: of the random values.

    Raises:
      ConversionError: listing every tensor of a loaded part that does not fit `config`.
    """
    params: dict[str, Any] = {}
    for part in PARTS:
        if sources[part]:
            params[part] = _load(config, part, sources[part], shapes[part], shardings[part])
            log.info("%s: loaded from %s", part, sources[part])
    missing = [part for part in PARTS if part not in params]

    @functools.partial(jax.jit, out_shardings={part: shardings[part] for part in missing})
    def init(key: jax.Array) -> dict[str, Any]:
        fresh = init_params(config, key)
        return {
            part: jax.tree.map(lambda leaf, s: leaf.astype(s.dtype), fresh[part], shapes[part])
            for part in missing
        }

    return params | init(jax.random.key(seed)) if missing else params


def with_dtypes(shapes: Any, config_groups: groups.Groups, frozen_dtype: jnp.dtype) -> Any:
    """Parameter shapes with float32 for what trains and `frozen_dtype` for what doesn't."""
    multipliers = groups.assign(shapes, config_groups)
    typed = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if multipliers[path] is not None else frozen_dtype)
        for path, leaf in groups.flatten(shapes)
    }
    return groups.unflatten(typed)


def _load(config: ModelConfig, part: str, source: str, shapes: Any, shardings: Any) -> dict[str, Any]:
    """One part, parameter by parameter: the host never has more than one of them."""
    tensors = open_part(source, part).part(part)
    if problems := check(config, tensors, part):
        raise ConversionError([f"config.init.{part}={source} does not fit config.model.{part}:", *problems])
    flat = flatten_dict(shardings)
    dtypes = {(part, *path): leaf.dtype for path, leaf in flatten_dict(shapes).items()}
    return unflatten_dict(
        {path[1:]: place(leaf, flat[path[1:]]) for path, leaf in read_params(config, tensors, dtypes)}
    )
