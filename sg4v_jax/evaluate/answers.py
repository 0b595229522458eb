"""Answers a file of questions in LLaVA's format, for any benchmark's scorer."""

import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from sg4v_jax.data.records import IMAGE_PLACEHOLDER, Turn, resolve_image
from sg4v_jax.infer.generate import Generator, Prompt
from sg4v_jax.infer.sampling import SamplingOptions


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
    generator: Generator,
    questions: list[dict[str, Any]],
    image_root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: SamplingOptions,
    batch_size: int,
    model_id: str,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[str]:
    """Answers every question and writes the lines that the official scorers read (spec 7).

    Args:
      generator: the model.
      questions: lines with `question_id`, `text` and, unless text-only, `image`.
      image_root: what `image` is relative to.
      output: JSONL file of answers, replaced at the end.
      options: how to generate; the paper's scores are greedy.
      batch_size: questions at a time.
      model_id: name of the model in the answers.
      progress: wraps the iteration over batches.

    Returns:
      The answers, in the order of the questions.
    """
    # Questions of similar length share a batch; the answers come back in order.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]["text"]))
    answers = [""] * len(questions)
    for start in progress(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        filled = (rows * batch_size)[:batch_size]
        prompts = [_prompt(questions[i], image_root) for i in filled]
        for i, completion in zip(rows, generator.generate(prompts, options), strict=False):
            answers[i] = completion.text
    lines = [
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
    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    os.replace(temporary, output)
    return answers


def _prompt(question: dict[str, Any], image_root: str | os.PathLike[str]) -> Prompt:
    if not question.get("image"):
        return Prompt((Turn("human", question["text"]),))
    data = resolve_image(image_root, question["image"]).read_bytes()
    return Prompt((Turn("human", f"{IMAGE_PLACEHOLDER}\n{question['text']}"),), (data,))
