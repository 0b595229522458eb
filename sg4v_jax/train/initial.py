"""The parameters a run starts from: given checkpoints for some parts, random values for the rest."""

import functools
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sg4v_jax.convert.load import load_model
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import init_params, resplit_vision
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
      sources: for each of `PARTS`, a model directory in any known format, or "" for random values.
      shapes: ShapeDtypeStructs of the parameters, with the dtypes wanted.
      shardings: where they go.
      seed: of the random values.

    Raises:
      ValueError: listing every parameter of a loaded part whose shape does not fit `config`.
    """
    params: dict[str, Any] = {}
    bundles: dict[str, Any] = {}
    for part in PARTS:
        path = sources[part]
        if not path:
            continue
        if path not in bundles:
            bundles[path] = load_model(pathlib.Path(path))
        loaded = resplit_vision(bundles[path].params, config.vision.tuned_from)[part]
        _check_shapes(part, path, loaded, shapes[part])
        loaded = jax.tree.map(lambda leaf, s: np.asarray(leaf).astype(s.dtype), loaded, shapes[part])
        params[part] = place(loaded, shardings[part])
        log.info("%s: loaded from %s", part, path)
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


def _check_shapes(part: str, path: str, loaded: Any, wanted: Any) -> None:
    have = {name: leaf.shape for name, leaf in groups.flatten(loaded)}
    want = {name: leaf.shape for name, leaf in groups.flatten(wanted)}
    problems = [f"{n}: missing" for n in want.keys() - have.keys()]
    problems += [f"{n}: unexpected" for n in have.keys() - want.keys()]
    problems += [
        f"{n}: {have[n]} found, {want[n]} expected" for n in have.keys() & want.keys() if have[n] != want[n]
    ]
    if problems:
        raise ValueError(
            f"config.init.{part}={path} does not fit config.model.{part}:\n  " + "\n  ".join(sorted(problems))
        )
