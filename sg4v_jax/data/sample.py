"""One record to one training sample: tokens, targets, supervision and images."""

import collections
import dataclasses
import threading
from typing import Any

import numpy as np

from sg4v_jax.data.conversation import IMAGE_TOKEN, encode_training, get_template, place_images
from sg4v_jax.data.image import load_image, preprocess
from sg4v_jax.data.records import Record, RecordError, Turn
from sg4v_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SampleFormat:
    """How records become samples.

    Attributes:
      template: name of the conversation template.
      aspect: `square` (crop) or `pad`; see `data.image.preprocess`.
      prompt: replaces the text of every human turn when set: a captioner is trained on one prompt.
      image_size: side of the model's input image in pixels.
      image_tokens: features per image.
      length: longest sample, counted after images are expanded; longer ones are cut at the end.
      image_slots: most images per sample.
    """

    template: str
    aspect: str
    prompt: str
    image_size: int
    image_tokens: int
    length: int
    image_slots: int


def make_sample(
    record: Record, images: list[bytes], form: SampleFormat, tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    """Encodes a record.

    Args:
      record: a validated record.
      images: the encoded bytes of `record.images`.
      form: how.
      tokenizer: the text tokenizer.

    Returns:
      `tokens` int32[n], `targets` int32[n], `loss_weights` float32[n], `is_image` int32[n] and
      `images` uint8[m, size, size, 3].

    Raises:
      RecordError: if there are more images than slots, or nothing is left to learn from.
      ImageError: if an image can't be read.
    """
    if len(record.images) > form.image_slots:
        raise RecordError(
            f"record {record.id!r} has {len(record.images)} images, more than data.image_slots="
            f"{form.image_slots}; raise it or drop the record"
        )
    turns = record.turns
    if form.prompt:
        turns = tuple(_with_prompt(turn, form.prompt) for turn in turns)
    template = get_template(form.template)
    has_images = bool(record.images)
    turns = place_images(turns) if has_images else turns
    try:
        encoded = encode_training(template, turns, tokenizer, has_images=has_images)
    except ValueError as error:
        raise RecordError(f"record {record.id!r}: {error}") from error
    tokens, mask, is_image = expand_images(encoded.tokens, encoded.loss_mask, form.image_tokens)
    # A position predicts the next token; the last one has nothing to predict.
    targets = np.append(tokens[1:], 0)[: form.length].astype(np.int32)
    weights = np.append(mask[1:], False)[: form.length].astype(np.float32)
    if not weights.any():
        raise RecordError(
            f"record {record.id!r} has no supervised token within data.seq_len={form.length}: "
            f"it is {len(tokens)} tokens long"
        )
    pixels = [
        preprocess(load_image(data, name=name), size=form.image_size, aspect=form.aspect)
        for name, data in zip(record.images, images, strict=True)
    ]
    shape = (0, form.image_size, form.image_size, 3)
    return {
        "tokens": tokens[: form.length],
        "targets": targets,
        "loss_weights": weights,
        "is_image": is_image[: form.length].astype(np.int32),
        "images": np.stack(pixels) if pixels else np.zeros(shape, np.uint8),
    }


def expand_images(
    tokens: np.ndarray, mask: np.ndarray | None, image_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replaces each image placeholder by `image_tokens` positions.

    Args:
      tokens: int[n] with IMAGE_TOKEN placeholders.
      mask: bool[n], which tokens are supervised; None means none.
      image_tokens: features per image.

    Returns:
      (tokens int32[k], mask bool[k], is_image bool[k]); tokens are 0 where a feature goes.
    """
    repeats = np.where(tokens == IMAGE_TOKEN, image_tokens, 1)
    expanded = np.repeat(tokens, repeats)
    is_image = expanded == IMAGE_TOKEN
    mask = np.zeros(len(tokens), bool) if mask is None else mask
    return np.where(is_image, 0, expanded).astype(np.int32), np.repeat(mask, repeats), is_image


def _with_prompt(turn: Turn, prompt: str) -> Turn:
    if turn.role != "human":
        return turn
    return Turn("human", "<image>\n" * turn.text.count("<image>") + prompt)


class Skipped:
    """Counts the records a run passes over, and why; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}

    def add(self, error: Exception) -> bool:
        """Counts one; True if its kind had not been seen before (worth a log line)."""
        kind = type(error).__name__
        with self._lock:
            self.reasons[kind] += 1
            return self.examples.setdefault(kind, str(error)) == str(error)

    @property
    def total(self) -> int:
        return sum(self.reasons.values())

    def summary(self) -> dict[str, Any]:
        """Counts by kind, with the first message of each."""
        return {kind: {"count": count, "first": self.examples[kind]} for kind, count in self.reasons.items()}
