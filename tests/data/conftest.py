"""Tokenizers for the data tests."""

import importlib.resources
import os
import pathlib

import pytest

from sg4v_jax.data.tokenizer import Tokenizer, train_tokenizer
from tests.conftest import TinyWorld

# LLaMA's tokenizer.model is under Meta's licence: it is never part of the repository.
_LLAMA = "../shared/assets/llama-tokenizer/tokenizer.model"
_REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def llama_tokenizer() -> Tokenizer:
    """The tokenizer of LLaMA and Vicuna. Must be there in CI; elsewhere its tests are skipped."""
    path = pathlib.Path(os.environ.get("SG4V_LLAMA_TOKENIZER") or _REPOSITORY / _LLAMA)
    if not path.is_file():
        reason = f"no LLaMA tokenizer.model at {path}; set SG4V_LLAMA_TOKENIZER to its path"
        if os.environ.get("CI", "").lower() not in ("", "0", "false", "no"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def mistral_tokenizer() -> Tokenizer:
    """A model of LLaMA's size and settings with other pieces, under an open licence."""
    return Tokenizer(str(importlib.resources.files("mistral_common") / "data/tokenizer.model.v1"))


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """400 pieces, trained on the spot."""
    texts = [
        "A chat between a curious user and an artificial intelligence assistant.",
        "USER: What is in the picture? ASSISTANT: A cat sits on a mat in front of a window.",
        "The picture shows two dogs, 3 cats and a red ball on the green grass.",
    ]
    return train_tokenizer(texts, tmp_path_factory.mktemp("sp") / "small.model", 400)


@pytest.fixture
def images(tiny_world: TinyWorld, tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a good image, a cut-off one, and a good one beside it, out of reach."""
    root = tmp_path / "images"
    root.mkdir()
    data = sorted((tiny_world.image_root / "photos").iterdir())[0].read_bytes()
    (root / "good.jpg").write_bytes(data)
    (root / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "secret.jpg").write_bytes(data)
    os.symlink(tmp_path / "secret.jpg", root / "link.jpg")
    return root
