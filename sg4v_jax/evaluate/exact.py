"""Exact-match scoring of short answers.

The official benchmark scorers have rules of their own; this one is for questions whose only right
answer is known, like the embedded world's.
"""

import os

from sg4v_jax.evaluate.answers import read_jsonl
from sg4v_jax.world.score import AccuracyReport, answer_accuracy


def score_file(answers: str | os.PathLike[str], truth: str | os.PathLike[str]) -> AccuracyReport:
    """Scores a file of answers.

    Args:
      answers: JSONL with `question_id` and `text`.
      truth: JSONL with `question_id`, `answer` and optionally `category`. A question without an
        answer counts as wrong.

    Raises:
      ValueError: if a line lacks a key, or an answer has no question.
    """
    given = {line["question_id"]: line["text"] for line in read_jsonl(answers, ("question_id", "text"))}
    lines = read_jsonl(truth, ("question_id", "answer"))
    unknown = given.keys() - {line["question_id"] for line in lines}
    if unknown:
        raise ValueError(f"{answers}: {len(unknown)} answers without a question in {truth}")
    return answer_accuracy(
        [given.get(line["question_id"], "") for line in lines],
        [line["answer"] for line in lines],
        [line.get("category", "all") for line in lines],
    )
