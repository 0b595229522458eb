"""What becomes of a record: lengths, cuts, and what is left out and why."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sg4v_jax.data.records import Record, Turn
from sg4v_jax.data.sample import SampleError, SampleFormat, encode_sample, make_sample
from sg4v_jax.data.tokenizer import Tokenizer

FEATURES = 5
FORM = SampleFormat(
    template="v1", aspect="pad", prompt="", image_size=8, image_tokens=FEATURES, length=400, image_slots=3
)


def image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (200, 10, 10)).save(file, "PNG")
    return file.getvalue()


def record(images: int, rounds: int = 2, answer: str = "A cat sits on a mat.") -> Record:
    """The first image in the first question, and so on."""
    turns = []
    for i in range(rounds):
        mine = "<image>\n" * (1 if i < images else 0)
        if i == rounds - 1:
            mine = "<image>\n" * max(0, images - rounds + 1)
        turns += [Turn("human", mine + "What is in the picture?"), Turn("gpt", answer)]
    return Record("r", tuple(f"{i}.png" for i in range(images)), tuple(turns))


def test_nothing_is_cut_that_fits(small_tokenizer: Tokenizer) -> None:
    sample = make_sample(record(2), [image()] * 2, FORM, small_tokenizer)
    assert sample["cut"] == 0
    assert sample["images"].shape == (2, 8, 8, 3)
    assert sample["is_image"].sum() == 2 * FEATURES
    np.testing.assert_array_equal(sample["targets"][:-1], sample["tokens"][1:])
    assert sample["loss_weights"][-1] == 0 < sample["loss_weights"].sum()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3), st.integers(60, 200), st.sampled_from(["cut", "cut_text"]))
def test_cutting_keeps_a_prefix_and_whole_images(images: int, limit: int, policy: str) -> None:
    whole = encode_sample(record(images, rounds=3), FORM, TOKENIZER)
    form = dataclasses.replace(FORM, max_tokens=limit, too_long=policy)
    try:
        part = encode_sample(record(images, rounds=3), form, TOKENIZER)
    except SampleError as error:
        assert error.reason == "nothing to learn"
        return
    n = len(part.tokens)
    assert part.cut == len(whole.tokens) - n
    for field in ("tokens", "mask", "is_image"):
        np.testing.assert_array_equal(getattr(part, field), getattr(whole, field)[:n])
    assert part.images * FEATURES == part.is_image.sum()
    text = n - (FEATURES - 1) * part.images if policy == "cut_text" else n
    assert text <= limit
    if part.cut:
        # Not one token more than needed, but for an image that did not fit whole.
        assert text == limit or (policy == "cut" and whole.is_image[n] and limit - text < FEATURES)


@pytest.fixture(autouse=True, scope="module")
def _tokenizer(small_tokenizer: Tokenizer) -> None:
    """For hypothesis, which takes no fixtures of a function."""
    global TOKENIZER
    TOKENIZER = small_tokenizer


def test_images_that_are_cut_off_are_not_read(small_tokenizer: Tokenizer) -> None:
    whole = encode_sample(record(3, rounds=3), FORM, small_tokenizer)
    second = np.flatnonzero(whole.is_image)[FEATURES]
    form = dataclasses.replace(FORM, max_tokens=int(second) + FEATURES - 1)
    sample = make_sample(record(3, rounds=3), [image(), b"no image", b"no image"], form, small_tokenizer)
    assert len(sample["images"]) == 1 and len(sample["tokens"]) == second
    assert sample["cut"] == len(whole.tokens) - second


def test_the_original_s_limit_counts_an_image_as_one(small_tokenizer: Tokenizer) -> None:
    whole = len(encode_sample(record(1), FORM, small_tokenizer).tokens)
    limit = whole - FEATURES + 1
    for policy, cut in (("cut", FEATURES - 1), ("cut_text", 0)):
        form = dataclasses.replace(FORM, max_tokens=limit, too_long=policy)
        assert encode_sample(record(1), form, small_tokenizer).cut == cut
    # The row is the limit nevertheless.
    form = dataclasses.replace(FORM, length=whole - 2, max_tokens=whole - 2, too_long="cut_text")
    assert encode_sample(record(1), form, small_tokenizer).cut == 2


@pytest.mark.parametrize(
    ("changes", "images", "reason", "message"),
    [
        ({"image_slots": 1}, 2, "too many images", r"has 2 images, more than data\.image_slots=1"),
        (
            {"max_tokens": 90, "too_long": "drop"},
            1,
            "too long",
            r"tokens long, more than data\.max_tok",
        ),
        ({"max_tokens": 20}, 0, "nothing to learn", r"no supervised token within data\.max_tokens=20: it is"),
        ({"length": 20}, 0, "nothing to learn", r"no supervised token within data\.seq_len=20: it is"),
    ],
)
def test_records_that_make_no_sample(
    changes: dict, images: int, reason: str, message: str, small_tokenizer: Tokenizer
) -> None:
    with pytest.raises(SampleError, match=message) as error:
        encode_sample(record(images), dataclasses.replace(FORM, **changes), small_tokenizer)
    assert error.value.reason == reason and "record 'r'" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"too_long": "truncate"}, r"data\.too_long='truncate' is not one of \('cut', 'cut_text', 'drop'\)"),
        ({"max_tokens": 401}, r"data\.max_tokens=401 must be positive and at most data\.seq_len=400"),
        ({"max_tokens": 0}, r"data\.max_tokens=0 must be positive"),
        ({"aspect": "crop"}, r"data\.aspect='crop' is not one of"),
        ({"template": "v2"}, r"unknown template 'v2'"),
    ],
)
def test_impossible_formats(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FORM, **changes)


def test_a_prompt_replaces_every_question(small_tokenizer: Tokenizer) -> None:
    form = dataclasses.replace(FORM, prompt="The red ball.")
    ids = encode_sample(record(1), form, small_tokenizer).tokens
    text = small_tokenizer.decode(ids)
    assert text.count("The red ball.") == 2 and "What" not in text
