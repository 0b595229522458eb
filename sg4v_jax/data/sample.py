"""One record to one training sample: tokens, targets, supervision and images."""

import dataclasses

import numpy as np

from sg4v_jax.data.conversation import IMAGE_TOKEN, encode_training, get_template, place_images
from sg4v_jax.data.image import ASPECTS, load_image, preprocess
from sg4v_jax.data.records import Record, RecordError, Turn
from sg4v_jax.data.tokenizer import Tokenizer

TOO_LONG = ("cut", "cut_text", "drop")


class SampleError(RecordError):
    """A good record that makes no sample in this run; `reason` is what it is counted as."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class SampleFormat:
    """How records become samples.

    Attributes:
      template: name of the conversation template.
      aspect: `square` (crop) or `pad`; see `data.image.preprocess`.
      prompt: replaces the text of every human turn when set: a captioner is trained on one prompt.
      image_size: side of the model's input image in pixels.
      image_tokens: features per image.
      length: tokens per row, which no sample exceeds.
      image_slots: most images per sample.
      max_tokens: tokens of the longest sample; None means `length`.
      too_long: what happens to longer ones. `cut` counts tokens after images are expanded and cuts the
        end off; `cut_text` counts an image as one token, as the original does (spec 3.8), so that a
        sample may have `image_tokens - 1` more for each image; `drop` leaves the record out.
    """

    template: str
    aspect: str
    prompt: str
    image_size: int
    image_tokens: int
    length: int
    image_slots: int
    max_tokens: int | None = None
    too_long: str = "cut"

    def __post_init__(self) -> None:
        get_template(self.template)
        if self.aspect not in ASPECTS:
            raise ValueError(f"data.aspect={self.aspect!r} is not one of {ASPECTS}")
        if self.too_long not in TOO_LONG:
            raise ValueError(f"data.too_long={self.too_long!r} is not one of {TOO_LONG}")
        if self.max_tokens is not None and not 0 < self.max_tokens <= self.length:
            raise ValueError(
                f"data.max_tokens={self.max_tokens} must be positive and at most data.seq_len={self.length}"
            )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A record as tokens, before any image is read.

    Attributes:
      tokens: int32[n]; 0 where an image feature goes.
      mask: bool[n], which tokens are supervised.
      is_image: bool[n].
      images: how many of the record's images are left.
      cut: how many tokens were cut off.
    """

    tokens: np.ndarray
    mask: np.ndarray
    is_image: np.ndarray
    images: int
    cut: int


def encode_sample(record: Record, form: SampleFormat, tokenizer: Tokenizer) -> Encoded:
    """Writes and encodes a record's turns, and cuts them to length.

    Raises:
      SampleError: if there are more images than slots, nothing is left to learn from, or the record
        is too long where such records are dropped.
      RecordError: if the template can't write it.
    """
    if len(record.images) > form.image_slots:
        raise SampleError(
            "too many images",
            f"record {record.id!r} has {len(record.images)} images, more than data.image_slots="
            f"{form.image_slots}; raise it or drop the record",
        )
    turns = record.turns
    if form.prompt:
        turns = tuple(_with_prompt(turn, form.prompt) for turn in turns)
    has_images = bool(record.images)
    turns = place_images(turns) if has_images else turns
    try:
        encoded = encode_training(get_template(form.template), turns, tokenizer, has_images=has_images)
    except ValueError as error:
        raise RecordError(f"record {record.id!r}: {error}") from error
    ids, mask = encoded.tokens, encoded.loss_mask
    full = len(ids) + int((ids == IMAGE_TOKEN).sum()) * (form.image_tokens - 1)
    limit = form.max_tokens or form.length
    if form.too_long == "cut_text":
        ids, mask, limit = ids[:limit], mask[:limit], form.length
    tokens, mask, is_image = expand_images(ids, mask, form.image_tokens)
    end = _cut_at(is_image, limit, form.image_tokens)
    tokens, mask, is_image = tokens[:end], mask[:end], is_image[:end]
    if full > len(tokens) and form.too_long == "drop":
        raise SampleError(
            "too long",
            f"record {record.id!r} is {full} tokens long, more than {_limit_name(form)}; raise it, or set "
            "data.too_long=cut",
        )
    # The first token is predicted from nothing.
    if not mask[1:].any():
        raise SampleError(
            "nothing to learn",
            f"record {record.id!r} has no supervised token within {_limit_name(form)}: it is {full} tokens "
            "long",
        )
    return Encoded(tokens, mask, is_image, int(is_image.sum()) // form.image_tokens, full - len(tokens))


def make_sample(
    record: Record, images: list[bytes], form: SampleFormat, tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    """Encodes a record with its images.

    Args:
      record: a validated record.
      images: the encoded bytes of `record.images`.
      form: how.
      tokenizer: the text tokenizer.

    Returns:
      `tokens` int32[n], `targets` int32[n], `loss_weights` float32[n], `is_image` int32[n], `images`
      uint8[m, size, size, 3], and `cut` int32[], the tokens that were cut off.

    Raises:
      RecordError: see `encode_sample`.
      ImageError: if an image can't be read.
    """
    encoded = encode_sample(record, form, tokenizer)
    pixels = np.empty((encoded.images, form.image_size, form.image_size, 3), np.uint8)
    for slot in range(encoded.images):
        image = load_image(images[slot], name=record.images[slot])
        pixels[slot] = preprocess(image, size=form.image_size, aspect=form.aspect)
    # A position predicts the next token; the last one has nothing to predict.
    return {
        "tokens": encoded.tokens,
        "targets": np.append(encoded.tokens[1:], 0).astype(np.int32),
        "loss_weights": np.append(encoded.mask[1:], False).astype(np.float32),
        "is_image": encoded.is_image.astype(np.int32),
        "images": pixels,
        "cut": np.array(encoded.cut, np.int32),
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


def _limit_name(form: SampleFormat) -> str:
    if form.max_tokens is None:
        return f"data.seq_len={form.length}"
    return f"data.max_tokens={form.max_tokens}"


def _with_prompt(turn: Turn, prompt: str) -> Turn:
    if turn.role != "human":
        return turn
    return Turn("human", "<image>\n" * turn.text.count("<image>") + prompt)


def _cut_at(is_image: np.ndarray, limit: int, image_tokens: int) -> int:
    """Where to cut so that at most `limit` tokens are left, and of each image all or nothing."""
    return limit - int(is_image[:limit].sum()) % image_tokens
