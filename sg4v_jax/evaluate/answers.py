"""Answers a file of questions in LLaVA's format, for any benchmark's scorer."""

import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from sg4v_jax.data.records import IMAGE_PLACEHOLDER, Turn, resolve_image
from sg4v_jax.evaluate.answering import Counted
from sg4v_jax.evaluate.files import write_lines
from sg4v_jax.infer.engine import Engine
from sg4v_jax.infer.request import Prompt, Request
from sg4v_jax.infer.sampling import SamplingOptions
from sg4v_jax.parallel import shares


def read_jsonl(path: str | os.PathLike[str], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Lines of a JSONL file.

    Raises:
      ValueError: naming the line that isn't JSON or lacks one of `keys`.
    """
    lines = []
    # Not `str.splitlines`: questions may hold what Unicode calls a line break.
    for number, text in enumerate(pathlib.Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        missing = [key for key in keys if key not in line]
        if missing:
            raise ValueError(f"{path}:{number}: missing {', '.join(missing)}; found {', '.join(line)}")
        lines.append(line)
    return lines


def answer_questions(
    engine: Engine,
    questions: list[dict[str, Any]],
    image_root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: SamplingOptions,
    model_id: str,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[str]:
    """Answers every question and writes the lines that the official scorers read (spec 7).

    Of several processes, each answers its share, and the first writes the file.

    Args:
      engine: the model.
      questions: lines with `question_id`, `text` and, unless text-only, `image`.
      image_root: what `image` is relative to.
      output: JSONL file of answers, replaced at the end.
      options: how to generate; the paper's scores are greedy.
      model_id: name of the model in the answers.
      progress: wraps the iteration over answers.

    Returns:
      The answers, in the order of the questions.
    """
    index, count = shares.mine()
    own = questions[index::count]
    texts = [""] * len(own)
    requests = (Request(i, _prompt(question, image_root), options) for i, question in enumerate(own))
    for result in progress(Counted(engine.complete(requests), len(own))):
        if result.completion is None:
            raise ValueError(f"question {own[result.key]['question_id']}: {result.error}")
        texts[result.key] = result.completion.text
    answers = shares.interleave(shares.gather("answers", texts)) if count > 1 else texts
    if index > 0:
        return answers
    lines: list[dict[str, Any]] = [
        {
            "question_id": question["question_id"],
            "prompt": question["text"],
            "text": answer,
            "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{model_id}/{question['question_id']}").hex,
            "model_id": model_id,
            "metadata": {},
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    write_lines(pathlib.Path(output), lines)
    return answers


def _prompt(question: dict[str, Any], image_root: str | os.PathLike[str]) -> Prompt:
    if not question.get("image"):
        return Prompt((Turn("human", question["text"]),))
    data = resolve_image(image_root, question["image"]).read_bytes()
    return Prompt((Turn("human", f"{IMAGE_PLACEHOLDER}\n{question['text']}"),), (data,))
