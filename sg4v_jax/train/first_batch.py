"""A look at a run's first batch before anything is learned from it: `first_batch.txt`."""

import logging
import math
import pathlib

import jax
import numpy as np

from sg4v_jax.data.batch import Batch
from sg4v_jax.data.show import to_text
from sg4v_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FILE_NAME = "first_batch.txt"
_ROWS = 4
_SHOWN = 1500  # characters in the log
# What random weights may be off the loss of guessing: their scores have a variance of about 1.
_OFF = 1.0


def write(workdir: pathlib.Path, batch: Batch, tokenizer: Tokenizer, image_tokens: int) -> None:
    """Writes some rows as text, with what the loss is on marked, and logs the beginning.

    Args:
      workdir: of the run.
      batch: on devices; those rows are looked at that lie on this process's first one.
      tokenizer: the text tokenizer.
      image_tokens: positions per image.
    """
    local = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data), batch)
    text = (
        f"The first batch has {batch.tokens.shape[0]} rows of {batch.tokens.shape[1]} tokens and "
        f"{batch.images.shape[1]} image slots. What the loss is on stands between « and ».\n\n"
        + to_text(local, tokenizer, image_tokens, rows=_ROWS, colour=False)
    )
    shown = (
        text if len(text) <= _SHOWN else text[:_SHOWN].rstrip() + f"\n... all of it: {workdir / FILE_NAME}"
    )
    log.info("%s", shown)
    (workdir / FILE_NAME).write_text(text)


def add_loss(workdir: pathlib.Path, loss: float, vocab_size: int, pretrained: bool) -> None:
    """Adds the first step's loss and what to make of it; warns if something is wrong.

    Args:
      workdir: of the run.
      loss: in nats per supervised token.
      vocab_size: of the decoder.
      pretrained: whether the decoder starts from weights that were trained.
    """
    line, good = judge_loss(loss, vocab_size, pretrained)
    log.log(logging.INFO if good else logging.WARNING, "%s", line)
    with (workdir / FILE_NAME).open("a") as file:
        file.write(line + "\n")


def judge_loss(loss: float, vocab_size: int, pretrained: bool) -> tuple[str, bool]:
    """(a sentence on the loss of the first step, whether it is as it should be)."""
    chance = math.log(vocab_size)
    line = f"loss of the first step: {loss:.3f}; guessing among {vocab_size} tokens gives {chance:.3f}"
    if not math.isfinite(loss):
        return f"{line}. It is not finite: look at the weights it starts from", False
    if pretrained:
        if loss < chance - _OFF:
            return f"{line}, trained weights less, as here", True
        return (
            f"{line}, and trained weights should give much less: are weights, tokenizer and template of "
            "one model?",
            False,
        )
    if abs(loss - chance) <= _OFF:
        return f"{line}, as random weights about do", True
    return f"{line}, and random weights should give about that: look at what is supervised", False
