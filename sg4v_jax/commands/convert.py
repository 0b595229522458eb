"""`sg4v convert` and `sg4v info`."""

import argparse
import sys
import time
from typing import Any

from sg4v_jax.commands.common import add_command

_SOURCES = "training run, HF LLaVA, share4v, LLaVA-1.5, Vicuna or LoRA directory"


def add(commands: Any) -> None:
    """Adds `convert` and `info` to the commands."""
    parser = add_command(
        commands,
        "convert",
        run,
        "Converts a model: any known format to HF LLaVA, to the original share4v or to a run that "
        "training starts from. With --check, compares two models instead.",
        "  sg4v convert --model runs/sft --output llava-hf --to hf\n"
        "  sg4v convert --model vicuna --vision-tower clip --projector mm_projector.bin \\\n"
        "    --output start --to run\n"
        "  sg4v convert --check runs/sft llava-hf",
    )
    parser.add_argument("--model", help=_SOURCES)
    parser.add_argument("--output", help="new directory")
    parser.add_argument("--to", choices=("hf", "share4v", "run"), default="hf", help="layout to write")
    parser.add_argument("--vision-tower", help="take the vision tower from this directory, or `random`")
    parser.add_argument("--projector", help="take the projector from this file or directory, or `random`")
    parser.add_argument("--base", help="what a LoRA was trained on top of")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="what to write; without it every tensor keeps its own, and a run's float32 becomes bfloat16",
    )
    parser.add_argument("--max-shard-size", type=_size, default="5GB", help="largest safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace a directory that isn't empty")
    parser.add_argument("--allow-nan", action="store_true", help="convert NaN and infinite weights too")
    parser.add_argument("--check", nargs=2, metavar=("A", "B"), help="compare two models, weights and logits")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of --check: largest difference allowed")
    parser.add_argument("--weights-only", action="store_true", help="of --check: leave out the logits")
    info = add_command(
        commands,
        "info",
        run_info,
        "Says what a model directory holds, without reading the weights.",
        "  sg4v info runs/sft",
    )
    info.add_argument("model", metavar="DIR", help=f"{_SOURCES}, CLIP directory or projector file")
    info.add_argument("--base", help="what a LoRA was trained on top of")
    info.add_argument("--json", action="store_true", help="for programs to read")


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `convert`."""
    from sg4v_jax.convert.load import convert, open_checkpoint

    if arguments.check:
        _check(arguments)
        return
    if not (arguments.model and arguments.output):
        raise ValueError("give --model and --output, or --check A B")
    checkpoint = open_checkpoint(
        arguments.model,
        vision_tower=arguments.vision_tower,
        projector=arguments.projector,
        base=arguments.base,
    )
    start = time.monotonic()
    with _bytes_bar(checkpoint.nbytes) as bar:
        convert(
            checkpoint,
            arguments.output,
            layout=arguments.to,
            dtype=arguments.dtype or "",
            max_shard_bytes=arguments.max_shard_size,
            overwrite=arguments.overwrite,
            allow_nan=arguments.allow_nan,
            progress=bar.update,
        )
    seconds, size = time.monotonic() - start, checkpoint.nbytes
    print(
        f"wrote {arguments.output}: {size / 1e9:.2f} GB in {seconds:.0f} s, {size / seconds / 1e6:.0f} MB/s"
    )


def _check(arguments: argparse.Namespace) -> None:
    import numpy as np

    from sg4v_jax.convert.checkpoint import PARTS
    from sg4v_jax.convert.compare import compare, logits
    from sg4v_jax.convert.load import open_checkpoint

    a, b = (open_checkpoint(path, base=arguments.base) for path in arguments.check)
    with _bytes_bar(a.nbytes) as bar:
        found = compare(a, b, bar.update)
    for difference in found.differences:
        print(f"{difference.key}: {difference.what}, max abs difference {difference.max_abs:.3g}")
    for of_a, of_b in sorted(found.dtypes):
        print(f"stored as {of_a} in A, as {of_b} in B")
    print(f"{found.compared} tensors compared, {len(found.differences)} differ, at most {found.max_abs:.3g}")
    worst = found.max_abs
    whole = set(a.parts) == set(b.parts) == set(PARTS)
    if whole and a.config == b.config and not arguments.weights_only:
        apart = float(np.abs(logits(a) - logits(b)).max())
        print(f"logits of a fixed prompt about a fixed image differ by at most {apart:.3g}")
        worst = max(worst, apart)
    if not worst <= arguments.tolerance:
        raise SystemExit(1)


def run_info(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `info`."""
    import json

    from sg4v_jax.convert.describe import as_text, describe
    from sg4v_jax.convert.load import open_checkpoint

    facts = describe(open_checkpoint(arguments.model, base=arguments.base))
    print(json.dumps(facts, indent=2) if arguments.json else as_text(facts))


def _bytes_bar(total: int) -> Any:
    import tqdm

    return tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())


def _size(text: str) -> int:
    """`5GB`, `500MB` or a number of bytes."""
    for suffix, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if text.upper().endswith(suffix):
            return int(float(text[: -len(suffix)]) * factor)
    return int(text)
