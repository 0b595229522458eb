"""`sg4v caption`."""

import argparse
import os
from typing import Any

from sg4v_jax.commands.common import add_command, add_sampling, load_engine, progress_bar


def add(commands: Any) -> None:
    """Adds `caption` to the commands."""
    parser = add_command(
        commands,
        "caption",
        run,
        "Captions a corpus of images. Goes on where it was cut off; a bad image costs one image.",
        "  sg4v caption --model runs/captioner --images photos --output captions",
    )
    add_sampling(parser, 300)
    parser.add_argument("--images", required=True, help="a folder, or a JSON list of paths")
    parser.add_argument("--image-root", help="what the paths of a JSON list are relative to")
    parser.add_argument("--output", required=True, help="folder for captions.jsonl and captions.json")
    parser.add_argument("--prompt", default="", help="default: the one the captioner was trained with")
    parser.add_argument("--batch-size", type=int, default=16)


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `caption`."""
    from sg4v_jax.caption.corpus import caption_corpus, list_images

    images = list_images(arguments.images, arguments.image_root)
    folder = arguments.images if os.path.isdir(arguments.images) else os.path.dirname(arguments.images)
    engine, options = load_engine(arguments)
    report = caption_corpus(
        engine,
        images,
        arguments.image_root or folder or ".",
        arguments.output,
        options=options,
        batch_size=arguments.batch_size,
        prompt=arguments.prompt,
        progress=progress_bar("batches"),
    )
    print(
        f"{report.records}: {report.captioned} captioned, {report.failed} unreadable, "
        f"{report.cut_off} cut off at {arguments.max_new_tokens} tokens"
    )
