"""What tests of conversion share: one tokenizer, and each source written once."""

import pathlib
from collections.abc import Callable

import pytest

TEXTS = ["What is this? A cat on a mat. USER: ASSISTANT: the curious user and the assistant 0123456789"] * 4


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A SentencePiece model of `writers.VOCAB` pieces."""
    from sg4v_jax.data.tokenizer import train_tokenizer
    from tests.convert.writers import VOCAB

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, path, VOCAB)
    return path


@pytest.fixture(scope="session")
def source(tokenizer_file: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Gives the source of a name in `sources.SOURCES`. Read only: tests share it."""
    import functools

    from tests.convert.sources import SOURCES

    return functools.cache(lambda name: SOURCES[name](tmp_path_factory.mktemp("source"), tokenizer_file))
