"""Parameters onto a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from sg4v_jax.parallel import rules


def param_shardings(shapes: Any, axes: Any, mesh: Mesh) -> Any:
    """NamedShardings of a parameter tree.

    Args:
      shapes: the tree with arrays or ShapeDtypeStructs.
      axes: the tree with tuples of logical axes; see `models.sharegpt4v.abstract_model`.
      mesh: the mesh.
    """
    return jax.tree.map(lambda leaf, names: rules.sharding(names, leaf.shape, mesh), shapes, axes)


def place(tree: Any, shardings: Any) -> Any:
    """Puts host arrays on devices; every process holds the whole array and keeps its shards."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)
