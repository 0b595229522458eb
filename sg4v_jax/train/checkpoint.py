"""Saving and resuming a run: parameters, optimizer, position in the data, and what it was."""

import json
import logging
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sg4v_jax.convert import manifest
from sg4v_jax.convert.orbax import CHECKPOINTS

log = logging.getLogger(__name__)

# From the data states of all processes that saved, that of this process.
Resharded = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

DAMAGED = "damaged"
# Where old checkpoints go before their files are removed: what has a number is whole.
DELETED = "deleted"
# Failed saves in a row after which the run ends: it would only train what nobody gets.
MAX_FAILURES = 3
_POLL_SECONDS = 0.05


class Checkpointer:
    """Asynchronous, atomic checkpoints of a run (see `convert.orbax` for the layout).

    All methods are called by all processes of the run alike.

    Args:
      workdir: the run's directory.
      keep: how many of the newest are kept.
      keep_every: those of steps that divide by it are kept for good; 0 for none.
      max_wait: seconds that a save waits at most for the one before it; then it is left out.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int, keep_every: int = 0, max_wait: float = 60.0):
        self._workdir, self._directory = workdir, (workdir / CHECKPOINTS).resolve()
        self._max_wait = max_wait
        self._saving: int | None = None  # The step whose save is under way.
        self._needed = False
        self._failures = 0
        self._remover: threading.Thread | None = None
        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
                manifest.ITEM: manifest.ManifestHandler(),  # Of the others, so the last.
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                # A rename happens or it doesn't; a kill in a deletion would leave half of a checkpoint.
                todelete_subdir=DELETED,
                # What a killed process has begun: nobody will finish it.
                cleanup_tmp_directories=True,
            ),
        )
        self._remove_deleted()  # What a killed process was removing.

    def latest_step(self) -> int | None:
        """The newest good checkpoint's step; None in a fresh run.

        Newer ones that are damaged are moved to `WORKDIR/damaged`, so that their steps can be saved again.

        Raises:
          DamagedCheckpoint: there are checkpoints, and none is good. They stay where they are.
        """
        bad: dict[int, list[str]] = {}
        for step in sorted(_numbered_directories(self._directory), reverse=True):
            if not (found := self._problems(step)):
                self._set_aside(bad, step)
                return step
            bad[step] = found
        if bad:
            lines = [line for found in bad.values() for line in found]
            raise manifest.DamagedCheckpoint(f"{self._directory} has no good checkpoint", lines)
        return None

    def save(
        self,
        step: int,
        params: dict[str, Any],
        opt_state: Any,
        data: grain.DatasetIterator,
        meta: dict[str, Any],
        *,
        needed: bool = False,
    ) -> None:
        """Saves in the background; the arrays may be donated as soon as this returns.

        A save that fails, as on a full disk, is told and made good by the next one: older checkpoints
        are only deleted after a newer one is complete.

        Args:
          step: steps taken.
          params: all parameters, trainable and frozen.
          opt_state: optimizer state.
          data: the batch iterator, positioned after the batches that were trained on.
          meta: JSON-able description; see `convert.orbax`.
          needed: whether there may be no next save: it waits for as long as it takes, and a failure is
            an error.

        Raises:
          OSError: it failed and was needed, or too many failed in a row.
        """
        start = time.perf_counter()
        if not self._finish(wait=None if needed else self._max_wait):
            log.warning(
                "step %d is not saved: step %d is still being written after %.0f s "
                "(config.checkpoint.max_wait); is the disk too slow for config.checkpoint.every?",
                *(step, self._saving, time.perf_counter() - start),
            )
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            # A list of leaves: their order is the optimizer's, their types are nobody's.
            opt_state=ocp.args.StandardSave(_numbered(opt_state)),
            data=grain.checkpoint.CheckpointSave(data),
            meta=ocp.args.JsonSave(meta),
            **{manifest.ITEM: manifest.ManifestArgs()},
        )
        self._saving, self._needed, error = step, needed, None
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as failure:  # Whatever a file system has to say: see `_failed`.
            error = failure
        if _any_process(error is not None):
            self._failed(error)
        else:
            self._remove_deleted()
        log.info("step %d is being saved; it held up training for %.2f s", step, time.perf_counter() - start)

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
        """Waits for the save under way.

        Raises:
          OSError: it failed.
        """
        self._needed = True
        try:
            self._finish(wait=None)
        finally:
            sys.unraisablehook = self._hook
            if self._remover:
                self._remover.join()
                self._remove()  # What has come since it looked.
        self._manager.close()

    def _finish(self, wait: float | None) -> bool:
        """Waits for the save under way, for no longer than `wait` seconds; whether there is none now."""
        if self._saving is None:
            return True
        if wait is not None and not self._finished_within(wait):
            return False
        error = None
        try:
            self._manager.wait_until_finished()
        except Exception as failure:  # Of any kind: see `_failed`.
            error = failure
        if _any_process(error is not None):
            self._failed(error)
        else:
            self._saving, self._failures = None, 0
        return True

    def _finished_within(self, seconds: float) -> bool:
        """By the first process's clock, for all."""
        end = time.monotonic() + seconds
        while (busy := self._manager.is_saving_in_progress()) and time.monotonic() < end:
            if jax.process_index() > 0:
                break
            time.sleep(_POLL_SECONDS)
        if jax.process_count() > 1:
            busy = bool(multihost_utils.broadcast_one_to_all(np.array(busy)))
        return not busy

    def _remove_deleted(self) -> None:
        """In the background, removes the old checkpoints that the save under way puts aside."""
        if jax.process_index() == 0 and not (self._remover and self._remover.is_alive()):
            self._remover = threading.Thread(target=self._remove, daemon=True, name="remove checkpoints")
            self._remover.start()

    def _remove(self) -> None:
        while self._manager.is_saving_in_progress():
            time.sleep(_POLL_SECONDS)
        # Not the directory itself: the next save may be about to put something there.
        for old in (self._directory / DELETED).glob("*"):
            shutil.rmtree(old, ignore_errors=True)

    def _unraisable(self, found: "sys.UnraisableHookArgs") -> None:
        """When one write fails, Orbax closes the loop that the others report to; each then complains."""
        if not (isinstance(found.exc_value, RuntimeError) and "Event loop is closed" in str(found.exc_value)):
            self._hook(found)

    def _failed(self, error: Exception | None) -> None:
        """Removes what there is of the failed save, and tells."""
        step, self._saving = self._saving, None
        self._failures += 1
        if jax.process_index() == 0:
            # Where the disk is full, half a checkpoint is in the way of the next.
            for left in self._directory.glob(f"{step}.*"):
                shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(self._directory).free / 1e9
        message = (
            f"{self._directory / str(step)} could not be saved: {_reason(error)}. {free:.2f} GB are free "
            "there: make room, lower config.checkpoint.keep, or move WORKDIR to a larger disk. Older "
            "checkpoints are whole"
        )
        _sync("sg4v_failed_save")
        self._manager.reload()
        if self._needed or self._failures >= MAX_FAILURES:
            raise OSError(f"{message}; the run goes on from the newest when it is started again") from error
        log.error("%s; the next save tries again (failure %d of %d)", message, self._failures, MAX_FAILURES)

    def _problems(self, step: int) -> list[str]:
        """What is wrong with a checkpoint: every process reads its share of the files, and all agree."""
        path = self._directory / str(step)
        if step == 0 and not manifest.has_manifest(path):
            return []  # A converted model; it is for the caller to refuse it.
        found = manifest.problems(path, share=(jax.process_index(), jax.process_count()))
        if _any_process(bool(found)):
            return found or [f"{path} is damaged; another process says where"]
        return []

    def _set_aside(self, bad: dict[int, list[str]], good: int) -> None:
        for step, found in bad.items():
            shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
            target = _free_name(self._workdir / DAMAGED / str(step))
            log.error(
                "the checkpoint of step %d is damaged (%s): it is moved to %s, and the run goes back to "
                "step %d",
                *(step, shown, target, good),
            )
            _sync("sg4v_set_aside")  # All have read it, and found a name.
            if jax.process_index() == 0:
                target.parent.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(target)
        if bad:
            _sync("sg4v_set_aside")
            self._manager.reload()


def _numbered(tree: Any) -> dict[str, Any]:
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _numbered_directories(directory: pathlib.Path) -> list[int]:
    return [int(path.name) for path in directory.iterdir() if path.name.isdigit()]


def _free_name(path: pathlib.Path) -> pathlib.Path:
    names = (path.with_name(f"{path.name}-{i}") if i else path for i in range(1 << 20))
    return next(name for name in names if not name.exists())


def _reason(error: Exception | None) -> str:
    """The first line of what went wrong: tensorstore adds its source lines."""
    if error is None:
        return "another process failed"
    return str(error).partition("\n")[0] or type(error).__name__


def _any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
