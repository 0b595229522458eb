"""Checkpoints of training runs, as seen by everything that only wants the model.

A run's directory holds `tokenizer.model` and `checkpoints/<step>/` with the items `params`,
`opt_state`, `data` and `meta`. All are plain dicts, so the files outlive Flax and Optax.
"""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model

FORMAT_VERSION = 1
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.model"


def is_run(directory: pathlib.Path) -> bool:
    """Whether `directory` is a training run's."""
    return (directory / CHECKPOINTS).is_dir()


def read_meta(directory: pathlib.Path, step: int | None = None) -> dict[str, Any]:
    """The `meta` item: model shapes, template, step, tokenizer hash and the run's config."""
    with _manager(directory) as manager:
        step = _step(manager, directory, step)
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    if meta["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{directory}: checkpoint format {meta['format_version']}, this version reads {FORMAT_VERSION}"
        )
    return meta


def load_run(directory: pathlib.Path, step: int | None = None) -> ModelBundle:
    """Loads the parameters of a training run, as numpy arrays.

    Args:
      directory: the run's directory.
      step: which checkpoint; the newest by default.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
    """
    meta = read_meta(directory, step)
    config = ModelConfig.from_dict(meta["model"])
    _, shapes, _ = abstract_model(config)
    with _manager(directory) as manager:
        step = _step(manager, directory, step)
        # As host arrays: where they go is for whoever uses them to say.
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        restore = ocp.args.PyTreeRestore(shapes, restore_args=on_host)
        params = manager.restore(step, args=ocp.args.Composite(params=restore)).params
    tokenizer = directory / TOKENIZER
    return ModelBundle(
        config=config,
        params=params,
        tokenizer_file=tokenizer if tokenizer.exists() else None,
        template=meta["template"],
        aspect=meta["aspect"],
        prompt=meta["prompt"],
    )


def _manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        (directory / CHECKPOINTS).resolve(),
        item_names=("params", "opt_state", "data", "meta"),
        options=ocp.CheckpointManagerOptions(read_only=True),
    )


def _step(manager: ocp.CheckpointManager, directory: pathlib.Path, step: int | None) -> int:
    steps = sorted(manager.all_steps())
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"{directory}: no checkpoint of step {step or 'any'}; there are {steps}")
    return steps[-1] if step is None else step
