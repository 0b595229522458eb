"""From a prompt to the arrays that prefilling takes: on the host, by threads, ahead of need."""

import dataclasses
from typing import Generic, TypeVar

import numpy as np

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.data.conversation import IMAGE_TOKEN, encode_prompt, get_template, place_images, stop_string
from sg4v_jax.data.image import load_image, preprocess
from sg4v_jax.data.sample import expand_images
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.infer.request import Prompt, Request, ScoreRequest

AnyRequest = TypeVar("AnyRequest", Request, ScoreRequest)

# Shortest bucket of prompt lengths, and buckets between a power of two and the next.
SHORTEST, PER_OCTAVE = 64, 8


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A shape that prefilling is compiled for.

    Attributes:
      length: positions per row.
      images: image slots per row.
      choices, choice_length: for scoring, answers per row and tokens of each.
    """

    length: int
    images: int
    choices: int = 0
    choice_length: int = 0


@dataclasses.dataclass(frozen=True)
class Prepared(Generic[AnyRequest]):
    """A request that is ready to be prefilled, or will never be.

    Attributes:
      request: the request.
      tokens: int32[n], -1 where an image feature goes.
      pixels: uint8[images, size, size, 3].
      choices: for scoring, the tokens of each answer.
      bucket: its shape, which depends on nothing but the request.
      error: what is wrong with it; empty if nothing.
    """

    request: AnyRequest
    tokens: np.ndarray
    pixels: np.ndarray
    choices: tuple[list[int], ...]
    bucket: Bucket
    error: str = ""


class Preparer:
    """Encodes prompts and reads their images. Safe to share between threads.

    Attributes:
      capacity: positions that a prompt and its answer may take.
    """

    def __init__(self, bundle: ModelBundle, tokenizer: Tokenizer, capacity: int, max_beams: int):
        self._bundle, self._tokenizer, self._max_beams = bundle, tokenizer, max_beams
        self._template = get_template(bundle.template)
        self.capacity = min(capacity, bundle.config.text.max_positions)

    def __call__(self, request: AnyRequest) -> Prepared[AnyRequest]:
        """Prepares a request. Never raises: what is wrong with it is in the result."""
        try:
            return self._prepare(request)
        except Exception as error:
            # A corpus has requests nobody thought of; one of them costs one of them.
            known = isinstance(error, ValueError)
            message = str(error) if known else f"{type(error).__name__}: {error}"
            empty = np.zeros(0, np.int32)
            return Prepared(request, empty, empty, (), Bucket(0, 0), message or type(error).__name__)

    def _prepare(self, request: AnyRequest) -> Prepared[AnyRequest]:
        tokens = self.encode(request.prompt)
        if isinstance(request, ScoreRequest):
            choices = self._choices(request)
            new = max(map(len, choices))
            what = f"a choice of {new}"
        else:
            choices = ()
            new = request.options.max_new_tokens
            what = f"max_new_tokens={new}"
            if request.options.num_beams > self._max_beams:
                raise ValueError(
                    f"num_beams={request.options.num_beams} is more than the engine was started with: "
                    f"{self._max_beams}"
                )
        if len(tokens) + new > self.capacity:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and {what} are more than the {self.capacity} positions "
                "of a slot; shorten it, lower max_new_tokens or raise the engine's capacity (at most the "
                f"model's {self._bundle.config.text.max_positions})"
            )
        images = len(request.prompt.images)
        bucket = Bucket(
            length=min(bucket_length(len(tokens)), self.capacity),
            images=_power_of_two(images) if images else 0,
            choices=_power_of_two(len(choices)) if choices else 0,
            choice_length=-(-new // 8) * 8 if choices else 0,
        )
        return Prepared(request, tokens, self._pixels(request.prompt), choices, bucket)

    def encode(self, prompt: Prompt) -> np.ndarray:
        """int32[n], -1 where an image feature goes; ValueError for what is no prompt."""
        has_images = bool(prompt.images)
        turns = place_images(prompt.turns, as_asked=True) if has_images else prompt.turns
        template = get_template(prompt.template) if prompt.template else self._template
        if stop_string(template) != stop_string(self._template):
            raise ValueError(
                f"answers under {template.name!r} don't end like those of {self._template.name!r}"
            )
        ids = encode_prompt(template, turns, self._tokenizer, has_images=has_images)
        placeholders = int((ids == IMAGE_TOKEN).sum())
        if placeholders != len(prompt.images):
            raise ValueError(f"{len(prompt.images)} images for {placeholders} <image> in the turns")
        tokens, _, is_image = expand_images(ids, None, self._bundle.config.vision.num_image_tokens)
        return np.where(is_image, -1, tokens).astype(np.int32)

    def _choices(self, request: ScoreRequest) -> tuple[list[int], ...]:
        choices = tuple(self._tokenizer.encode(choice) for choice in request.choices)
        if not choices or not all(choices):
            raise ValueError("a score needs at least one choice, and none that is empty")
        return choices

    def _pixels(self, prompt: Prompt) -> np.ndarray:
        size = self._bundle.config.vision.image_size
        pixels = np.zeros((len(prompt.images), size, size, 3), np.uint8)
        for i, data in enumerate(prompt.images):
            image = load_image(data, name=f"image {i} of the prompt")
            pixels[i] = preprocess(image, size=size, aspect=prompt.aspect or self._bundle.aspect)
        return pixels


def bucket_length(length: int) -> int:
    """The shape that a prompt of this length is padded to: at most an eighth longer, if not short."""
    step = max(SHORTEST, 2 ** (max(length - 1, 1).bit_length() - 1) // PER_OCTAVE)
    return -(-length // step) * step


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
