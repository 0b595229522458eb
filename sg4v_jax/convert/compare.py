"""Two checkpoints of any formats side by side: weight by weight, and in what they say."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from sg4v_jax.convert.checkpoint import Checkpoint
from sg4v_jax.convert.files import read_ahead
from sg4v_jax.convert.params import param_shapes, read_params
from sg4v_jax.convert.tensors import DTYPES
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model

_TEXT_TOKENS = 24
# Above this the logits are computed in bfloat16: two models of 7B don't fit a workstation otherwise.
_MAX_FLOAT32_BYTES = 8 * 10**9


@dataclasses.dataclass(frozen=True)
class Difference:
    """A tensor that isn't the same in two checkpoints.

    Attributes:
      key: its canonical key.
      what: how it differs: `only in A`, `only in B`, shapes, or dtypes.
      max_abs: the largest difference of two values; infinite where they can't be compared.
    """

    key: str
    what: str
    max_abs: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
      compared: how many tensors both have.
      differences: those that aren't equal, bit by bit in the wider of their dtypes.
      dtypes: pairs of dtypes that equal tensors are stored in, when they aren't the same.
    """

    compared: int
    differences: tuple[Difference, ...]
    dtypes: frozenset[tuple[str, str]]

    @property
    def max_abs(self) -> float:
        """The largest difference of any two values."""
        return max((difference.max_abs for difference in self.differences), default=0.0)


def compare(a: Checkpoint, b: Checkpoint, progress: Callable[[int], object] | None = None) -> Comparison:
    """Compares two checkpoints, or the parts they have, reading one tensor of each at a time.

    Args:
      a, b: of any formats. The rows that HF's format adds to a vocabulary don't count.
      progress: called with the bytes of each tensor of `a` that was read.
    """
    differences = [Difference(key, "only in A", np.inf) for key in a.tensors if key not in b.tensors]
    differences += [Difference(key, "only in B", np.inf) for key in b.tensors if key not in a.tensors]
    keys = []
    for key in (key for key in a.tensors if key in b.tensors):
        shapes = a.tensors[key].shape, b.tensors[key].shape
        if shapes[0] == shapes[1]:
            keys.append(key)
        else:
            differences.append(Difference(key, f"shape {shapes[0]} in A, {shapes[1]} in B", np.inf))
    pairs = zip(
        read_ahead([a.tensors[key] for key in keys]),
        read_ahead([b.tensors[key] for key in keys]),
        strict=True,
    )
    dtypes = set()
    for key, (of_a, of_b) in zip(keys, pairs, strict=True):
        if of_a.dtype != of_b.dtype:
            dtypes.add((of_a.dtype.name, of_b.dtype.name))
        largest = _max_abs(of_a, of_b)
        if largest != 0:
            differences.append(Difference(key, f"{of_a.dtype} and {of_b.dtype}", largest))
        if progress is not None:
            progress(of_a.nbytes)
    return Comparison(len(keys), tuple(differences), frozenset(dtypes))


def logits(checkpoint: Checkpoint) -> np.ndarray:
    """What a whole model says to a fixed prompt about a fixed image.

    Returns:
      float32[positions, vocab_size].
    """
    config = checkpoint.config
    dtype = _compute_dtype(config)
    dtypes = dict.fromkeys(param_shapes(config), dtype)
    params = {
        path: jnp.asarray(leaf) for path, leaf in read_params(config, checkpoint.checked().tensors, dtypes)
    }
    return np.asarray(_logits(config, unflatten_dict(params)))


def _logits(config: ModelConfig, params: dict) -> jax.Array:
    graphdef, _, _ = abstract_model(config)
    size, features = config.vision.image_size, config.vision.num_image_tokens
    gradient = np.linspace(0, 255, size, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(gradient[:, None], gradient[None], 255 - gradient[None]), axis=-1)
    # The image first, then text that is the same for every vocabulary of at least this size.
    text = 1 + np.arange(_TEXT_TOKENS) * max(1, (config.text.vocab_size - 2) // _TEXT_TOKENS)
    tokens = np.concatenate([np.zeros(features, np.int32), text])[None].astype(np.int32)
    index = np.concatenate([np.arange(features), np.full(_TEXT_TOKENS, -1)])[None].astype(np.int32)

    @jax.jit
    def run(params: dict, image: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        ids = jnp.asarray(tokens)
        positions = jnp.arange(tokens.shape[1])[None]
        hidden = model(ids, positions, jnp.ones_like(ids), image, jnp.asarray(index))
        return model.text.logits(hidden[0, features:]).astype(jnp.float32)

    return run(params, image[None, None])


def _compute_dtype(config: ModelConfig) -> np.dtype:
    total = sum(int(np.prod(shape)) for shape in param_shapes(config).values())
    return DTYPES["float32" if 4 * total <= _MAX_FLOAT32_BYTES else "bfloat16"]


def _max_abs(a: np.ndarray, b: np.ndarray) -> float:
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    # NaN in both is the same; NaN in one of them is as different as can be.
    difference[np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32))] = 0
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
