"""Which parameters train, and at what rate: regex groups over parameter paths.

A path is written with slashes: `vision/tuned/mlp/up/kernel`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

# (regex that must match the whole path, learning-rate multiplier or None = frozen)
Groups = Sequence[tuple[str, float | None]]


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def assign(params: dict[str, Any], groups: Groups) -> dict[str, float | None]:
    """Multiplier of every parameter path: the first group whose regex matches.

    Raises:
      ValueError: naming every parameter that no group covers, or every group that covers none.
    """
    multipliers: dict[str, float | None] = {}
    uncovered, used = [], set()
    for path, _ in flatten(params):
        for regex, multiplier in groups:
            if re.fullmatch(regex, path):
                multipliers[path] = multiplier
                used.add(regex)
                break
        else:
            uncovered.append(path)
    if uncovered:
        raise ValueError("no group of config.optim.groups covers: " + ", ".join(uncovered))
    idle = [regex for regex, _ in groups if regex not in used]
    if idle:
        raise ValueError(
            "groups of config.optim.groups that cover no parameter (a typo, or hidden by an earlier "
            "one): " + ", ".join(map(repr, idle))
        )
    return multipliers


def split(params: dict[str, Any], groups: Groups) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) parts of a parameter dict."""
    multipliers = assign(params, groups)
    trainable = {path: leaf for path, leaf in flatten(params) if multipliers[path] is not None}
    frozen = {path: leaf for path, leaf in flatten(params) if multipliers[path] is None}
    return unflatten(trainable), unflatten(frozen)


def merge(trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `split`."""
    return unflatten(dict(flatten(trainable)) | dict(flatten(frozen)))


def multiplier_tree(trainable: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """Learning-rate multipliers with the structure of `trainable`."""
    by_path = {}
    for path, _ in flatten(trainable):
        by_path[path] = next(m for regex, m in groups if re.fullmatch(regex, path))
    return unflatten(by_path)


def count(params: dict[str, Any]) -> int:
    """Number of scalars in a tree of arrays or ShapeDtypeStructs."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
