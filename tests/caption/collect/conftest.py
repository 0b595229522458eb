"""Images to ask about, and whom to ask."""

import pathlib
from collections.abc import Iterator

import pytest

from tests.caption.collect.endpoint import FaultyEndpoint, draw_images, serve


@pytest.fixture
def endpoint() -> Iterator[FaultyEndpoint]:
    with serve() as found:
        yield found


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "data"


@pytest.fixture
def images(root: pathlib.Path) -> dict[str, str]:
    """24 images below `root`: path -> SHA-256."""
    return draw_images(root, 24)
