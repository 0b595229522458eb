"""Small sets of captions with images, on disk as the commands leave them."""

import json
import pathlib
from typing import Any

import pytest
from PIL import Image

DENSE = (
    "In the image, a woman stands near two red umbrellas. The sign behind her reads \"OPEN\". "
    "She appears to be waiting for 12 people."
)  # fmt: skip
SHORT = "A woman on a beach."


def llava(image: str, caption: Any) -> dict[str, Any]:
    question = {"from": "human", "value": "<image>\nWhat is this?"}
    return {"id": image, "image": image, "conversations": [question, {"from": "gpt", "value": caption}]}


def write_json(path: pathlib.Path, records: Any) -> pathlib.Path:
    path.write_text(json.dumps(records))
    return path


def write_lines(path: pathlib.Path, lines: Any) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("images")
    for source in ("coco", "sam"):
        (root / source).mkdir()
        for index in range(6):
            color = (40 * index, 90, 200 if source == "sam" else 20)
            Image.new("RGB", (64, 40), color).save(root / source / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """A file of dense captions of all images, and one of short ones of all but two, in another order."""
    folder = tmp_path_factory.mktemp("sets")
    images = [f"{source}/{index}.png" for source in ("coco", "sam") for index in range(6)]
    dense = [llava(image, f"{DENSE} Number {image[-5]} of {image[:3]}.") for image in images]
    short = [
        {"image": image, "caption": f"{SHORT} {image.replace('/', ' ')}", "finished": True}
        for image in images[:1:-1]
    ]
    return write_json(folder / "dense.json", dense), write_lines(folder / "short.jsonl", short)
