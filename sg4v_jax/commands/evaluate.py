"""`sg4v eval`."""

import argparse
import os
from typing import Any

from sg4v_jax.commands.common import add_command, add_sampling, load_engine, progress_bar


def add(commands: Any) -> None:
    """Adds `eval` to the commands."""
    parser = add_command(
        commands,
        "eval",
        run,
        "Answers a file of questions (LLaVA's JSONL format) and, given the truth, scores the answers.",
        "  sg4v eval --model runs/sft --questions q.jsonl --images images --output answers.jsonl \\\n"
        "    --truth truth.jsonl",
    )
    add_sampling(parser, 128)
    parser.add_argument("--questions", required=True, help="JSONL with question_id, image, text")
    parser.add_argument("--images", required=True, help="folder that `image` is relative to")
    parser.add_argument("--output", required=True, help="JSONL of answers")
    parser.add_argument("--truth", help="JSONL with question_id, answer and optionally category")


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `eval`."""
    from sg4v_jax.evaluate.answers import answer_questions, read_jsonl
    from sg4v_jax.evaluate.exact import score_file

    questions = read_jsonl(arguments.questions, ("question_id", "text"))
    engine, options = load_engine(arguments)
    answer_questions(
        engine,
        questions,
        arguments.images,
        arguments.output,
        options=options,
        model_id=os.path.basename(os.path.normpath(arguments.model)),
        progress=progress_bar("answers"),
    )
    print(f"{arguments.output}: {len(questions)} answers")
    if arguments.truth:
        print(score_file(arguments.output, arguments.truth).table())
