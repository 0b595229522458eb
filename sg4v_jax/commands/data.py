"""`sg4v data`: datasets, tokenizers, the embedded world."""

import argparse
from typing import Any

from sg4v_jax.commands import data_show
from sg4v_jax.commands.common import HelpFormatter, add_command, progress_bar


def add(commands: Any) -> None:
    """Adds `data` and its actions to the commands."""
    data = commands.add_parser("data", help="Build datasets and tokenizers.", formatter_class=HelpFormatter)
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    data_show.add(actions)
    build = add_command(
        actions,
        "build",
        _data_build,
        "LLaVA-format JSON (or JSONL) and its images to a TFDS dataset of array_record shards.",
        "  sg4v data build --name sft --json mix.json --images data --output datasets",
    )
    build.add_argument("--name", required=True, help="name of the dataset")
    build.add_argument("--json", required=True, help="JSON array or JSONL of records")
    build.add_argument("--images", required=True, help="folder that `image` paths are relative to")
    build.add_argument("--output", required=True, help="folder for datasets")
    build.add_argument("--bad-records", choices=("fail", "drop"), default="fail", help="drop counts them")
    tokenizer = add_command(
        actions,
        "tokenizer",
        _data_tokenizer,
        "Trains a SentencePiece tokenizer with LLaMA's settings on the texts of LLaVA-format files.",
        "  sg4v data tokenizer --json a.json b.json --vocab-size 640 --output tokenizer.model",
    )
    tokenizer.add_argument("--json", required=True, nargs="+", help="JSON arrays or JSONL of records")
    tokenizer.add_argument("--vocab-size", type=int, required=True)
    tokenizer.add_argument("--output", required=True)
    world = add_command(
        actions,
        "world",
        _data_world,
        "Draws the embedded world: images, captions and questions in the released JSON formats.",
        "  sg4v data world --output world --train 1000 --heldout 100",
    )
    world.add_argument("--output", required=True)
    world.add_argument("--train", type=int, default=1000, help="training scenes")
    world.add_argument("--heldout", type=int, default=100, help="held-out scenes")
    world.add_argument("--seed", type=int, default=0)


def _data_build(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.data.build import build

    directory, report = build(
        arguments.name,
        arguments.json,
        arguments.images,
        arguments.output,
        bad_records=arguments.bad_records,
        progress=progress_bar("records"),
    )
    print(f"{directory}: {report.written} records written, dropped: {report.dropped or 'none'}")
    for kind, example in report.examples.items():
        print(f"  first {kind}: {example}")


def _data_tokenizer(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.data.conversation import training_texts
    from sg4v_jax.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(training_texts(arguments.json), arguments.output, arguments.vocab_size)
    print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces")


def _data_world(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.world import write_world

    files = write_world(
        arguments.output,
        train_scenes=arguments.train,
        heldout_scenes=arguments.heldout,
        seed=arguments.seed,
        progress=progress_bar("images"),
    )
    print(f"wrote {files.cap_dense.parent}")
