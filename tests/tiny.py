"""A model small enough to compile in seconds, and packed batches for it."""

import functools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sg4v_jax.data.batch import Batch, from_rows
from sg4v_jax.data.packing import pack
from sg4v_jax.models.config import ModelConfig, TextConfig, VisionConfig
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.train.groups import flatten, unflatten

if TYPE_CHECKING:
    # It prepares a process for tests, which not all that import this are.
    from tests.conftest import TinyWorld

# These programs run a few times: compiling them takes far longer.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# What pre-training holds fixed (configs/common.py).
GROUPS = (
    ("vision/(frozen|patch_embedding|class_embedding|position_embedding|pre_norm)(/.*)?", None),
    ("vision/(unused|post_norm)/.*", None),
    (".*", 1.0),
)

# Fields of a config that make a run of real processes as small as it goes.
SMALL_RUN = {
    **{
        f"model.{part}.{name}": value
        for part in ("vision", "text")
        for name, value in {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_layers": 2,
            "num_heads": 2,
        }.items()
    },
    "model.text.num_kv_heads": 1,
    "model.vision.image_size": 24,
    "model.vision.patch_size": 12,
    "model.vision.tuned_from": 0,
    "data.seq_len": 96,
    "data.image_slots": 1,
    "data.batch_size": 2,
    "data.num_threads": 1,
    "data.packing_window": 4,
    "train.log_every": 1,
    "train.loss_chunk": 64,
}


def small_argv(world: "TinyWorld", workdir: str | pathlib.Path, fields: Mapping[str, object]) -> list[str]:
    """The arguments of `sg4v` for such a pre-training, with further fields of the config."""
    data = {"data.tokenizer": world.tokenizer, "data.sources.share_captioner.directory": world.captions}
    overrides = [f"--config.{field}={value}" for field, value in (SMALL_RUN | data | fields).items()]
    return ["train", "--config=configs/pretrain.py:tiny", f"--workdir={workdir}", *overrides]


def model_config(tuned_from: int = 1, num_kv_heads: int = 2, frozen_layers: int = 4) -> ModelConfig:
    """Four image tokens, two blocks of text; every width divides by eight devices."""
    vision = VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=frozen_layers,
        num_heads=2,
        image_size=28,
        patch_size=14,
        tuned_from=tuned_from,
    )
    text = TextConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        max_positions=256,
    )
    return ModelConfig(vision, text)


def random_params(config: ModelConfig, seed: int = 0, std: float = 0.2) -> dict[str, Any]:
    """Weights of order `std`, norm scales about 1: large enough for every part to matter."""
    generator = np.random.default_rng(seed)
    leaves = {
        # NumPy's generator: JAX's would compile once for every shape.
        path: std * generator.standard_normal(leaf.shape).astype(np.float32) + path.endswith("scale")
        for path, leaf in flatten(abstract_model(config)[1])
    }
    return jax.tree.map(jnp.array, unflatten(leaves))


def random_sample(config: ModelConfig, generator: np.random.Generator, images: int, text: int) -> dict:
    """A training sample as from `data.sample.make_sample`: text around images, some of it supervised.

    Samples of an even number of text tokens are of source 0, the others of source 1.
    """
    features = config.vision.num_image_tokens
    before = int(generator.integers(0, text - 1))
    is_image = np.zeros(text + images * features, np.int32)
    is_image[before : before + images * features] = 1
    tokens = generator.integers(3, config.text.vocab_size, len(is_image)).astype(np.int32)
    tokens[is_image > 0] = 0
    supervised = np.append(generator.random(len(tokens) - 1) < 0.5, False)
    supervised[:-1] &= is_image[1:] == 0
    supervised[-2] = is_image[-1] == 0
    size = config.vision.image_size
    return {
        "tokens": tokens,
        "targets": np.append(tokens[1:], 0).astype(np.int32),
        "loss_weights": supervised.astype(np.float32),
        "is_image": is_image,
        "images": generator.integers(0, 256, (images, size, size, 3), dtype=np.uint8),
        "source": text % 2,
    }


def packed(samples: list[dict], *, length: int, slots: int, packing: bool = True) -> Batch:
    """All samples in one batch, by the library's own packing."""
    size = lambda sample: (len(sample["tokens"]), len(sample["images"]))  # noqa: E731
    window = len(samples) if packing else 1
    rows = pack(samples, size, length=length, image_slots=slots, window=window)
    return from_rows(list(rows), length, slots, samples[0]["images"].shape[1])


def random_batch(config: ModelConfig, rows: int, *, length: int = 40, slots: int = 2, seed: int = 0) -> Batch:
    """`rows` rows of one to four samples each, with none to two images, unevenly supervised."""
    generator = np.random.default_rng(seed)
    parts = []
    for row in range(rows):
        samples = [random_sample(config, generator, 1, 8 + row % 5), random_sample(config, generator, 0, 6)]
        if row % 3:
            samples.append(random_sample(config, generator, 1, 7))
        if row % 4 == 0:
            samples = [random_sample(config, generator, 0, 9)]
        # One long row: every sample finds room in it.
        batch = packed(samples, length=length, slots=slots)
        assert batch.tokens.shape[0] == 1
        parts.append(batch)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def relative_errors(ours: Any, theirs: Any) -> dict[str, float]:
    """||ours - theirs|| / ||theirs|| of every leaf of two nested dicts; absolute where theirs is 0."""
    expected = dict(flatten(theirs))
    errors = {}
    for path, leaf in flatten(ours):
        norm = float(np.linalg.norm(np.asarray(expected[path], np.float64)))
        difference = np.asarray(leaf, np.float64) - np.asarray(expected[path], np.float64)
        errors[path] = float(np.linalg.norm(difference)) / (norm or 1.0)
    assert errors.keys() == expected.keys()
    return errors
