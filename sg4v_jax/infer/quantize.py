"""The decoder's matrices as int8 with a scale per output channel: half the bytes of bfloat16 to read.

The scale multiplies the product, so the matrix unit takes the integers as they are (exact in bfloat16)
and rounding the weights is all that is lost. Embeddings, norms, projector and vision tower stay as they
are: they are small, or read once per prompt.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.layers import Linear
from sg4v_jax.models.sharegpt4v import ShareGPT4V, abstract_model


def abstract_quantized(config: ModelConfig) -> tuple[nnx.GraphDef, dict, dict]:
    """Like `models.sharegpt4v.abstract_model`, of the model with quantized matrices."""
    return abstract_model(config, change=_quantize_linears)


def quantize_params(
    config: ModelConfig, params: dict[str, Any], cast: Callable[[Any], np.ndarray]
) -> dict[str, Any]:
    """Parameters for `abstract_quantized`, on the host; `cast` is applied to what isn't quantized."""
    original, params = params["text"], jax.tree.map(cast, params)
    abstract = nnx.eval_shape(lambda: ShareGPT4V(config, nnx.Rngs(params=0)))
    for path, linear in _linears(abstract):
        source, node = original, params["text"]
        for key in path:
            source, node = source[key], node[key]
        kernel = np.asarray(source["kernel"], np.float32)
        scale = np.abs(kernel).max(axis=_contracted(path, linear), keepdims=True) / 127
        scale = np.maximum(scale, np.finfo(np.float32).tiny)
        node["kernel"] = np.round(kernel / scale).astype(np.int8)
        node["scale"] = scale.squeeze(_contracted(path, linear))
    return params


def _quantize_linears(model: ShareGPT4V) -> None:
    for path, linear in _linears(model):
        kernel, axes = linear.kernel[...], linear.kernel.get_metadata()["axes"]
        reduced = _contracted(path, linear)
        shape = [size for axis, size in enumerate(kernel.shape) if axis not in reduced]
        linear.kernel = nnx.Param(jnp.zeros(kernel.shape, jnp.int8), axes=axes)
        linear.scale = nnx.data(nnx.Param(jnp.zeros(shape), axes=axes[linear.num_contracted :]))


def _linears(model: ShareGPT4V) -> list[tuple[tuple[Any, ...], Linear]]:
    modules = nnx.iter_modules(model.text)
    return [(path, module) for path, module in modules if isinstance(module, Linear)]


def _contracted(path: tuple[Any, ...], linear: Linear) -> tuple[int, ...]:
    """Axes of the kernel that a product sums over; a stack of blocks has the layers before them."""
    first = int(path[0] == "blocks")
    return tuple(range(first, first + linear.num_contracted))
