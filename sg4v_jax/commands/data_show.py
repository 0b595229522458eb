"""`sg4v data show`."""

import argparse
import os
import sys
from typing import Any

from sg4v_jax.commands.common import add_command


def add(actions: Any) -> None:
    """Adds `show` to the actions of `data`."""
    parser = add_command(
        actions,
        "show",
        run,
        "A batch as training sees it: images in their slots, text with what is supervised, boundaries.",
        "  sg4v data show --config=configs/finetune.py:7b --html=batch.html \\\n"
        "    --config.data.tokenizer=vicuna/tokenizer.model \\\n"
        "    --config.data.sources.sft_mix.directory=datasets/llava/sft/1.0.0",
        takes_config=True,
    )
    parser.add_argument("--batch", type=int, default=0, help="which batch of the run, from 0")
    parser.add_argument("--rows", type=int, default=2, help="rows to print")
    parser.add_argument("--html", help="write all rows as a page to this file instead")


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `data show`."""
    from sg4v_jax import atomic, config
    from sg4v_jax.data import show
    from sg4v_jax.data.loader import Loader
    from sg4v_jax.data.tokenizer import Tokenizer
    from sg4v_jax.train.setup import loader_config, model_config, required

    if arguments.batch < 0 or arguments.rows < 1:
        raise ValueError("--batch counts from 0 and --rows from 1")
    run_config = config.parse(config_argv)
    tokenizer = Tokenizer(required(run_config.data.tokenizer, "config.data.tokenizer"))
    model = model_config(run_config, tokenizer)
    image_tokens = model.vision.num_image_tokens
    batches = iter(Loader(loader_config(run_config, model), tokenizer))
    for _ in range(arguments.batch):
        next(batches)
    batch = next(batches)
    batches.close()
    if not arguments.html:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(show.to_text(batch, tokenizer, image_tokens, rows=arguments.rows, colour=colour), end="")
        return
    title = f"{run_config.stage}, batch {arguments.batch}"
    atomic.write(arguments.html, show.to_html(batch, tokenizer, image_tokens, title))
    print(f"wrote {arguments.html}")
