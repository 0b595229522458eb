"""Records and datasets, as the tests of building need them."""

import pathlib
from typing import Any

from sg4v_jax.data.build import decode_example, open_dataset


def record(id: str, image: Any = None, answer: str = "A cup.") -> dict[str, Any]:
    question = "What is it?" if image is None else "<image>\nWhat is it?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": turns}


def ids_of(directory: pathlib.Path) -> list[str]:
    dataset = open_dataset(directory)
    return [decode_example(dataset[i], "x", i)[0].id for i in range(len(dataset))]


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in pathlib.Path(directory).rglob("*")
        if path.is_file()
    }
