"""Saving and resuming a run: parameters, optimizer, position in the data, and what it was."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from sg4v_jax.convert.orbax import CHECKPOINTS

# From the data states of all processes that saved, that of this process.
Resharded = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


class Checkpointer:
    """Asynchronous, atomic checkpoints of a run (see `convert.orbax` for the layout)."""

    def __init__(self, workdir: pathlib.Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._directory = (workdir / CHECKPOINTS).resolve()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None in a fresh run."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        params: dict[str, Any],
        opt_state: Any,
        data: grain.DatasetIterator,
        meta: dict[str, Any],
    ) -> None:
        """Saves in the background; the arrays may be donated as soon as this returns.

        Args:
          step: steps taken.
          params: all parameters, trainable and frozen.
          opt_state: optimizer state.
          data: the batch iterator, positioned after the batches that were trained on.
          meta: JSON-able description; see `convert.orbax`.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            # A list of leaves: their order is the optimizer's, their types are nobody's.
            opt_state=ocp.args.StandardSave(_numbered(opt_state)),
            data=grain.checkpoint.CheckpointSave(data),
            meta=ocp.args.JsonSave(meta),
        )
        self._manager.save(step, args=items, force=True)

    def restore(
        self, step: int, params: Any, opt_state: Any, data: grain.DatasetIterator, resharded: Resharded
    ) -> tuple[dict[str, Any], Any]:
        """Restores (params, opt_state) and moves `data` to where it was.

        Args:
          step: which checkpoint.
          params, opt_state: ShapeDtypeStructs with the shardings wanted now, which need not be
            those of the run that saved.
          data: a fresh batch iterator, repositioned in place.
          resharded: the state for `data`, from those of all processes that saved.
        """
        items = {
            "params": ocp.args.StandardRestore(params),
            "opt_state": ocp.args.StandardRestore(_numbered(opt_state)),
        }
        saved = sorted((self._directory / str(step) / "data").glob("process_*-of-*.json"))
        data.set_state(resharded([json.loads(path.read_text()) for path in saved]))
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves = [restored.opt_state[key] for key in sorted(restored.opt_state)]
        return restored.params, jax.tree.unflatten(jax.tree.structure(opt_state), leaves)

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _numbered(tree: Any) -> dict[str, Any]:
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
