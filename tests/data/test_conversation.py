"""Ids and masks of every template, against an emulation of what the released weights saw."""

import re

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from sg4v_jax.data.conversation import (
    IMAGE_TOKEN,
    TEMPLATES,
    encode_prompt,
    encode_training,
    get_template,
    place_images,
    render,
    stop_string,
)
from sg4v_jax.data.records import Turn
from sg4v_jax.data.tokenizer import Tokenizer

# Part one: the old stack, written from its description and independent of the library.


class OldStack:
    """transformers 4.31's slow LlamaTokenizer(legacy=False) and ShareGPT4V's masking on top."""

    def __init__(self, path: object):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def tokenize(self, text: str) -> list[int]:
        """`tokenizer(text).input_ids`: control tokens are cut out of the whole text first."""
        text = "▁" + text.replace("▁", " ")
        ids = [1]
        for part in re.split("(</s>|<s>|<unk>)", text):
            if part in ("</s>", "<s>", "<unk>"):
                ids.append(self.sp.piece_to_id(part))
            elif part:
                ids += [self.sp.piece_to_id(piece) for piece in self.pieces(part)]
        return ids

    def pieces(self, part: str) -> list[str]:
        first = part.startswith("▁")
        part = part[1:] if first else part
        pieces: list[str] = self.sp.encode(part, out_type=str)
        if not first and not part.startswith(" ") and pieces[0].startswith("▁"):
            pieces[:1] = [pieces[0][1:]] if len(pieces[0]) > 1 else []
        return pieces

    def with_images(self, text: str) -> list[int]:
        """`tokenizer_image_token`: chunks between images are separate texts; one <s> is kept."""
        ids = [1]
        for i, chunk in enumerate(text.split("<image>")):
            ids += [-200] * (i > 0) + self.tokenize(chunk)[1:]
        return ids

    def rounds(self, text: str, sep: str, has_image: bool) -> tuple[list[int], list[bool]] | None:
        """`preprocess_v1` (sep " ASSISTANT: ") and `preprocess_llama_2` (sep "[/INST] ").

        None where upstream gives up and masks the whole sample.
        """
        encode = self.with_images if has_image else self.tokenize
        ids = encode(text)
        mask = [True] * len(ids)
        at = 1
        mask[0] = False
        for part in text.split("</s>"):
            halves = part.split(sep)
            if not part or len(halves) != 2:
                break
            instruction = len(encode(halves[0] + sep)) - 2
            mask[at : at + instruction] = [False] * instruction
            at += len(encode(part))
        mask[at:] = [False] * (len(ids) - at)
        # Upstream compares with the number of ids that are not padding, and <unk> is padding.
        return (ids, mask) if at == sum(i != 0 for i in ids) else None


@pytest.fixture(scope="module")
def old(llama_tokenizer: Tokenizer) -> OldStack:
    return OldStack(llama_tokenizer.path)


# Part two: facts.

CAT = (
    Turn("human", "<image>\nWhat is this?"),
    Turn("gpt", "A cat."),
    Turn("human", "Color?"),
    Turn("gpt", "Black."),
)
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# fmt: off
V1_IDS = [
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889,
    3148, 1001, 29901, 29871,
    -200, 29871, 13, 5618, 338, 445, 29973, 319, 1799, 9047, 13566, 29901, 319, 6635, 29889, 2,
    3308, 1001, 29901, 9159, 29973, 319, 1799, 9047, 13566, 29901, 6054, 29889, 2,
]
# fmt: on


def test_v1_vector(llama_tokenizer: Tokenizer) -> None:
    encoded = encode_training(get_template("v1"), CAT, llama_tokenizer)
    assert encoded.tokens.dtype == np.int32
    assert encoded.loss_mask.dtype == np.bool_
    assert len(V1_IDS) == 64
    assert encoded.tokens.tolist() == V1_IDS
    assert np.flatnonzero(encoded.loss_mask).tolist() == [47, 48, 49, 50, 61, 62, 63]
    assert V1_IDS[35] == IMAGE_TOKEN


def test_plain_vector(llama_tokenizer: Tokenizer) -> None:
    turns = [Turn("human", "Describe it.\n<image>"), Turn("gpt", "A cat on a mat.")]
    encoded = encode_training(get_template("plain"), turns, llama_tokenizer)
    assert encoded.tokens.tolist() == [1, -200, 319, 6635, 373, 263, 1775, 29889, 13]
    assert encoded.loss_mask.tolist() == [False, False] + [True] * 7
    prompt = encode_prompt(get_template("plain"), turns[:1], llama_tokenizer)
    assert prompt.dtype == np.int32
    assert prompt.tolist() == [1, -200]


def test_plain_takes_several_images(llama_tokenizer: Tokenizer) -> None:
    turns = [Turn("human", "<image>\n<image>\nCompare."), Turn("gpt", "Same.")]
    encoded = encode_training(get_template("plain"), turns, llama_tokenizer)
    assert encoded.tokens.tolist()[:3] == [1, -200, -200]
    assert encoded.loss_mask.tolist()[:4] == [False, False, False, True]


def test_llama_2_vector(llama_tokenizer: Tokenizer, old: OldStack) -> None:
    encoded = encode_training(get_template("llama_2"), CAT, llama_tokenizer)
    text = [llama_tokenizer.decode([i]) for i in encoded.tokens]
    supervised = encoded.tokens[encoded.loss_mask].tolist()
    assert supervised == [319, 6635, 29889, 29871, 2, 6054, 29889, 29871, 2]
    tail = [2, 1, 29961, 25580, 29962, 9159, 29973, 518, 29914, 25580, 29962]
    assert encoded.tokens.tolist()[-len(tail) - 4 : -4] == tail, text


# Part three: text.

RENDERED = {
    "v1": f"{V1_SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Color? ASSISTANT:",
    "share4v_v1": V1_SYSTEM.replace("user", "human")
    + " USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Color? ASSISTANT:",
    "llama_2": "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer "
    "as helpfully as possible, while being safe.  Your answers should not include any harmful, "
    "unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
    "responses are socially unbiased and positive in nature.\n\nIf a question does not make any "
    "sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information.\n<</SYS>>"
    "\n\n<image>\nWhat is this? [/INST] A cat. </s><s>[INST] Color? [/INST]",
    "share4v_llama_2": "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are "
    "able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language.\n<</SYS>>\n\n<image>\nWhat is this? [/INST] A cat. "
    "</s><s>[INST] Color? [/INST]",
}


@pytest.mark.parametrize("name", RENDERED)
def test_render(name: str) -> None:
    template = get_template(name)
    answer = " Black. </s>" if "llama" in name else " Black.</s>"
    assert render(template, CAT[:3]) == RENDERED[name]
    assert render(template, CAT) == RENDERED[name] + answer


def test_render_plain() -> None:
    assert render(get_template("plain"), CAT[:1]) == "<image>"
    assert render(get_template("plain"), CAT[:2]) == "<image>A cat.\n"


def test_template_names() -> None:
    assert set(TEMPLATES) == {*RENDERED, "vicuna_v1", "plain", "v0_plain"}
    assert get_template("vicuna_v1") is get_template("v1")
    assert get_template("v0_plain") is get_template("plain")
    with pytest.raises(ValueError, match=r"unknown template 'vicuna_v'. Did you mean 'vicuna_v1'"):
        get_template("vicuna_v")
    with pytest.raises(ValueError, match="Known: llama_2, plain"):
        get_template("###")


def test_stop_strings() -> None:
    stops = {name: stop_string(get_template(name)) for name in TEMPLATES}
    assert {name for name, stop in stops.items() if stop == "\n"} == {"plain", "v0_plain"}
    assert {stop for name, stop in stops.items() if "plain" not in name} == {"</s>"}


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("  <image> What? ", "<image>\nWhat?"),
        ("a <image> b", "<image>\na  b"),
        ("<image>", "<image>"),
        ("no image ", "no image "),
        ("<image> a <image>", "<image>\n<image>\na"),
        ("<image><image>", "<image>\n<image>"),
    ],
)
def test_place_images(text: str, placed: str) -> None:
    turns = place_images([Turn("human", text), Turn("gpt", "an <image> tag ")])
    assert turns == (Turn("human", placed), Turn("gpt", "an <image> tag "))
    assert place_images(turns) == turns


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("<image>\nA. cod\nB. owl\n", "<image>\nA. cod\nB. owl\n"),
        ("<image>\n  What? ", "<image>\n  What? "),
        ("<image>\n<image>\nSame?\n", "<image>\n<image>\nSame?\n"),
        # Where images have to move there is no asking as it was.
        ("What? <image>\n", "<image>\nWhat?"),
        ("<image>\nSame as <image>?\n", "<image>\n<image>\nSame as ?"),
        ("<image>", "<image>"),
        ("no image ", "no image "),
    ],
)
def test_prompts_stay_as_they_are_asked(text: str, placed: str) -> None:
    assert place_images([Turn("human", text)], as_asked=True) == (Turn("human", placed),)


# Part four: against the old stack.

NASTY = [
    " ",
    "   ",
    "\n",
    "A cat.",
    " leading",
    "trailing ",
    "trailing\n\n",
    "  2 both 22  ",
    "\tx\r\ny",
    "1234567890 3.14 2023-11-07",
    "日本語のテキスト。",
    "😀👩‍👩‍👧‍👦 ok",
    "e\u0301\u00a0\u200b\ufeffx",
    "▁▁word▁",
    "ASSISTANT:",
    "USER: a USER:",
    "ASSISTANT: x",
    "[INST] <<SYS>> x",
    "a\0b",
    "</ s> <s < image> <|endoftext|> ###",
    "def f(x):\n    return x\n",
]
CONTROLS = ["</s>", "<s>", "<unk>", " ASSISTANT: ", "</s>USER: x ASSISTANT: y", "[/INST] "]
ROUNDS = [name for name in TEMPLATES if name in RENDERED]


def separator(name: str) -> str:
    return "[/INST] " if "llama" in name else " ASSISTANT: "


def is_plain_text(text: str) -> bool:
    """Whether upstream can tell the text from the template's own strings."""
    marks = ("</s>", "<s>", "<unk>", "<image>", " ASSISTANT:", "[/INST]")
    return not any(mark in f" {text}" for mark in marks)


def same_as_old(name: str, turns: list[Turn], has_images: bool, old: OldStack, tokenizer: Tokenizer) -> None:
    placed = list(place_images(turns)) if has_images else turns
    template = get_template(name)
    expected = old.rounds(render(template, placed), separator(name), has_images)
    assert expected is not None
    encoded = encode_training(template, placed, tokenizer, has_images=has_images)
    assert encoded.tokens.tolist() == expected[0]
    assert encoded.loss_mask.tolist() == expected[1]


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("has_images", [True, False])
def test_nasty_texts_as_upstream(
    name: str, has_images: bool, old: OldStack, llama_tokenizer: Tokenizer
) -> None:
    picture = "<image>\n" if has_images else ""
    for question in NASTY:
        for answer in NASTY:
            if not (is_plain_text(question) and is_plain_text(answer)):
                continue
            turns = [Turn("human", picture + question), Turn("gpt", answer)]
            turns += [Turn("human", answer), Turn("gpt", question)]
            same_as_old(name, turns, has_images, old, llama_tokenizer)


def test_nasty_texts_as_upstream_in_another_vocabulary(mistral_tokenizer: Tokenizer) -> None:
    old = OldStack(mistral_tokenizer.path)
    for name in ROUNDS:
        for question, answer in zip(NASTY, reversed(NASTY), strict=True):
            if is_plain_text(question) and is_plain_text(answer):
                turns = [Turn("human", f"<image>\n{question}"), Turn("gpt", answer)] * 2
                same_as_old(name, turns, True, old, mistral_tokenizer)


texts = st.one_of(
    st.text(min_size=1),
    st.lists(st.sampled_from([*NASTY, " ", "\n", "cat", "12"]), min_size=1).map("".join),
).filter(is_plain_text)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    st.sampled_from(ROUNDS),
    st.lists(st.tuples(texts, texts, st.integers(0, 1)), min_size=1, max_size=4),
    st.booleans(),
)
def test_any_conversation_as_upstream(
    old: OldStack,
    llama_tokenizer: Tokenizer,
    name: str,
    rounds: list[tuple[str, str, int]],
    has_images: bool,
) -> None:
    turns = []
    for question, answer, images in rounds:
        image = "<image>\n" if has_images and images else ""
        turns += [Turn("human", image + question), Turn("gpt", answer)]
    same_as_old(name, turns, has_images, old, llama_tokenizer)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(texts)
def test_any_caption_as_upstream(old: OldStack, llama_tokenizer: Tokenizer, caption: str) -> None:
    turns = [Turn("human", "<image>\nx"), Turn("gpt", caption)]
    encoded = encode_training(get_template("plain"), turns, llama_tokenizer)
    assert encoded.tokens.tolist() == old.with_images("<image>" + caption + "\n")
    assert encoded.loss_mask.tolist() == [False, False] + [True] * (len(encoded.tokens) - 2)


@pytest.mark.parametrize("name", ROUNDS)
def test_several_images_encode_as_their_text(name: str, old: OldStack, llama_tokenizer: Tokenizer) -> None:
    turns = place_images([Turn("human", "<image> a <image>"), CAT[1], Turn("human", "b <image>"), CAT[3]])
    encoded = encode_training(get_template(name), turns, llama_tokenizer)
    assert encoded.tokens.tolist() == old.with_images(render(get_template(name), turns))
    assert (encoded.tokens == IMAGE_TOKEN).sum() == 3
    assert not encoded.loss_mask[encoded.tokens == IMAGE_TOKEN].any()


# Part five: where this library is better than upstream on purpose.


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("control", CONTROLS)
def test_control_strings_are_text(name: str, control: str, old: OldStack, llama_tokenizer: Tokenizer) -> None:
    template = get_template(name)
    turns = [Turn("human", f"<image>\nq {control} q"), Turn("gpt", f"a {control} a."), *CAT[2:]]
    encoded = encode_training(template, turns, llama_tokenizer)
    kept = encoded.tokens[encoded.loss_mask]
    ends = np.flatnonzero(kept == llama_tokenizer.eos_id)
    assert len(ends) == 2
    tail = template.after_answer
    assert llama_tokenizer.decode(kept[: ends[0]]) == f"a {control} a.{tail}"
    assert llama_tokenizer.decode(kept[ends[0] :]) == f"Black.{tail}"
    bos = 2 if template.starts_with_bos else 1
    assert (encoded.tokens == llama_tokenizer.bos_id).sum() == bos
    assert (encoded.tokens == llama_tokenizer.unk_id).sum() == 0
    if control in ("</s>", separator(name)):
        assert old.rounds(render(template, turns), separator(name), True) is None


def test_image_text_without_images(llama_tokenizer: Tokenizer, old: OldStack) -> None:
    """A text-only record may talk about `<image>` tags; an answer may in any record."""
    turns = [Turn("human", "what does <image> do?"), Turn("gpt", "<image> is no HTML.")]
    encoded = encode_training(get_template("v1"), turns, llama_tokenizer, has_images=False)
    assert encoded.tokens.tolist() == old.tokenize(render(get_template("v1"), turns))
    prompt = encode_prompt(get_template("v1"), turns[:1], llama_tokenizer, has_images=False)
    assert IMAGE_TOKEN not in prompt
    turns = [CAT[0], turns[1]]
    encoded = encode_training(get_template("v1"), turns, llama_tokenizer)
    assert (encoded.tokens == IMAGE_TOKEN).sum() == 1
    assert llama_tokenizer.decode(encoded.tokens[encoded.loss_mask]) == "<image> is no HTML."


# Part six: any tokenizer.


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.sampled_from(sorted(TEMPLATES)), st.text(min_size=1), st.text(min_size=1))
def test_a_prompt_starts_its_training_sequence(
    small_tokenizer: Tokenizer, mistral_tokenizer: Tokenizer, name: str, question: str, answer: str
) -> None:
    template = get_template(name)
    turns = [Turn("human", f"<image>\n{question}"), Turn("gpt", answer)]
    if name not in ("plain", "v0_plain"):
        turns += turns
    for tokenizer in (small_tokenizer, mistral_tokenizer):
        encoded = encode_training(template, turns, tokenizer)
        prompt = encode_prompt(template, turns[:-1], tokenizer)
        assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
        assert encoded.loss_mask[len(prompt) :].all()
        end = [tokenizer.eos_id] if template.ends_with_eos else []
        text = tokenizer.encode(answer + template.after_answer)
        assert encoded.tokens[len(prompt) :].tolist() == text + end


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "at least one turn"),
        ([CAT[1]], "turn 0 is by 'gpt'"),
        ([CAT[0], CAT[2]], "turn 1 is by 'human'"),
        ([CAT[0], Turn("gpt", "")], r"turn 1 \(gpt\) is empty"),
    ],
)
def test_turns_that_are_no_conversation(small_tokenizer: Tokenizer, turns: list[Turn], message: str) -> None:
    template = get_template("v1")
    with pytest.raises(ValueError, match=message):
        render(template, turns)
    with pytest.raises(ValueError, match=message):
        encode_training(template, turns, small_tokenizer)
    with pytest.raises(ValueError, match=message):
        encode_prompt(template, turns, small_tokenizer)


def test_ends_on_the_wrong_side(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="ends with an answer; this one with a question"):
        encode_training(get_template("v1"), CAT[:3], small_tokenizer)
    with pytest.raises(ValueError, match="ends with a question"):
        encode_prompt(get_template("v1"), CAT, small_tokenizer)


def test_plain_wants_one_image_and_one_caption(small_tokenizer: Tokenizer) -> None:
    plain = get_template("plain")
    with pytest.raises(ValueError, match="one question and one caption"):
        encode_training(plain, CAT, small_tokenizer)
    with pytest.raises(ValueError, match="'plain' needs an image"):
        encode_prompt(plain, CAT[2:3], small_tokenizer)
    with pytest.raises(ValueError, match="'plain' needs an image"):
        encode_training(plain, CAT[:2], small_tokenizer, has_images=False)
