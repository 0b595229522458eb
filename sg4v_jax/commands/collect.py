"""`sg4v collect`."""

import argparse
import os
import sys
from typing import Any

from sg4v_jax.commands.common import add_command, add_engine, make_engine, progress_bar

_OPENAI = "https://api.openai.com/v1"


def add(commands: Any) -> None:
    """Adds `collect` to the commands."""
    parser = add_command(
        commands,
        "collect",
        run,
        "Collects dense captions from GPT4-Vision, any endpoint that speaks its protocol, or a model of "
        "ours. Goes on where it was cut off; what was answered once is never asked again.",
        "  sg4v collect --images data --output collected --endpoint https://api.openai.com/v1 \\\n"
        "    --model gpt-4o --rpm 500 --tpm 300000 --price-in 2.5 --price-out 10 --budget 20\n"
        "  sg4v collect --images data --output collected --teacher runs/captioner",
    )
    parser.add_argument("--images", required=True, help="a folder, or a JSON list of paths")
    parser.add_argument("--image-root", help="what the paths of a JSON list are relative to")
    parser.add_argument("--output", required=True, help="folder for results.jsonl and captions.json")
    parser.add_argument("--endpoint", help=f"base URL; default: {_OPENAI}")
    parser.add_argument("--model", help="name of the model there")
    parser.add_argument("--teacher", help="instead of both, a model directory as for `sg4v caption`")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable with the key")
    parser.add_argument("--dry-run", action="store_true", help="only say what it would ask and cost")
    parser.add_argument("--retry-failed", action="store_true", help="ask again what failed for good")
    _add_questions(parser.add_argument_group("what to ask"))
    _add_pace(parser.add_argument_group("how fast, and for how much"))
    _add_filters(parser.add_argument_group("what to take"))
    # As many as there are workers: each has one request under way.
    add_engine(parser.add_argument_group("how the teacher computes"), slots=8)
    batch = parser.add_argument_group("batch APIs")
    batch.add_argument(
        "--batch", choices=("write", "read", "forget"), help="request files, instead of asking"
    )
    batch.add_argument("--batch-max-bytes", type=int, default=200_000_000, help="of one request file")
    batch.add_argument("--batch-max-requests", type=int, default=50_000, help="in one request file")
    batch.add_argument("files", nargs="*", metavar="FILE", help="to read or to forget")


def _add_questions(group: Any) -> None:
    group.add_argument("--prompts", help="JSON with opener, closer and sources, over ours")
    group.add_argument("--source-map", help="JSON from folder to source, before ours")
    group.add_argument("--question", default="", help="of captions.json; default: short ones that vary")
    group.add_argument("--detail", choices=("high", "low"), default="high", help="of the image")
    group.add_argument("--max-image-side", type=int, default=2048, help="larger ones are shrunk; 0: any")
    group.add_argument("--max-tokens", type=int, default=1024, help="of an answer")
    group.add_argument("--temperature", type=float, default=0.2)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--extra-body", default="{}", help="JSON to put into every request; null removes")


def _add_pace(group: Any) -> None:
    group.add_argument("--workers", type=int, default=8, help="requests under way at a time")
    group.add_argument("--rpm", type=float, default=0, help="requests per minute; 0: any")
    group.add_argument("--tpm", type=float, default=0, help="tokens per minute; 0: any")
    group.add_argument("--price-in", type=float, help="US dollars for a million prompt tokens")
    group.add_argument("--price-out", type=float, help="US dollars for a million answer tokens")
    group.add_argument("--budget", type=float, help="US dollars for all runs on this output together")
    group.add_argument("--timeout", type=float, default=120, help="seconds for an answer of an endpoint")
    group.add_argument("--retries", type=int, default=6, help="of a request that failed for the moment")
    group.add_argument("--backoff", type=float, default=1.0, help="seconds; longest first wait for a retry")
    group.add_argument("--stop-after", type=int, default=10, help="errors in a row, for each worker")


def _add_filters(group: Any) -> None:
    group.add_argument("--attempts", type=int, default=3, help="answers to ask for until one is good")
    group.add_argument("--min-words", type=int, default=20)
    group.add_argument("--max-words", type=int, default=600)
    group.add_argument("--language", choices=("en",), help="take no other; default: any")
    group.add_argument("--max-image-bytes", type=int, default=20_000_000, help="larger files are bad images")
    group.add_argument("--max-bad-images", type=int, default=100, help="more of them stop the run at once")


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `collect`."""
    from sg4v_jax.caption.collect.collection import open_collection
    from sg4v_jax.caption.corpus.inputs import list_images

    images = list_images(arguments.images)
    _check_teacher(arguments)
    folder = arguments.images if os.path.isdir(arguments.images) else os.path.dirname(arguments.images)
    root = arguments.image_root or folder or "."
    if bool(arguments.files) != (arguments.batch in ("read", "forget")):
        raise ValueError("files go with --batch read or --batch forget, and those with files")
    settings, engine = _settings(arguments), None
    if arguments.teacher:
        settings, engine = _load_teacher(arguments, settings)
    bar = progress_bar("chunks of images")
    with open_collection(images, root, arguments.output, settings, progress=bar) as collection:
        if arguments.retry_failed:
            collection.ledger.reopen_failed()
        _warn_of_earlier_runs(collection)
        print(collection.estimate())
        if arguments.dry_run:
            return
        stop = _batch(arguments, collection) if arguments.batch else _ask(arguments, collection, engine)
        summary = collection.write_outputs()
        print(_report(collection, summary))
    if stop.is_error:
        raise ValueError(f"stopped: {stop.reason}; the same command goes on from here")
    if stop.reason:
        print(f"stopped: {stop.reason}")
    if summary.pending:
        print(f"{summary.pending} images are still to be asked about; the same command does it")
        raise SystemExit(1)  # So that what comes next in a script doesn't take this for all.


def _check_teacher(arguments: argparse.Namespace) -> None:
    if bool(arguments.teacher) == bool(arguments.model):
        raise ValueError("give --model, an endpoint's name of it, or --teacher, a model directory")
    for name in ("endpoint", "batch", "price_in", "price_out", "budget") if arguments.teacher else ():
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is of an endpoint: leave it out with --teacher")


def _load_teacher(arguments: argparse.Namespace, settings: Any) -> tuple[Any, Any]:
    """(settings with the model's name, engine)."""
    import dataclasses

    from sg4v_jax.caption.collect.teacher import teacher_name
    from sg4v_jax.caption.corpus.job import describe_model

    engine = make_engine(arguments.teacher, arguments)
    computed = {name: getattr(arguments, name) for name in ("dtype", "weights", "kv")}
    name = teacher_name(arguments.teacher, describe_model(engine.bundle, **computed))
    return dataclasses.replace(settings, model=name), engine


def _settings(arguments: argparse.Namespace) -> Any:
    import json

    from sg4v_jax.caption.collect.collection import Settings
    from sg4v_jax.caption.collect.filters import Filters
    from sg4v_jax.caption.collect.ledger import Prices
    from sg4v_jax.caption.collect.prompts import load_prompts
    from sg4v_jax.caption.collect.request import RequestOptions

    try:
        extra = json.loads(arguments.extra_body)
        if not isinstance(extra, dict) or {"model", "messages", "stream", "n"} & extra.keys():
            raise ValueError("expected an object without model, messages, stream and n")
    except ValueError as error:
        raise ValueError(f"--extra-body {arguments.extra_body!r}: {error}") from error
    prompts = load_prompts(arguments.prompts, arguments.source_map)
    return Settings(
        model=arguments.teacher or arguments.model,
        prompts=prompts,
        request=RequestOptions(
            detail=arguments.detail,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            max_image_side=arguments.max_image_side,
            extra=extra,
        ),
        filters=Filters(arguments.min_words, arguments.max_words, prompts.prose, arguments.language or ""),
        attempts=arguments.attempts,
        prices=Prices(arguments.price_in, arguments.price_out),
        budget=arguments.budget,
        question=arguments.question,
        max_image_bytes=arguments.max_image_bytes,
        max_bad_images=arguments.max_bad_images,
    )


def _endpoint(arguments: argparse.Namespace) -> Any:
    from sg4v_jax.caption.collect.endpoint import Endpoint

    key = os.environ.get(arguments.key_env, "").strip()
    if not key:
        print(f"{arguments.key_env} is not set: asking without a key", file=sys.stderr)
    url = _OPENAI if arguments.endpoint is None else arguments.endpoint
    return Endpoint(url, key, timeout=arguments.timeout, workers=arguments.workers)


def _ask(arguments: argparse.Namespace, collection: Any, engine: Any) -> Any:
    import asyncio

    from sg4v_jax.caption.collect.collector import Collector, Pace
    from sg4v_jax.caption.collect.teacher import Teacher

    pace = Pace(
        workers=arguments.workers,
        rpm=arguments.rpm,
        tpm=arguments.tpm,
        retries=arguments.retries,
        backoff=arguments.backoff,
        stop_after=arguments.stop_after,
    )
    endpoint = Teacher(engine, collection.settings.model) if engine else _endpoint(arguments)
    bar = progress_bar("items")(total=len(collection.todo()))

    def show(collection: Any) -> None:
        ledger = collection.ledger
        counts = {**ledger.verdicts, **ledger.errors}
        bar.set_postfix({"spent": f"${ledger.spent:.2f}", **counts}, refresh=False)
        bar.update()

    async def collect() -> Any:
        return await Collector(collection, endpoint, pace, show).run()

    try:
        with bar:
            return asyncio.run(collect())
    finally:
        endpoint.close()


def _batch(arguments: argparse.Namespace, collection: Any) -> Any:
    from sg4v_jax.caption.collect import batch
    from sg4v_jax.caption.collect.collector import Stop

    if arguments.batch == "write":
        files = batch.write_batch(
            collection,
            max_bytes=arguments.batch_max_bytes,
            max_requests=arguments.batch_max_requests,
            progress=progress_bar("requests"),
        )
        for file in files:
            print(file)
        if collection.todo():
            return Stop("the budget has no room for the other requests")
    elif arguments.batch == "read":
        counts = batch.read_batch(collection, arguments.files)
        print("read: " + (", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"))
    else:
        print(f"{batch.forget_batch(collection, arguments.files)} requests can be asked again")
    return Stop()


def _warn_of_earlier_runs(collection: Any) -> None:
    if collection.ledger.cut_off:
        print(
            f"{collection.ledger.cut_off} requests of an earlier run were under way when it was killed: "
            "they may have been paid for and will be asked again",
            file=sys.stderr,
        )


def _report(collection: Any, summary: Any) -> str:
    import dataclasses

    ledger = collection.ledger
    images = ", ".join(f"{count} {name}" for name, count in dataclasses.asdict(summary).items() if count)
    answers = ", ".join(f"{count} {name}" for name, count in ledger.verdicts.most_common())
    lines = [
        f"{collection.output / 'captions.json'}: {images or 'no images'}",
        f"answers: {answers or 'none'}",
    ]
    if ledger.errors:
        errors = ", ".join(f"{n} x {name}" for name, n in ledger.errors.most_common())
        lines.append(f"errors: {errors}; the last: {ledger.last_error}")
    cost = f", ${ledger.spent:.2f}" if collection.settings.prices.known else ""
    lines.append(
        f"used: {ledger.prompt_tokens:,} prompt and {ledger.completion_tokens:,} answer tokens{cost}"
    )
    if ledger.unconfirmed:
        cost = f", at most ${ledger.unconfirmed_cost:.2f}" if cost else ""
        lines.append(f"not in it: {ledger.unconfirmed} requests without an answer that may be billed{cost}")
    return "\n".join(lines)
