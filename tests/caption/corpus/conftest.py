"""The images that a corpus's tests share."""

import pathlib

import pytest

from tests.caption.corpus.fake import write_images


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """As many images as the module's COUNT, named a/0000.png, b/0001.png, ...; 5 is cut off."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, request.module.COUNT)
    return root
