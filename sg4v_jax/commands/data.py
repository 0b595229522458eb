"""`sg4v data`: datasets, tokenizers, the embedded world."""

import argparse
import os
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
        "LLaVA-format JSON (or JSONL) and its images to a TFDS dataset of array_record shards. "
        "Goes on where it was interrupted.",
        "  sg4v data build --name sft --json mix.json --images data --output datasets",
    )
    build.add_argument("--name", required=True, help="name of the dataset")
    build.add_argument("--json", help="JSON array or JSONL of records; without it, every image, to caption")
    build.add_argument("--images", required=True, help="folder that `image` paths are relative to")
    build.add_argument("--output", required=True, help="folder for datasets; all may be gs:// and the like")
    build.add_argument("--bad-records", choices=("fail", "drop"), default="fail", help="drop counts them")
    build.add_argument("--max-bad", default="100%", help="with drop: fail above this number or percentage")
    build.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    build.add_argument("--records-per-shard", type=int, default=1024)
    build.add_argument("--beam-options", help="write the shards on Apache Beam, with these flags of it")
    _add_check(actions)
    unpack = add_command(
        actions,
        "unpack",
        _data_unpack,
        "Images of tars, Parquet files or a dataset to files, under the names that `sg4v caption` gives. "
        "Goes on where it was interrupted.",
        "  sg4v data unpack --images shards --output photos",
    )
    unpack.add_argument("--images", required=True, help="as for `sg4v caption`")
    unpack.add_argument("--input-format", default="auto", help="folder, list, dataset, tar or parquet")
    unpack.add_argument("--output", required=True, help="folder for the images")
    unpack.add_argument("--max-failed", default="5%", help="bad images allowed: a number or a percentage")
    unpack.add_argument("--max-image-bytes", type=int, default=50_000_000, help="larger images are bad")
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


def _add_check(actions: Any) -> None:
    check = add_command(
        actions,
        "check",
        _data_check,
        "Looks for everything that is wrong with data files and their images, before anything is built. "
        "Exits with 1 if more records are bad than allowed.",
        "  sg4v data check --json mix.json --images data --output report.html",
    )
    check.add_argument(
        "--json", required=True, nargs="+", action="extend", help="JSON arrays or JSONL of records"
    )
    check.add_argument("--images", required=True, help="folder that `image` paths are relative to")
    check.add_argument("--output", help="page to write, with a .json of the same beside it")
    check.add_argument("--max-bad", default="0", help="bad records allowed: a number or a percentage")
    check.add_argument("--tokenizer", default="", help="tokenizer.model for lengths; words without it")
    check.add_argument("--template", default="v1", help="how training will write the records")
    check.add_argument("--max-length", type=int, default=2048, help="count longer records (data.seq_len)")
    check.add_argument("--image-tokens", type=int, default=576, help="features per image")
    check.add_argument("--headers-only", action="store_true", help="fast; damaged images are not found")
    check.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")


def _data_check(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.data.check import CheckOptions, check
    from sg4v_jax.data.check_report import summary, write_report

    options = CheckOptions(
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        image_tokens=arguments.image_tokens,
        max_length=arguments.max_length,
        decode=not arguments.headers_only,
    )
    report = check(
        arguments.json,
        arguments.images,
        options,
        max_bad=arguments.max_bad,
        workers=arguments.workers,
        progress=progress_bar("records"),
    )
    if arguments.output:
        page, numbers = write_report(report, arguments.output)
        print(f"wrote {page} and {numbers}\n")
    print(summary(report))
    if not report.passed:
        raise SystemExit(1)


def _data_build(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.data.build import build

    executor = None
    if arguments.beam_options is not None:
        from sg4v_jax.data.beam import on_beam

        try:
            executor = on_beam(arguments.beam_options.split())
        except ImportError as error:
            raise ValueError(str(error)) from error
    directory, report = build(
        arguments.name,
        arguments.json,
        arguments.images,
        arguments.output,
        bad_records=arguments.bad_records,
        max_bad=arguments.max_bad,
        workers=arguments.workers,
        records_per_shard=arguments.records_per_shard,
        executor=executor,
        progress=progress_bar("records"),
    )
    print(f"{directory}: {report.written} records written, dropped: {report.dropped or 'none'}")
    for kind, example in report.examples.items():
        print(f"  first {kind}: {example}")


def _data_unpack(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.caption.corpus.inputs import open_corpus
    from sg4v_jax.caption.corpus.unpack import unpack

    counts = unpack(
        open_corpus(arguments.images, form=arguments.input_format),
        arguments.output,
        max_failed=arguments.max_failed,
        max_image_bytes=arguments.max_image_bytes,
        progress=progress_bar("images"),
    )
    print(f"{arguments.output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


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
