"""What all tests share: checked shape annotations, and a small world with its dataset and tokenizer."""

import dataclasses
import importlib.metadata
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator

import jaxtyping
import pytest

# Tests compile far longer than they compute: compile quickly, and the same program only once in a
# session. Before JAX starts; child processes inherit it.
_compiled = tempfile.TemporaryDirectory(prefix="sg4v-tests-")
_flags = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The newer emitters take several times as long to compile. JAX 0.12 has no others, and a flag that it
    # doesn't know ends the process.
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

# Every shape annotation of these packages is checked while the tests run. It has to happen before
# they are imported, so everything of the library is imported inside the fixtures below.
jaxtyping.install_import_hook(["sg4v_jax.models", "sg4v_jax.kernels"], "beartype.beartype")


@dataclasses.dataclass(frozen=True)
class TinyWorld:
    """A world small enough for every test, built once.

    Attributes:
      directory: where `write_world` put its files; `WorldFiles.below(directory)` names them.
      image_root: what image paths are relative to.
      tokenizer: a SentencePiece model of at most 640 pieces, as configs/*.py:tiny expects.
      captions: the dataset of dense captions (one image each).
      mix: the dataset of the instruction mix (one image or none, several turns).
    """

    directory: pathlib.Path
    image_root: pathlib.Path
    tokenizer: pathlib.Path
    captions: pathlib.Path
    mix: pathlib.Path


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """60 scenes, their questions and the photographs. Read only: tests share it."""
    return write_tiny_world(tmp_path_factory.mktemp("world"))


def write_tiny_world(directory: pathlib.Path) -> TinyWorld:
    """Builds it in an empty directory."""
    from sg4v_jax.data.build import build
    from sg4v_jax.data.conversation import training_texts
    from sg4v_jax.data.tokenizer import train_tokenizer
    from sg4v_jax.world import write_world

    files = write_world(directory, train_scenes=60, heldout_scenes=4, seed=0, image_size=72)
    tokenizer = directory / "tokenizer.model"
    texts = training_texts([files.cap_dense, files.sft_mix])
    train_tokenizer(texts, tokenizer, 640, hard_vocab_limit=False)
    datasets = directory / "datasets"
    captions, _ = build("captions", files.cap_dense, files.image_root, datasets)
    mix, _ = build("mix", files.sft_mix, files.image_root, datasets)
    return TinyWorld(directory, files.image_root, tokenizer, captions, mix)


@pytest.fixture(autouse=True)
def same_logging_after() -> Iterator[None]:
    """`main` sets up logging for a process of its own; the next test must not inherit it."""
    logger = logging.getLogger("sg4v_jax")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
