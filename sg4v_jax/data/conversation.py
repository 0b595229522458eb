"""Prompt templates, and conversations as token ids with a loss mask.

Every template is data: the text around a question and around an answer. One function walks the
turns and encodes them; the mask follows from which side of a turn a token came from. Nothing is
tokenised twice to find out how long it is, as ShareGPT4V's `preprocess_v1` does, so a text that
holds "</s>" or " ASSISTANT: " is trained on like any other (there it masks the whole sample).
"""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sg4v_jax.data.records import IMAGE_PLACEHOLDER, Turn, parse_record, read_records
from sg4v_jax.data.tokenizer import Tokenizer

IMAGE_TOKEN = -200
"""The id that stands for one image until its features take its place (LLaVA's constant)."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around the turns of a conversation.

    Attributes:
        name: the template's main name.
        opening: what comes before the first question, system text included.
        reopening: what comes before every later question.
        closing: what comes after every question; a prompt ends here.
        before_answer: a space, or nothing where the answer follows an image directly. Either way
            it is the word start that encoding the answer adds.
        after_answer: what comes after every answer; the loss covers it.
        ends_with_eos: whether an answer ends with `</s>`; the loss covers it.
        starts_with_bos: whether every later round starts with `<s>`, as the first one does.
        images_only: whether a question is reduced to its images (pre-training).
        stop: the text at which generation stops.
    """

    name: str
    opening: str = ""
    reopening: str = ""
    closing: str = ""
    before_answer: str = ""
    after_answer: str = ""
    ends_with_eos: bool = True
    starts_with_bos: bool = False
    images_only: bool = False
    stop: str = "</s>"


def _vicuna(name: str, person: str) -> Template:
    return Template(
        name,
        opening=f"A chat between a curious {person} and an artificial intelligence assistant. The "
        f"assistant gives helpful, detailed, and polite answers to the {person}'s questions. "
        "USER: ",
        reopening="USER: ",
        closing=" ASSISTANT:",
        before_answer=" ",
    )


def _llama_2(name: str, system: str) -> Template:
    return Template(
        name,
        opening=f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        reopening="[INST] ",
        closing=" [/INST]",
        before_answer=" ",
        after_answer=" ",
        starts_with_bos=True,
    )


_V1 = _vicuna("v1", "user")
_PLAIN = Template("plain", after_answer="\n", ends_with_eos=False, images_only=True, stop="\n")

TEMPLATES: dict[str, Template] = {
    "v1": _V1,  # fine-tuning and evaluation
    "vicuna_v1": _V1,
    "plain": _PLAIN,  # pre-training
    "v0_plain": _PLAIN,
    "share4v_v1": _vicuna("share4v_v1", "human"),  # the evaluation scripts' default; Q-Bench
    "llama_2": _llama_2(
        "llama_2",
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as "
        "possible, while being safe.  Your answers should not include any harmful, unethical, "
        "racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses "
        "are socially unbiased and positive in nature.\n\nIf a question does not make any sense, "
        "or is not factually coherent, explain why instead of answering something not correct. If "
        "you don't know the answer to a question, please don't share false information.",
    ),
    "share4v_llama_2": _llama_2(
        "share4v_llama_2",
        "You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using "
        "natural language.",
    ),
}
"""Every template by name (ShareGPT4V conversation.py). Released weights were tuned with `v1`."""


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """A conversation as ids.

    Attributes:
        tokens: int32[n]; `IMAGE_TOKEN` where an image goes.
        loss_mask: bool[n]; True where predicting *this* token (from those before it) is trained.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


def get_template(name: str) -> Template:
    """Looks up a template.

    Raises:
        ValueError: no template has this name; the message gives the nearest one and the list.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    near = difflib.get_close_matches(name, TEMPLATES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown template {name!r}.{hint} Known: {', '.join(sorted(TEMPLATES))}")


def stop_string(template: Template) -> str:
    """Returns the text at which generation stops.

    For `llama_2` it is the end of an answer, "</s>"; ShareGPT4V's scripts take "<s>" there.
    """
    return template.stop


def place_images(turns: Sequence[Turn], *, as_asked: bool = False) -> tuple[Turn, ...]:
    """Moves the images of every question to its front (ShareGPT4V train.py preprocess_multimodal).

    A question with n `<image>` placeholders becomes n lines `<image>` and then its text, stripped.
    ShareGPT4V keeps one of them; for n = 1 the result is the same. Answers are left alone: an
    `<image>` there is text. For conversations with images only; a text-only one stays as it is.

    Args:
        turns: the conversation.
        as_asked: leave a question alone that starts with its images, white space at the ends of its
            text included. Training strips it; the evaluation scripts don't, and the line break that
            ends a question of Q-Bench is a token (model_vqa_qbench.py).
    """
    return tuple(
        dataclasses.replace(turn, text=_images_first(turn.text, as_asked)) if turn.role == "human" else turn
        for turn in turns
    )


def render(template: Template, turns: Sequence[Turn]) -> str:
    """Renders a conversation as text (ShareGPT4V conversation.py get_prompt, and for `plain` the
    text of train.py preprocess_plain).

    A conversation that ends with a question is left open for the answer: it ends with
    `ASSISTANT:`, without a space.

    Raises:
        ValueError: the turns don't alternate, start with an answer or hold an empty text.
    """
    _check(template, turns)
    parts = []
    for index, turn in enumerate(turns):
        if turn.role == "human":
            parts.append("<s>" if index and template.starts_with_bos else "")
            parts.append(_question(template, turns, index))
        else:
            parts += [template.before_answer, turn.text, template.after_answer]
            parts.append("</s>" if template.ends_with_eos else "")
    return "".join(parts)


def encode_training(
    template: Template,
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    has_images: bool = True,
) -> EncodedConversation:
    """Encodes a whole conversation with its loss mask.

    The ids are those of ShareGPT4V's `preprocess_v1`, `preprocess_llama_2` and `preprocess_plain`
    under the tokenizer the released weights saw, but text never becomes a control token. The loss
    is on the answers and the `</s>` after each (`plain`: on the caption and its newline).

    Args:
        template: how to write the turns.
        turns: questions and answers in turn, ending with an answer; with images, run them through
            `place_images` first.
        tokenizer: the model's tokenizer.
        has_images: whether an `<image>` in a question is an image; False takes it as text, as
            ShareGPT4V does for records without images.

    Raises:
        ValueError: the turns don't alternate, don't end with an answer or hold an empty text; or
            the template is `plain` and they are not one question with images and one caption.
    """
    _check(template, turns, has_images=has_images)
    if turns[-1].role != "gpt":
        raise ValueError("a training conversation ends with an answer; this one with a question")
    tokens: list[int] = []
    supervised: list[bool] = []
    for ids, loss in _segments(template, turns, tokenizer, has_images):
        tokens += ids
        supervised += [loss] * len(ids)
    return EncodedConversation(np.array(tokens, np.int32), np.array(supervised, np.bool_))


def encode_prompt(
    template: Template,
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    has_images: bool = True,
) -> np.ndarray:
    """Encodes a conversation that waits for an answer; for `plain`, `<s>` and the images.

    Arguments are those of `encode_training`, but the turns end with a question. The result is
    exactly how `encode_training` starts for the same turns with the answer added.

    Returns:
        int32[n], with `IMAGE_TOKEN` where an image goes.

    Raises:
        ValueError: the turns don't alternate, don't end with a question or hold an empty text; or
            the template is `plain` and they are not one question with images.
    """
    _check(template, turns, has_images=has_images)
    if turns[-1].role != "human":
        raise ValueError("a prompt ends with a question; this conversation ends with an answer")
    segments = _segments(template, turns, tokenizer, has_images)
    return np.array([i for ids, _ in segments for i in ids], np.int32)


def training_texts(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Yields the texts of LLaVA-format files, and of the templates, for training a tokenizer."""
    for template in TEMPLATES.values():
        yield template.opening + template.closing
    for path in paths:
        for index, obj in enumerate(read_records(path)):
            record = parse_record(obj, source=os.fspath(path), index=index)
            for turn in record.turns:
                yield turn.text.replace(IMAGE_PLACEHOLDER, " ")


def _segments(
    template: Template, turns: Sequence[Turn], tokenizer: Tokenizer, has_images: bool
) -> Iterator[tuple[list[int], bool]]:
    """Yields (ids, whether the loss covers them), in order.

    Cutting between "ASSISTANT:" and " answer" gives the ids of the uncut text, because no piece of
    the vocabulary reaches across a word start, and because the word start that SentencePiece adds
    to the answer is just the space between them.
    """
    yield [tokenizer.bos_id], False
    for index, turn in enumerate(turns):
        if turn.role == "human":
            if index and template.starts_with_bos:
                yield [tokenizer.bos_id], False
            text = _question(template, turns, index)
            chunks = text.split(IMAGE_PLACEHOLDER) if has_images else [text]
            # A chunk after an image gets a word start; one after a control token in the middle of
            # the sequence does not.
            yield tokenizer.encode(chunks[0], after_control=index > 0), False
            for chunk in chunks[1:]:
                yield [IMAGE_TOKEN, *tokenizer.encode(chunk)], False
        else:
            yield tokenizer.encode(turn.text + template.after_answer), True
            if template.ends_with_eos:
                yield [tokenizer.eos_id], True


def _question(template: Template, turns: Sequence[Turn], index: int) -> str:
    """Returns the question at `index` with all of the template's text before and after it."""
    text = turns[index].text
    if template.images_only:
        text = IMAGE_PLACEHOLDER * text.count(IMAGE_PLACEHOLDER)
    before = template.reopening if index else template.opening
    return before + text + template.closing


def _images_first(text: str, as_asked: bool) -> str:
    count = text.count(IMAGE_PLACEHOLDER)
    images = f"{IMAGE_PLACEHOLDER}\n" * count
    if not count or (as_asked and text.startswith(images)):
        return text
    return (images + text.replace(IMAGE_PLACEHOLDER, "").strip()).strip()


def _check(template: Template, turns: Sequence[Turn], *, has_images: bool = True) -> None:
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    for index, turn in enumerate(turns):
        expected = ("human", "gpt")[index % 2]
        if turn.role != expected:
            raise ValueError(f"turn {index} is by {turn.role!r}; turns alternate from 'human' on")
        if not turn.text:
            raise ValueError(f"turn {index} ({turn.role}) is empty")
    if template.images_only:
        if len(turns) > 2:
            raise ValueError(f"{template.name!r} takes one question and one caption")
        if not has_images or IMAGE_PLACEHOLDER not in turns[0].text:
            raise ValueError(f"{template.name!r} needs an image: no {IMAGE_PLACEHOLDER} to caption")
