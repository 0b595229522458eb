"""`sg4v caption`."""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from sg4v_jax.commands.common import add_command, add_sampling, load_engine
from sg4v_jax.commands.processes import add_processes, join


def add(commands: Any) -> None:
    """Adds `caption` to the commands."""
    parser = add_command(
        commands,
        "caption",
        run,
        "Captions a corpus of images. Goes on where it was cut off; started several times, on one machine or "
        "many that share the output directory, the processes share the work. A bad image costs one image.",
        "  sg4v caption --model runs/captioner --images photos --output captions",
    )
    add_sampling(parser, 300)
    parser.add_argument(
        "--images",
        required=True,
        help="a folder of images, of tars or of Parquet files, a .tar, a .parquet, a dataset of "
        "`sg4v data build`, or a JSON list of paths or of LLaVA-format records",
    )
    parser.add_argument("--image-root", help="what the paths of a list are relative to")
    parser.add_argument("--input-format", default="auto", help="folder, list, dataset, tar or parquet")
    parser.add_argument("--output", required=True, help="folder for shards, captions.json and errors.jsonl")
    parser.add_argument("--prompt", default="", help="default: the one the captioner was trained with")
    parser.add_argument("--shard-size", type=int, default=512, help="images in a file, and in a claim")
    _add_guards(parser.add_argument_group("captions that loop, end in mid-sentence or are empty"))
    _add_failures(parser.add_argument_group("images that can't be used"))
    parser.add_argument("--parquet", action="store_true", help="also write captions.parquet")
    parser.add_argument(
        "--lease-seconds",
        type=float,
        default=120.0,
        help="silence after which other machines take over what a process was at",
    )
    add_processes(parser)


def _add_guards(group: Any) -> None:
    group.add_argument("--retry", type=int, default=0, help="further attempts, with the settings below")
    group.add_argument("--retry-temperature", type=float, default=0.5)
    group.add_argument("--retry-repetition-penalty", type=float, default=1.2, help="after a loop")
    group.add_argument(
        "--retry-max-new-tokens", type=int, default=0, help="after a cut; 0: no more than before"
    )
    group.add_argument("--drop-flagged", action="store_true", help="leave them out of captions.json")


def _add_failures(group: Any) -> None:
    group.add_argument("--max-failed", default="5%", help="a number or a part; more of them stop the run")
    group.add_argument("--retry-failed", action="store_true", help="try those of earlier runs again")
    group.add_argument(
        "--retry-changed", action="store_true", help="read all images again, and caption those that changed"
    )
    group.add_argument("--max-image-bytes", type=int, default=50_000_000)


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `caption`."""
    import signal

    from sg4v_jax.caption.corpus.inputs import open_corpus
    from sg4v_jax.caption.corpus.job import describe_model, prompt_for
    from sg4v_jax.caption.corpus.run import caption_corpus
    from sg4v_jax.parallel import shares

    corpus = open_corpus(arguments.images, arguments.image_root, arguments.input_format)
    settings_with = _settings(arguments)
    is_main = join(arguments)
    engine, options = load_engine(arguments)
    settings = settings_with(options)
    prompt, origin = prompt_for(settings, engine.bundle.prompt)
    if is_main:
        print(f"{len(corpus):,} images of {corpus.source}\nprompt: {prompt!r} ({origin})", file=sys.stderr)
    # Ends in order, so that other machines need not wait until the leases run out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # How the engine computes, as far as captions may depend on it.
    computed = {name: value for name, value in vars(arguments).items() if name in ("dtype", "weights", "kv")}
    summary = caption_corpus(
        engine,
        corpus,
        arguments.output,
        settings,
        prompt=prompt,
        model=describe_model(engine.bundle, **computed),
        show=_shown(60.0) if is_main else lambda _: None,
    )
    shares.wait("captioned")  # Who ends early would take the others for dead.
    if is_main:
        print(summary)


def _settings(arguments: argparse.Namespace) -> Any:
    """Settings that still want the sampling options; what is wrong with the others is said first."""
    import functools

    from sg4v_jax.caption.corpus.guards import Guards
    from sg4v_jax.caption.corpus.job import Settings

    guards = Guards(
        retry=arguments.retry,
        temperature=arguments.retry_temperature,
        repetition_penalty=arguments.retry_repetition_penalty,
        max_new_tokens=arguments.retry_max_new_tokens,
    )
    names = (
        "prompt",
        "shard_size",
        "drop_flagged",
        "parquet",
        "max_failed",
        "retry_failed",
        "retry_changed",
        "max_image_bytes",
        "lease_seconds",
    )
    settings = functools.partial(
        Settings, guards=guards, **{name: getattr(arguments, name) for name in names}
    )
    settings()
    return settings


def _shown(every: float) -> Callable[[object], None]:
    """Prints where the job stands, now and then."""
    last = time.monotonic()

    def show(progress: object) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            print(progress, file=sys.stderr, flush=True)

    return show
