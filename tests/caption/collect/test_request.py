"""Token counts by the published examples, images as they are sent, answers as they come."""

import hashlib
import io
import json

import pytest
from PIL import Image

from sg4v_jax.caption.collect.request import (
    Item,
    RequestOptions,
    body,
    encode_image,
    fitted,
    image_tokens,
    parse_completion,
    prompt_tokens,
)
from sg4v_jax.data.image import ImageError
from tests.caption.collect.endpoint import completion, image_of


def encoded(form: str, size: tuple[int, int] = (64, 32), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(file, form, **options)
    return file.getvalue()


def item(prompt: str = "What?", model: str = "m", sha: str = "ab" * 32) -> Item:
    return Item("a.png", sha, 64, 32, "web", prompt, model)


@pytest.mark.parametrize(
    ("width", "height", "detail", "tokens"),
    [
        (1024, 1024, "high", 765),  # The three examples of OpenAI's own guide,
        (2048, 4096, "high", 1105),
        (4096, 8192, "low", 85),
        (512, 512, "high", 255),  # and the rule by hand.
        (513, 512, "high", 425),
        (10000, 20, "high", 85 + 4 * 170),
    ],
)
def test_image_tokens(width: int, height: int, detail: str, tokens: int) -> None:
    assert image_tokens(width, height, detail) == tokens


def test_prompt_tokens_are_of_the_image_that_is_sent() -> None:
    large = Item("a.png", "ab" * 32, 4000, 4000, "web", "x" * 400, "m")
    assert prompt_tokens(large, RequestOptions(max_image_side=512)) == 100 + 255 + 10
    assert fitted(4000, 1000, 2000) == (2000, 500) and fitted(10, 5000, 100) == (1, 100)
    assert fitted(4000, 1000, 0) == (4000, 1000)


def test_usual_images_are_sent_as_they_are() -> None:
    for form, mime in (("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")):
        data = encoded(form)
        assert encode_image(data, "a", 64) == (mime, data)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "TIFF"])
def test_large_and_unusual_images_become_jpeg(form: str) -> None:
    mime, data = encode_image(encoded(form), "a", 32)
    image = Image.open(io.BytesIO(data))
    assert (mime, image.format, image.size) == ("image/jpeg", "JPEG", (32, 16))
    assert all(abs(a - b) < 6 for a, b in zip(image.getpixel((5, 5)), (200, 30, 60), strict=True))


def test_broken_images_are_image_errors() -> None:
    with pytest.raises(ImageError, match=r"a\.png"):
        encode_image(encoded("PNG")[:50], "a.png", 16)
    with pytest.raises(ImageError, match=r"a\.png"):
        encode_image(b"no image", "a.png", 16)


def test_body_and_what_differs_between_attempts() -> None:
    data = encoded("PNG")
    options = RequestOptions(detail="low", max_tokens=7, extra={"max_tokens": None, "top_p": 0.5})
    first, second = (body(item(), data, options, attempt) for attempt in (0, 1))
    assert image_of(first) == data
    assert first["messages"][0]["content"][1]["image_url"]["detail"] == "low"
    assert first["top_p"] == 0.5 and "max_tokens" not in first
    assert (first["temperature"], first["seed"]) == (0.2, 0)
    assert (second["temperature"], second["seed"]) == (0.5, 1)
    assert RequestOptions(temperature=1.5).of_attempt(3) == {"temperature": 1.5, "seed": 3}
    for bad in ({"detail": "auto"}, {"max_tokens": 0}, {"temperature": 3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RequestOptions(**bad)


def test_the_id_is_of_image_prompt_and_model() -> None:
    ids = {item().id, item(prompt="Why?").id, item(model="n").id, item(sha="cd" * 32).id}
    assert len(ids) == 4 and item().id == item().id
    expected = f"{'ab' * 32} {hashlib.sha256(b'What?').hexdigest()} m"
    assert item().id == hashlib.sha256(expected.encode()).hexdigest()[:40]


def test_answers() -> None:
    found = parse_completion(json.dumps(completion(" Yes. ", "stop")).encode())
    assert (found.text, found.finish_reason, found.refused) == ("Yes.", "stop", False)
    assert (found.prompt_tokens, found.completion_tokens) == (400, 50)
    parts = completion("", refusal=None) | {"usage": None}
    parts["choices"][0]["message"]["content"] = [
        {"type": "text", "text": "A "},
        {"type": "text", "text": "b"},
    ]
    found = parse_completion(parts)
    assert found.text == "A b" and found.prompt_tokens is None
    refused = parse_completion(completion("", refusal="I won't."))
    assert refused.refused and refused.text == "I won't."
    assert parse_completion(b'{"choices": [{"message": {"content": "x \\ud83d"}}]}').text == "x \ufffd"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"\xff"]
)
def test_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_completion(data)
