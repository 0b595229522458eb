"""The `sg4v` command: parses, then calls the room that does the work."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

DESCRIPTION = """\
ShareGPT4V on JAX: better captions make better multimodal models.

the loop:
  sg4v demo                   everything below, small, on a world that ships with the library
  sg4v data build             LLaVA-format JSON + images -> a dataset
  sg4v train                  a captioner, pre-training, SFT: one --config each
  sg4v caption                a corpus of images -> captions, restartable
  sg4v chat                   talk about an image
  sg4v eval                   answer a benchmark's questions, and score them
  sg4v convert                to and from Hugging Face LLaVA and the original layout

`sg4v COMMAND --help` explains each, with an example.
"""

ParserAdder = Callable[[Any], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `sg4v` and `python -m sg4v_jax`."""
    own, config_argv = split_config(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("sg4v", description=DESCRIPTION, formatter_class=_Raw)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_data, _add_train, _add_caption, _add_chat, _add_eval, _add_convert):
        add(commands)
    arguments = parser.parse_args(own)
    if config_argv and arguments.command != "train":
        parser.error(f"{arguments.command} takes no --config")
    _quiet()
    try:
        arguments.run(arguments, config_argv)
    except (ValueError, OSError) as error:
        # Errors of this library name the file, record or key and the fix; a traceback adds nothing.
        if arguments.debug:
            raise
        print(f"sg4v {arguments.command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _quiet() -> None:
    """This library's messages from INFO up, everybody else's from ERROR up."""
    import logging

    import absl.logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    absl.logging.set_verbosity(absl.logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("sg4v_jax")
    logger.handlers[:] = [handler]  # Not one more for each call in the same process.
    logger.setLevel(logging.INFO)
    logger.propagate = False


def split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the command's own arguments, those of its config)."""
    own, config = [], []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.split("=")[0].split(".")[0] != "--config":
            own.append(argument)
        elif "=" not in argument and rest:
            config.append(f"{argument}={rest.pop(0)}")
        else:
            config.append(argument)
    return own, config


class _Raw(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps examples as written and shows defaults."""


def _command(commands: Any, name: str, run: Callable[..., None], help: str, example: str) -> Any:
    parser = commands.add_parser(
        name, help=help, description=f"{help}\n\nexample:\n{example}", formatter_class=_Raw
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "The whole loop on the embedded world: build, train a captioner, re-caption, pre-train, SFT, "
        "answer, score, export, reload.",
        "  sg4v demo --workdir runs/demo",
    )
    parser.add_argument("--workdir", default="runs/demo", help="where everything goes; a second run resumes")
    parser.add_argument("--scenes", type=int, default=0, help="training scenes; 0: as many as it learns from")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the number of training steps")
    parser.add_argument("--seed", type=int, default=0)


def _demo(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.demo.run import run_demo

    run_demo(
        arguments.workdir, train_scenes=arguments.scenes, step_factor=arguments.steps, seed=arguments.seed
    )


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="Build datasets and tokenizers.", formatter_class=_Raw)
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = _command(
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
    tokenizer = _command(
        actions,
        "tokenizer",
        _data_tokenizer,
        "Trains a SentencePiece tokenizer with LLaMA's settings on the texts of LLaVA-format files.",
        "  sg4v data tokenizer --json a.json b.json --vocab-size 640 --output tokenizer.model",
    )
    tokenizer.add_argument("--json", required=True, nargs="+", help="JSON arrays or JSONL of records")
    tokenizer.add_argument("--vocab-size", type=int, required=True)
    tokenizer.add_argument("--output", required=True)
    world = _command(
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
        progress=_bar("records"),
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
        progress=_bar("images"),
    )
    print(f"wrote {files.cap_dense.parent}")


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "Trains: a captioner, pre-training or SFT, as --config says. Goes on where it was cut off.",
        "  sg4v train --config=configs/pretrain.py:7b --workdir=runs/pretrain \\\n"
        "    --config.data.tokenizer=vicuna/tokenizer.model --config.init.text=vicuna \\\n"
        "    --config.data.sources.share_captioner.directory=datasets/llava/pt/1.0.0",
    )
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and the config go here")


def _train(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax import config
    from sg4v_jax.parallel import distributed
    from sg4v_jax.train.loop import train

    run_config = config.parse(config_argv)
    distributed.initialize()
    values = train(run_config, arguments.workdir)
    print(f"{arguments.workdir}: done, loss {values.get('loss', float('nan')):.4f}")


def _add_sampling(parser: Any, max_new_tokens: int) -> None:
    parser.add_argument("--model", required=True, help="training run, HF LLaVA or share4v directory")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="what to compute in")


def _generator(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from sg4v_jax.convert.load import load_model
    from sg4v_jax.infer.generate import Generator
    from sg4v_jax.infer.sampling import SamplingOptions
    from sg4v_jax.parallel.mesh import make_mesh

    options = SamplingOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    return Generator(load_model(arguments.model), make_mesh(), arguments.dtype), options


def _add_caption(commands: Any) -> None:
    parser = _command(
        commands,
        "caption",
        _caption,
        "Captions a corpus of images. Goes on where it was cut off; a bad image costs one image.",
        "  sg4v caption --model runs/captioner --images photos --output captions",
    )
    _add_sampling(parser, 300)
    parser.add_argument("--images", required=True, help="a folder, or a JSON list of paths")
    parser.add_argument("--image-root", help="what the paths of a JSON list are relative to")
    parser.add_argument("--output", required=True, help="folder for captions.jsonl and captions.json")
    parser.add_argument("--prompt", default="", help="default: the one the captioner was trained with")
    parser.add_argument("--batch-size", type=int, default=16)


def _caption(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.caption.corpus import caption_corpus, list_images

    images = list_images(arguments.images, arguments.image_root)
    folder = arguments.images if os.path.isdir(arguments.images) else os.path.dirname(arguments.images)
    generator, options = _generator(arguments)
    report = caption_corpus(
        generator,
        images,
        arguments.image_root or folder or ".",
        arguments.output,
        options=options,
        batch_size=arguments.batch_size,
        prompt=arguments.prompt,
        progress=_bar("batches"),
    )
    print(
        f"{report.records}: {report.captioned} captioned, {report.failed} unreadable, "
        f"{report.cut_off} cut off at {arguments.max_new_tokens} tokens"
    )


def _add_chat(commands: Any) -> None:
    parser = _command(
        commands,
        "chat",
        _chat,
        "Talks about an image; without a question, asks for them line by line.",
        '  sg4v chat --model runs/sft --image cat.jpg "What is the cat doing?"',
    )
    _add_sampling(parser, 512)
    parser.add_argument("question", nargs="?", help="one question; none: a conversation")
    parser.add_argument("--image", action="append", default=[], help="an image file; may be repeated")


def _chat(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.infer.chat import chat

    generator, options = _generator(arguments)
    chat(generator, arguments.image, arguments.question, options)


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        _eval,
        "Answers a file of questions (LLaVA's JSONL format) and, given the truth, scores the answers.",
        "  sg4v eval --model runs/sft --questions q.jsonl --images images --output answers.jsonl \\\n"
        "    --truth truth.jsonl",
    )
    _add_sampling(parser, 128)
    parser.add_argument("--questions", required=True, help="JSONL with question_id, image, text")
    parser.add_argument("--images", required=True, help="folder that `image` is relative to")
    parser.add_argument("--output", required=True, help="JSONL of answers")
    parser.add_argument("--truth", help="JSONL with question_id, answer and optionally category")
    parser.add_argument("--batch-size", type=int, default=16)


def _eval(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.evaluate.answers import answer_questions, read_jsonl
    from sg4v_jax.evaluate.exact import score_file

    questions = read_jsonl(arguments.questions, ("question_id", "text"))
    generator, options = _generator(arguments)
    answer_questions(
        generator,
        questions,
        arguments.images,
        arguments.output,
        options=options,
        batch_size=arguments.batch_size,
        model_id=os.path.basename(os.path.normpath(arguments.model)),
        progress=_bar("batches"),
    )
    print(f"{arguments.output}: {len(questions)} answers")
    if arguments.truth:
        print(score_file(arguments.output, arguments.truth).table())


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        _convert,
        "Converts a model: a training run, HF LLaVA or share4v directory, to HF LLaVA or share4v.",
        "  sg4v convert --model runs/sft --output llava-hf --to hf",
    )
    parser.add_argument("--model", required=True, help="training run, HF LLaVA or share4v directory")
    parser.add_argument("--output", required=True, help="new directory")
    parser.add_argument("--to", choices=("hf", "share4v"), default="hf", help="layout to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace a directory that isn't empty")


def _convert(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    from sg4v_jax.convert.load import load_model, save_model

    save_model(
        load_model(arguments.model),
        arguments.output,
        layout=arguments.to,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    print(f"wrote {arguments.output}")


def _bar(unit: str) -> Callable[..., Any]:
    import functools

    import tqdm

    return functools.partial(tqdm.tqdm, unit=f" {unit}", disable=not sys.stderr.isatty())


if __name__ == "__main__":
    main()
