"""One request to a /chat/completions endpoint and its answer, as JSON; no network here."""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from sg4v_jax.caption.collect.prompts import prompt_sha256
from sg4v_jax.data.image import ImageError, load_image

DETAILS = ("high", "low")
# What every endpoint takes; anything else is sent as JPEG, of an animation the first frame.
_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_JPEG_QUALITY = 95
# GPT-4 with vision counts 85 tokens for an image and, in high detail, 170 more for each 512 x 512 tile of
# it, after it was fitted into 2048 x 2048 and its shorter side brought down to 768.
_IMAGE_TOKENS, _TILE_TOKENS = 85, 170
_FRAME_TOKENS = 10  # around the messages
_BYTES_PER_TOKEN = 4  # of English text


@dataclasses.dataclass(frozen=True)
class Item:
    """Something to ask once: the bytes of an image, with a prompt, of a model.

    Attributes:
      path: an image with these bytes, relative to the image root.
      image_sha256: of its bytes.
      width: in pixels.
      height: in pixels.
      source: where it comes from.
      prompt: what to ask.
      model: whom to ask.
    """

    path: str
    image_sha256: str
    width: int
    height: int
    source: str
    prompt: str
    model: str

    @functools.cached_property
    def id(self) -> str:
        """The key (image, prompt, model) as 40 characters; with an attempt's number, a `custom_id`."""
        key = f"{self.image_sha256} {prompt_sha256(self.prompt)} {self.model}"
        return hashlib.sha256(key.encode()).hexdigest()[:40]


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """How to ask.

    Attributes:
      detail: of the image, "high" or "low".
      max_tokens: of the answer.
      temperature: of the first attempt; later ones are warmer.
      seed: of the first attempt; later ones count up.
      max_image_side: larger images are made smaller, in pixels; 0 is any size.
      extra: put into the body over everything else; None takes a key out.
    """

    detail: str = "high"
    max_tokens: int = 1024
    temperature: float = 0.2
    seed: int = 0
    max_image_side: int = 2048
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.detail not in DETAILS:
            raise ValueError(f"detail {self.detail!r} is not one of {DETAILS}")
        if self.max_tokens < 1 or self.max_image_side < 0 or not 0 <= self.temperature <= 2:
            raise ValueError(
                f"max_tokens={self.max_tokens}, max_image_side={self.max_image_side} or "
                f"temperature={self.temperature} is out of range"
            )

    def of_attempt(self, attempt: int) -> dict[str, Any]:
        """What differs between attempts: the same seed and temperature would give the same answer."""
        temperature = round(min(1.0, self.temperature + 0.3 * attempt), 3)
        return {"temperature": max(self.temperature, temperature), "seed": self.seed + attempt}


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      text: what it says.
      finish_reason: why it ended; "" if not given.
      refused: the endpoint marked it as a refusal.
      model: who answered.
      prompt_tokens: as the endpoint counts; None if not given.
      completion_tokens: as the endpoint counts; None if not given.
    """

    text: str
    finish_reason: str
    refused: bool
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None


def body(item: Item, image: bytes, options: RequestOptions, attempt: int) -> dict[str, Any]:
    """The JSON body that asks about an image, given the bytes of its file."""
    mime, data = encode_image(image, item.path, options.max_image_side)
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    content = [
        {"type": "text", "text": item.prompt},
        {"type": "image_url", "image_url": {"url": url, "detail": options.detail}},
    ]
    fields = {
        "model": item.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": options.max_tokens,
        **options.of_attempt(attempt),
        **options.extra,
    }
    return {name: value for name, value in fields.items() if value is not None}


def encode_image(data: bytes, name: str, max_side: int) -> tuple[str, bytes]:
    """(MIME type, bytes to send): the file as it is, unless it is too large or of an unusual format.

    Raises:
      ImageError: can't be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as header:
            mime, size = _MIME.get(header.format or ""), header.size
    except OSError as error:
        raise ImageError(f"{name}: can't be decoded ({len(data)} bytes): {error}") from error
    if mime and not (max_side and max(size) > max_side):
        return mime, data
    image = load_image(data, name=name)
    image = image.resize(fitted(*size, max_side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=_JPEG_QUALITY)
    return "image/jpeg", encoded.getvalue()


def fitted(width: int, height: int, max_side: int) -> tuple[int, int]:
    """The size of an image after it was made to fit; 0 is any size."""
    if not max_side or max(width, height) <= max_side:
        return width, height
    scale = max_side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def image_tokens(width: int, height: int, detail: str) -> int:
    """What an image costs in tokens, by GPT-4's published rule; other models count otherwise."""
    if detail == "low":
        return _IMAGE_TOKENS
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width, height))
    tiles = math.prod(math.ceil(round(side * scale) / 512) for side in (width, height))
    return _IMAGE_TOKENS + _TILE_TOKENS * tiles


def text_tokens(text: str) -> int:
    """What a text costs in tokens: a quarter of its bytes, as English does on average."""
    return math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)


def prompt_tokens(item: Item, options: RequestOptions) -> int:
    """Estimated tokens of a request: text, image and frame."""
    size = fitted(item.width, item.height, options.max_image_side)
    return text_tokens(item.prompt) + image_tokens(*size, options.detail) + _FRAME_TOKENS


def parse_completion(data: bytes | Mapping[str, Any]) -> Completion:
    """Reads the body of a successful answer.

    Raises:
      ValueError: cut off, not JSON, or without an answer in it.
    """
    found = json.loads(data) if isinstance(data, bytes) else data
    try:
        choice = found["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        usage = found.get("usage") or {}
        text = content or refusal or ""
        if not isinstance(text, str):
            raise TypeError("content is no text")
        return Completion(
            # A lone half of a surrogate pair is valid JSON, but no file could hold it.
            text=text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip(),
            finish_reason=str(choice.get("finish_reason") or ""),
            refused=bool(refusal),
            model=str(found.get("model") or ""),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no choices[0].message.content in the answer ({error!r})") from error


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
