"""No room of the house knows one above it (docs/architecture.md), and peers stay outside."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "sg4v_jax"

# From the ground up. A file imports from its own floor or below.
FLOORS = (
    ("__init__", "version", "atomic", "config"),
    ("kernels", "parallel", "page"),
    ("models",),
    ("data", "world"),
    ("convert",),
    ("infer",),
    ("train", "caption", "evaluate"),
    ("plan",),
    ("demo",),
    ("commands",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What the library is compared with, or replaces.
PEERS = {"torch", "transformers", "tensorflow", "torchvision", "safetensors"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: pathlib.Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether it runs when the file is imported) of every import."""
    tree = ast.parse(path.read_text())
    # Bodies of functions run later; those of classes and `if` run at once.
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    late = {id(node) for f in ast.walk(tree) if isinstance(f, functions) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from sg4v_jax import config` and `from sg4v_jax.data import build` name modules.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) not in late


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in FILES} == set(FLOOR), "say in FLOORS where the new room is"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_import_from_above(path: pathlib.Path) -> None:
    for name, line, _ in imports(path):
        parts = name.split(".")
        if parts[0] != "sg4v_jax" or parts[1] == "configs":
            continue
        assert parts[1] in FLOOR, f"{path}:{line}: {name}"
        assert FLOOR[parts[1]] <= FLOOR[room(path)], f"{path}:{line}: {name} is a floor above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_peers_stay_outside(path: pathlib.Path) -> None:
    for name, line, _ in imports(path):
        assert name.split(".")[0] not in PEERS, f"{path}:{line}: imports {name}"


def test_the_command_starts_quickly() -> None:
    """`--help` needs no JAX: the commands import the rooms they call when they are called."""
    for path in (PACKAGE / "__main__.py", *(PACKAGE / "commands").glob("*.py")):
        at_once = {name for name, _, now in imports(path) if now and "sg4v_jax.commands" not in name}
        assert {name.split(".")[0] for name in at_once} <= {
            "argparse",
            "os",
            "sys",
            "time",
            "collections",
            "typing",
        }
