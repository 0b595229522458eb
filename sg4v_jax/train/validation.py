"""The loss on records that a run doesn't train on, as it goes on."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sg4v_jax.data.batch import MODALITIES, kind_names, to_devices
from sg4v_jax.data.held_out import HeldOut
from sg4v_jax.data.mixture import Source
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.parallel.mesh import row_shard
from sg4v_jax.train.setup import Setup, loader_config, required
from sg4v_jax.train.step import Params, make_loss

log = logging.getLogger(__name__)

_NAME = "validation"
_FORM = ("template", "prompt", "aspect")


class Validation:
    """`config.validation`, at work: every so many steps, and after the last, the loss on held-out records.

    They are the same ones each time, each once, on any mesh and for any `config.seed`. All processes of the
    run call alike.
    """

    def __init__(
        self, config: ConfigDict, setup: Setup, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, num_steps: int
    ):
        """Raises:
        ValueError: `every` without a directory, or a directory without `every`.
        """
        options = config.validation
        self._every, self._num_steps, self._mesh = options.every, num_steps, mesh
        if not options.every:
            if options.directory:
                raise ValueError(
                    "config.validation.directory is set, and config.validation.every is not: say after how "
                    "many steps it is read"
                )
            return
        directory = required(options.directory, "config.validation.directory")
        read = dataclasses.replace(
            loader_config(config, setup.model),
            sources={_NAME: Source(directory, **{name: options[name] for name in _FORM})},
            replacement=None,
            seed=0,
            # No more rows at a time than the train step takes.
            batch_size=config.data.batch_size // config.train.accumulate,
        )
        self._records = HeldOut(read, tokenizer, options.num_records, row_shard(mesh))
        log.info("%s records of %s are for validation", f"{self._records.num_records:,}", directory)
        loss = make_loss(
            setup.graphdef,
            compute_dtype=jnp.dtype(config.train.compute_dtype),
            remat="none",
            loss_chunk=config.train.loss_chunk,
            kinds=len(kind_names(read.sources)),
        )
        self._loss = jax.jit(loss)

    def due(self, step: int) -> bool:
        """Whether it is to be done after `step` steps."""
        return bool(self._every) and (step % self._every == 0 or step == self._num_steps)

    def __call__(self, trainable: Params, frozen: Params) -> dict[str, float]:
        """Means over all supervised tokens of the held-out records; see docs/metrics.md for the names."""
        total: Any = None
        for batch in self._records:
            _, sums = self._loss(trainable, frozen, to_devices(batch, self._mesh))
            sums = jax.device_get(sums)
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        losses, tokens = total["kind_losses"], total["kind_tokens"]
        found = {
            "loss": losses.sum() / tokens.sum(),
            "accuracy": total["accuracy"] / tokens.sum(),
            "supervised_tokens": tokens.sum(),
        }
        for modality, loss, count in zip(MODALITIES, losses, tokens, strict=True):
            if count:
                found[f"loss/modality/{modality}"] = loss / count
        return {f"{_NAME}/{name}": value.item() for name, value in found.items()}
