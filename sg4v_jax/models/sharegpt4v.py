"""ShareGPT4V: a vision tower and a projector whose features take places in a decoder's sequence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from sg4v_jax.models.config import CLIP_MEAN, CLIP_STD, ModelConfig
from sg4v_jax.models.llama import Llama
from sg4v_jax.models.projector import Projector
from sg4v_jax.models.vit import VisionTransformer
from sg4v_jax.parallel.rules import constrain


class ShareGPT4V(nnx.Module):
    """The whole model (Chen et al. 2024; LLaVA-1.5's shape, spec 3.1)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision = VisionTransformer(config.vision, rngs)
        self.projector = Projector(config.projector, config.vision.hidden_size, config.text.hidden_size, rngs)
        self.text = Llama(config.text, rngs)

    def encode_images(
        self, images: UInt8[Array, "batch slots height width 3"], remat: str = "none"
    ) -> Float[Array, "batch features d"]:
        """Image features in the decoder's space, slot after slot.

        Args:
          images: uint8[batch, slots, image_size, image_size, 3]; empty slots may hold anything.
          remat: see `layers.run_stack`.

        Returns:
          float[batch, slots * num_image_tokens, text.hidden_size].
        """
        batch, slots = images.shape[:2]
        dtype = self.vision.class_embedding[...].dtype
        # Images travel as bytes, a quarter of the size of float32, and are normalised here.
        pixels = images.reshape(batch * slots, *images.shape[2:]).astype(jnp.float32) / 255
        pixels = ((pixels - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)).astype(dtype)
        pixels = constrain(pixels, ("batch", None, None, None))
        features = self.projector(self.vision(pixels, remat))
        return features.reshape(batch, slots * features.shape[1], features.shape[2])

    def embed(
        self,
        tokens: Int[Array, "batch length"],
        image_index: Int[Array, "batch length"],
        features: Float[Array, "batch features d"] | None,
    ) -> Float[Array, "batch length d"]:
        """Token embeddings with image features in their places.

        Args:
          tokens: int32[batch, length]; ignored where a feature goes.
          image_index: int32[batch, length], which of the row's features a position takes, -1: text.
          features: what `encode_images` returned, or None when no row has an image.
        """
        x = self.text.embed(tokens)
        if features is None:
            return x
        # A gather and a select: scatters of this kind are slow on TPU, and have crashed there.
        chosen = jnp.take_along_axis(features, jnp.maximum(image_index, 0)[..., None], axis=1)
        return jnp.where(image_index[..., None] >= 0, chosen, x)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"],
        images: UInt8[Array, "batch slots height width 3"] | None,
        image_index: Int[Array, "batch length"],
        remat: str = "none",
    ) -> Float[Array, "batch length d"]:
        """Hidden states of packed rows; `text.logits` turns them into scores. See `data.batch.Batch`."""
        features = None if images is None else self.encode_images(images, remat)
        return self.text(self.embed(tokens, image_index, features), positions, segment_ids, remat)


def abstract_model(
    config: ModelConfig, change: Callable[[ShareGPT4V], None] = lambda model: None
) -> tuple[nnx.GraphDef, dict, dict]:
    """The model without weights.

    Args:
      config: its shapes.
      change: makes another model of it, in place.

    Returns:
      (graphdef, shapes, axes): `nnx.merge(graphdef, params)` binds a plain dict of parameters;
      `shapes` is that dict with ShapeDtypeStructs and `axes` with tuples of logical axis names.
    """

    def build() -> ShareGPT4V:
        model = ShareGPT4V(config, nnx.Rngs(params=0))
        change(model)
        return model

    model = nnx.eval_shape(build)
    graphdef, state = nnx.split(model)
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    axes = jax.tree.map(lambda leaf: leaf.get_metadata()["axes"], state, is_leaf=is_variable)
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def init_params(config: ModelConfig, key: Array) -> dict:
    """Random float32 parameters as a plain dict. Jit it with out_shardings to build them sharded."""
    return nnx.to_pure_dict(nnx.state(ShareGPT4V(config, nnx.Rngs(params=key))))


def resplit_vision(params: dict, tuned_from: int) -> dict:
    """The same parameters with the vision blocks split before `tuned_from` (see `models.vit`)."""
    vision = dict(params["vision"])
    stacks = [vision.pop(name) for name in ("frozen", "tuned") if name in vision]
    blocks = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
    count = jax.tree.leaves(blocks)[0].shape[0]
    if tuned_from > 0:
        vision["frozen"] = jax.tree.map(lambda leaf: leaf[:tuned_from], blocks)
    if tuned_from < count:
        vision["tuned"] = jax.tree.map(lambda leaf: leaf[tuned_from:], blocks)
    return {**params, "vision": vision}
