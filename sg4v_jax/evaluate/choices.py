"""Which option a free answer to a multiple-choice question names."""

import re
from collections.abc import Mapping, Sequence

from sg4v_jax.evaluate.benchmark import LETTERS

NONE_OF_THEM = "Z"
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# The letter has to come among the last words: before, it may be an article.
_LAST_WORDS = 5
_VERBOSE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# What VLMEvalKit asks a judge (multiple_choice.py, Apache-2.0): with other words it wouldn't be its score.
_MATCHING = (
    "You are an AI assistant who will help me to match an answer with several options of a single-choice "
    "question. You are provided with a question, several options, and an answer, and you need to find which "
    "option is most similar to the answer. If the meaning of all options are significantly different from "
    "the answer, output Z. Your should output a single uppercase character in A, B, C, D (if they are valid "
    "options), and Z. \n"
    "Example 1: \nQuestion: What is the main object in image?\n"
    "Options: A. teddy bear B. rabbit C. cat D. dog\nAnswer: a cute teddy bear\nYour output: A\n"
    "Example 2: \nQuestion: What is the main object in image?\n"
    "Options: A. teddy bear B. rabbit C. cat D. dog\nAnswer: Spider\nYour output: Z\n"
    "Example 3: \nQuestion: {}?\nOptions: {}\nAnswer: {}\nYour output: "
)
_MATCHING_CHINESE = (
    "你是一个帮助我匹配答案与单选题中多个选项的 AI 助手。你会被提供：一个问题，多个选项，一个答案。"
    "你的任务是找到与答案意义最相近的选项。如果所有选项的意义都与答案显著不同，则输出 Z。"
    "你应该输出一个单个的大写字母，例如 A, B, C, D（如果它们是有效选项），或 Z。"
    "例 1:问题: 图中最主要的物体是什么?\n"
    "选项: A. 泰迪熊 B. 兔子 C. 猫 D. 狗\n答案: 一只可爱的泰迪熊\n输出: A\n"
    "例 2: \n问题: 图中最主要的物体是什么?\n"
    "选项: A. 泰迪熊 B. 兔子 C. 猫 D. 狗\n答案: 蜘蛛\n输出: Z\n"
    "例 3: \n问题: {}?\n选项: {}\n答案: {}\n输出: "
)
_CHINESE = re.compile("[\u4e00-\u9fff]")


def matching_prompt(question: str, options: Sequence[str], answer: str) -> str:
    """What MMBench's tool asks a judge about an answer that `infer_option` can't read."""
    template = _MATCHING_CHINESE if _CHINESE.search(question) else _MATCHING
    return template.format(question, f"There are several options: {lettered(options)}\n", answer)


def lettered(options: Sequence[str]) -> str:
    """The options as lines `A. ...`, each after a line break."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def infer_option(answer: str, options: Mapping[str, str]) -> str:
    """The option that an answer names, by the rules of MMBench's tool; "" if they can't tell.

    First a single option letter among the words, then "the answer is X", then the text of exactly one
    option (VLMEvalKit's `can_infer`). Where the rules can't tell, the official tool asks a language model.

    Args:
      answer: what the model said.
      options: text by letter.

    Returns:
      A letter, `NONE_OF_THEM` for a refusal, or "".
    """
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str]) -> str:
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE_OF_THEM
    words = answer.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _LAST_WORDS:
        return named[0]
    if not named and NONE_OF_THEM in words:
        return NONE_OF_THEM
    match = _VERBOSE.search(answer)
    return match[1].upper() if match and match[1].upper() in options else ""


def _by_text(answer: str, options: Mapping[str, str]) -> str:
    # An answer much longer than all options names them all, or talks about something else.
    if len(answer) > 2 * sum(map(len, options.values())):
        return ""
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else ""
