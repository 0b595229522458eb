"""The projector: image features to the decoder's embedding space."""

import re

import jax
from flax import nnx
from jaxtyping import Array, Float

from sg4v_jax.models.layers import Linear


def projector_depth(kind: str) -> int:
    """Number of linear layers of `linear` or `mlpNx_gelu`.

    Raises:
      ValueError: on any other kind.
    """
    if kind == "linear":
        return 1
    match = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if not match:
        raise ValueError(f"projector {kind!r} is not 'linear' or 'mlpNx_gelu' (N from 1 to 9)")
    return int(match[1])


class Projector(nnx.Module):
    """`mlpNx_gelu`: N linear layers with exact (erf) GELU between them (LLaVA-1.5: N = 2).

    Attributes:
      layer_0 .. layer_{N-1}: the linear layers.
    """

    def __init__(self, kind: str, in_size: int, out_size: int, rngs: nnx.Rngs):
        self.depth = projector_depth(kind)
        for i in range(self.depth):
            # A square matrix has one side to shard by rows and one by columns, as in any MLP.
            axes = ("embed", "mlp") if i % 2 == 0 else ("mlp", "embed")
            layer = Linear((in_size if i == 0 else out_size,), (out_size,), axes, bias=True, rngs=rngs)
            setattr(self, f"layer_{i}", layer)

    def __call__(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
        for i in range(self.depth):
            if i:
                x = jax.nn.gelu(x, approximate=False)
            x = getattr(self, f"layer_{i}")(x)
        return x
