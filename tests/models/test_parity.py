"""The model against `transformers`, weight for weight, on odd shapes: features, logits, loss, gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from sg4v_jax.convert.huggingface import read_config
from sg4v_jax.convert.params import to_params
from sg4v_jax.models.config import CLIP_MEAN, CLIP_STD, ModelConfig
from sg4v_jax.models.sharegpt4v import ShareGPT4V, abstract_model
from tests.torch_llava import arrays, llava_config, llava_model

# Absolute, in float32, and never to be relaxed; what was found is a tenth of it or less.
TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

# `<image>` among the ordinary tokens, so that both models have the same vocabulary and loss.
IMAGE_TOKEN, VOCAB = 3, 160

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "6 query and 2 key heads, 45 pixels in patches of 14, last layer with class token": {
        "vision": {"image_size": 45, "num_attention_heads": 4},
        "text": {"num_attention_heads": 6, "num_key_value_heads": 2},
        "fields": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    },
    "head_dim 24, 40 pixels in patches of 8": {
        "vision": {"image_size": 40, "patch_size": 8},
        "text": {"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 1},
    },
    "head_dim 80, 30 pixels in patches of 8, layer 2 of 5, other epsilons and rotary base": {
        "vision": {"image_size": 30, "patch_size": 8, "num_hidden_layers": 5, "layer_norm_eps": 1e-3},
        "text": {
            "head_dim": 80,
            "num_attention_heads": 2,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        },
        "fields": {"vision_feature_layer": 2},
    },
}
in_every_case = pytest.mark.parametrize("case", CASES)

# What pre-training holds fixed when it tunes the vision tower from some block on (spec 4.1).
HELD = {"frozen", "patch_embedding", "class_embedding", "position_embedding", "pre_norm"}

# These models run once: compiling them takes far longer.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same model twice, and a batch of rows with 0, 1 and 3 images for both.

    Attributes:
      theirs, ours: the models; `params` are the weights of ours.
      images: uint8[rows, slots, height, width, 3]; slots beyond a row's images hold noise.
      pixels: float32[images, 3, height, width], those of all rows, normalised.
      tokens, labels, image_index: int[rows, length]; -100 in labels: no loss.
      lengths: int[rows]; what lies beyond is padding.
    """

    theirs: Any
    config: ModelConfig
    params: dict[str, Any]
    images: np.ndarray
    pixels: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    image_index: np.ndarray
    lengths: np.ndarray

    @property
    def ours(self) -> ShareGPT4V:
        return bind(self.config, self.params)

    @property
    def mask(self) -> np.ndarray:
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def their_outputs(self) -> Any:
        return self.theirs(
            input_ids=torch.from_numpy(self.tokens),
            pixel_values=torch.from_numpy(self.pixels),
            attention_mask=torch.from_numpy(self.mask.astype(np.int64)),
            labels=torch.from_numpy(self.labels),
        )


def bind(config: ModelConfig, params: dict[str, Any]) -> ShareGPT4V:
    model: ShareGPT4V = nnx.merge(abstract_model(config)[0], params)
    return model


@functools.cache
def pair(case: str) -> Pair:
    changes = CASES[case]
    vision, text, fields = (changes.get(part, {}) for part in ("vision", "text", "fields"))
    hf_config = llava_config(vision, {"vocab_size": VOCAB, **text}, image_token_index=IMAGE_TOKEN, **fields)
    theirs = llava_model(hf_config)
    config = read_config(hf_config.to_dict())
    size, features = config.vision.image_size, config.vision.num_image_tokens
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 3, size, size, 3), dtype=np.uint8)
    used = np.concatenate([images[1, :1], images[2, :3]]).astype(np.float32)
    pixels = (used / 255 - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    # Numbers of text tokens; an image between each two.
    rows = [[9], [4, 6], [1, 2, 0, 7]]
    length = 3 * features + 12
    tokens = np.zeros((3, length), np.int64)
    labels = np.full((3, length), -100)
    image_index = np.full((3, length), -1, np.int32)
    lengths = np.zeros(3, np.int64)
    for row, texts in enumerate(rows):
        at = 0
        for slot, count in enumerate(texts):
            if slot:
                tokens[row, at : at + features] = IMAGE_TOKEN
                image_index[row, at : at + features] = (slot - 1) * features + np.arange(features)
                at += features
            tokens[row, at : at + count] = generator.integers(IMAGE_TOKEN + 1, VOCAB, count)
            at += count
        labels[row, at - 4 : at] = tokens[row, at - 4 : at]
        lengths[row] = at
    assert (lengths < length).all()
    return Pair(
        theirs=theirs,
        config=config,
        params=to_params(config, arrays(theirs)),
        images=images,
        pixels=np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32),
        tokens=tokens,
        labels=labels,
        image_index=image_index,
        lengths=lengths,
    )


def logits_of(config: ModelConfig, params: dict[str, Any], both: Pair) -> jax.Array:
    """Logits of the batch, from bytes."""
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(both.tokens.shape[1]), both.tokens.shape)
    tokens, segments = jnp.array(both.tokens, jnp.int32), jnp.array(both.mask, jnp.int32)
    hidden = model(tokens, positions, segments, jnp.array(both.images), jnp.array(both.image_index))
    return model.text.logits(hidden)


def cross_entropy(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """Mean over the labels that aren't -100, each predicted from the position before it."""
    targets = labels[:, 1:]
    supervised = targets >= 0
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(log_probs, np.where(supervised, targets, 0)[..., None], axis=-1)[..., 0]
    return -(chosen * supervised).sum() / supervised.sum()


@functools.cache
def our_outputs(case: str, tuned_from: int) -> tuple[np.ndarray, float, dict[Any, np.ndarray]]:
    """Logits, loss and the gradients of what is trained."""
    both = pair(case)
    config = both.config.with_tuned_from(tuned_from)
    params = flatten_dict(to_params(config, arrays(both.theirs)))
    kept = {path: leaf for path, leaf in params.items() if tuned_from and path[1] in HELD}
    trained = {path: leaf for path, leaf in params.items() if path not in kept}

    def loss(trained: dict[Any, Any]) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(config, unflatten_dict({**trained, **kept}), both)
        return cross_entropy(logits, both.labels), logits

    (value, logits), gradients = jax.device_get(jit(jax.value_and_grad(loss, has_aux=True))(trained))
    return logits, value, gradients


def assert_close(ours: Any, theirs: Any, record: Any) -> None:
    theirs = theirs.detach().numpy()
    assert np.abs(theirs).max() > 0.5, "too small to show an error"
    error = float(np.abs(np.asarray(ours) - theirs).max())
    record("max_abs_error", error)
    assert error <= TOLERANCE


@in_every_case
def test_vision_tower(case: str, record_property: Any) -> None:
    both = pair(case)
    with torch.no_grad():
        states = both.theirs.model.vision_tower(torch.from_numpy(both.pixels), output_hidden_states=True)
    vision = both.config.vision
    theirs = states.hidden_states[vision.select_layer]
    theirs = theirs[:, 1:] if vision.select_feature == "patch" else theirs
    ours = jit(both.ours.vision)(both.pixels.transpose(0, 2, 3, 1))
    assert ours.shape[1] == vision.num_image_tokens
    assert_close(ours, theirs, record_property)


@in_every_case
def test_projector(case: str, record_property: Any) -> None:
    both = pair(case)
    features = np.random.default_rng(1).normal(size=(2, 5, both.config.vision.hidden_size)).astype(np.float32)
    theirs = both.theirs.model.multi_modal_projector(torch.from_numpy(features))
    assert_close(jit(both.ours.projector)(features), theirs, record_property)


@in_every_case
def test_decoder_alone(case: str, record_property: Any) -> None:
    both = pair(case)
    embeddings = (
        np.random.default_rng(1).normal(size=(2, 17, both.config.text.hidden_size)).astype(np.float32)
    )
    with torch.no_grad():
        theirs = both.theirs(inputs_embeds=torch.from_numpy(embeddings)).logits
    positions = jnp.broadcast_to(jnp.arange(17), (2, 17))
    text = both.ours.text
    assert_close(jit(lambda x: text.logits(text(x, positions)))(embeddings), theirs, record_property)


@in_every_case
def test_logits_and_loss(case: str, record_property: Any) -> None:
    both = pair(case)
    with torch.no_grad():
        theirs = both.their_outputs()
    logits, loss, _ = our_outputs(case, 0)
    assert_close(logits[both.mask], theirs.logits[torch.from_numpy(both.mask)], record_property)
    error = abs(float(loss) - float(theirs.loss))
    record_property("loss_error", error)
    assert error <= LOSS_TOLERANCE


def test_rows_without_images() -> None:
    """Text alone gives the same with empty image slots and without any."""
    both = pair("plain")
    tokens = jnp.array(both.tokens[:1], jnp.int32)
    positions = jnp.arange(tokens.shape[1])[None]
    segments, index = jnp.array(both.mask[:1], jnp.int32), jnp.full(tokens.shape, -1)
    model = both.ours
    with_slots = jit(model)(tokens, positions, segments, jnp.array(both.images[:1]), index)
    without = jit(lambda: model(tokens, positions, segments, None, index))()
    np.testing.assert_array_equal(with_slots, without)


def test_remat_changes_nothing() -> None:
    both = pair("plain")
    vision, pixels = both.ours.vision, both.pixels.transpose(0, 2, 3, 1)
    expected = jit(vision)(pixels)
    for remat in ("full", "dots"):
        found = jit(lambda x, remat=remat: vision(x, remat))(pixels)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def their_gradients(both: Pair, config: ModelConfig, frozen: tuple[str, ...]) -> dict[str, Any]:
    """Gradients of their loss in our layout; zero for what has none."""
    for name, parameter in both.theirs.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(not name.startswith(frozen))
    both.their_outputs().loss.backward()
    gradients = {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).numpy()
        for name, parameter in both.theirs.named_parameters()
    }
    return to_params(config, gradients)


@pytest.mark.parametrize(("case", "tuned_from"), [*((case, 0) for case in CASES), ("plain", 1), ("plain", 3)])
def test_gradients(case: str, tuned_from: int, record_property: Any) -> None:
    """Of every parameter that is trained: everything, or as in pre-training from a block on."""
    both = pair(case)
    config = both.config.with_tuned_from(tuned_from)
    parts = ("embeddings.", "pre_layrnorm.", *(f"encoder.layers.{i}." for i in range(tuned_from)))
    frozen = tuple(f"model.vision_tower.{part}" for part in parts) if tuned_from else ()
    theirs = flatten_dict(their_gradients(both, config, frozen))
    ours = our_outputs(case, tuned_from)[2]
    kept = theirs.keys() - ours.keys()
    assert {path[1] for path in kept} == (HELD if tuned_from else set())
    assert not any(theirs[path].any() for path in kept)
    errors = {path: relative_error(path, ours, theirs) for path in ours}
    worst = max(errors, key=lambda path: errors[path])
    record_property("worst_gradient", f"{errors[worst]:.2e} {'/'.join(worst)}")
    assert errors[worst] <= GRADIENT_TOLERANCE, {"/".join(path): error for path, error in errors.items()}


def relative_error(path: tuple[str, ...], ours: dict[Any, Any], theirs: dict[Any, Any]) -> float:
    """||ours - theirs|| / ||theirs||."""
    if path[1] in ("unused", "post_norm"):
        # Nothing depends on them.
        return float(np.any(ours[path]) or np.any(theirs[path]))
    if path[-2:] == ("key", "bias"):
        # Softmax doesn't see a shift of all scores: the true gradient is 0, and both have rounding
        # errors only. They count in relation to the kernel's gradient.
        scale = np.linalg.norm(theirs[(*path[:-1], "kernel")])
        return float(max(np.linalg.norm(ours[path]), np.linalg.norm(theirs[path])) / scale)
    norm = np.linalg.norm(theirs[path])
    assert norm > 1e-6, f"{'/'.join(path)} has no gradient to compare"
    return float(np.linalg.norm(ours[path] - theirs[path]) / norm)
