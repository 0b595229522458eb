"""`sg4v eval`."""

import argparse
import os
from typing import Any

from sg4v_jax.commands.common import add_command, add_sampling, load_engine, progress_of
from sg4v_jax.commands.processes import add_processes, join

_ANSWER_TOKENS = 128
_GREEDY = {
    **{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 0, "stop": []},
    **{"min_new_tokens": 0, "no_repeat_ngram": 0, "num_beams": 1, "length_penalty": 1.0},
}


def add(commands: Any) -> None:
    """Adds `eval` to the commands."""
    parser = add_command(
        commands,
        "eval",
        run,
        "Scores a model on benchmarks, compares scored models, or answers a file of questions.",
        "  sg4v eval --benchmarks=mme,mmbench,pope --data eval --model runs/sft --output scores/sft\n"
        "  sg4v eval --compare scores/sft scores/longer --data eval --output comparison.html\n"
        "  sg4v eval --model runs/sft --questions q.jsonl --images images --output answers.jsonl \\\n"
        "    --truth truth.jsonl",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--benchmarks",
        help="names with commas between them; `paper`: those of the paper's table; `all`: those whose files "
        "are there; `list` shows them",
    )
    what.add_argument(
        "--compare", nargs="+", metavar="RUN", help="outputs of --benchmarks, the baseline first"
    )
    what.add_argument("--questions", help="JSONL with question_id, image, text")
    add_sampling(parser, None, needs_model=False)
    parser.add_argument("--output", help="folder of a run; page of a comparison; JSONL of answers")
    group = parser.add_argument_group("benchmarks")
    group.add_argument("--data", help="folder with the benchmarks' folders (docs/evaluation.md)")
    group.add_argument(
        "--mode", default="generate", help="or the likeliest of option `letters` or `contents`"
    )
    group.add_argument("--template", default="", help="default: as published for each benchmark")
    group.add_argument("--aspect", default="", help="pad or square; default: as published")
    group.add_argument("--limit", type=int, default=0, help="the first so many questions of each; 0 is all")
    group.add_argument(
        "--shard", help="0/4 to 3/4 share the work of one output among four; default: this process's"
    )
    group.add_argument(
        "--judge",
        help="model that judges open answers (LLaVA-Bench, MM-Vet) and reads multiple-choice answers that "
        "rules can't (MMBench, MMStar)",
    )
    group.add_argument(
        "--judge-runs", type=int, default=0, help="times that MM-Vet is judged; default: 5, as published"
    )
    group.add_argument("--judge-endpoint", default="https://api.openai.com/v1", help="OpenAI-compatible")
    group.add_argument("--judge-key-env", default="OPENAI_API_KEY", help="variable that holds the key")
    group = parser.add_argument_group("comparing")
    group.add_argument("--published", default="", help="published models to show, such as sharegpt4v-7b")
    group = parser.add_argument_group("a file of questions")
    group.add_argument("--images", help="folder that `image` is relative to")
    group.add_argument("--truth", help="JSONL with question_id, answer and optionally category")
    add_processes(parser)


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `eval`."""
    if arguments.compare:
        _compare(arguments)
    elif arguments.questions:
        _questions(arguments)
    elif arguments.benchmarks == "list":
        _list()
    else:
        _benchmarks(arguments)


def _list() -> None:
    from sg4v_jax.evaluate.judged import JudgedBenchmark
    from sg4v_jax.evaluate.registry import BENCHMARKS

    for name, benchmark in BENCHMARKS.items():
        scored = benchmark.server or ("a judge" if benchmark.judged else "rules")
        if isinstance(benchmark, JudgedBenchmark) and not benchmark.judged:
            scored += " and a judge, if there is one"
        print(f"{name:<16}{benchmark.title:<28}in {benchmark.folders[0]:<26}scored by {scored}")


def _benchmarks(arguments: argparse.Namespace) -> None:
    import functools

    from sg4v_jax.evaluate.registry import get_benchmarks, load_benchmarks
    from sg4v_jax.evaluate.runner import SCORES, run_benchmark, summary
    from sg4v_jax.evaluate.settings import Choices

    benchmarks = get_benchmarks(arguments.benchmarks)
    _require(arguments, "data", "model", "output")
    if changed := [name for name, value in _GREEDY.items() if getattr(arguments, name) != value]:
        raise ValueError(f"benchmarks are answered greedily; leave out --{changed[0].replace('_', '-')}")
    choices = Choices(
        mode=arguments.mode,
        template=arguments.template,
        aspect=arguments.aspect,
        max_new_tokens=arguments.max_new_tokens or 0,
        limit=arguments.limit,
        precision=f"{arguments.dtype}, {arguments.weights} weights, {arguments.kv} keys and values",
    )
    from sg4v_jax.parallel import shares

    shard = _shard(arguments.shard) if arguments.shard else None
    is_main = join(arguments)
    # Before the model is loaded: files may be missing.
    answered = [b.name for b in benchmarks if os.path.exists(f"{arguments.output}/{b.name}/{SCORES}")]
    loaded, left_out = load_benchmarks(arguments.benchmarks, arguments.data, answered)
    if is_main:
        print("".join(f"left out: {reason}\n" for reason in left_out), end="")
    benchmarks = [benchmark for benchmark in benchmarks if benchmark.name in loaded]
    engine, scores = _LazyEngine(arguments), {}
    run = functools.partial(
        run_benchmark, engine=engine, output=arguments.output, model=_model_name(arguments), choices=choices
    )
    together = shard is None and shares.mine()[1] > 1
    if together:
        for benchmark in benchmarks:
            bar = progress_of(f"{benchmark.name} answers") if is_main else iter
            run(benchmark, loaded=loaded[benchmark.name], shard=shares.mine(), scored=False, progress=bar)
        shares.wait("answered")
        if not is_main:
            return
    for benchmark in benchmarks:
        judge = _judge(arguments, benchmark)
        report = run(
            benchmark,
            loaded=loaded[benchmark.name],
            shard=None if together else shard or (0, 1),
            judge=judge,
            progress=progress_of(f"{benchmark.name} answers"),
        )
        if judge:
            judge.close()
        if report.missing:
            print(f"{benchmark.name}: {report.asked} answered, {report.missing} left to other shards")
        else:
            scores[benchmark.name] = report.scores
    if scores:
        print(summary(scores))


def _compare(arguments: argparse.Namespace) -> None:
    from sg4v_jax.evaluate.compare import compare_runs, table
    from sg4v_jax.evaluate.compare_page import write_page

    comparison = compare_runs(arguments.compare, [name for name in arguments.published.split(",") if name])
    print(table(comparison))
    if arguments.output:
        print(f"wrote {write_page(comparison, arguments.compare[0], arguments.output, arguments.data)}")


def _questions(arguments: argparse.Namespace) -> None:
    from sg4v_jax.evaluate.answers import answer_questions, read_jsonl
    from sg4v_jax.evaluate.exact import score_file

    _require(arguments, "images", "model", "output")
    arguments.max_new_tokens = arguments.max_new_tokens or _ANSWER_TOKENS
    questions = read_jsonl(arguments.questions, ("question_id", "text"))
    is_main = join(arguments)
    engine, options = load_engine(arguments)
    answer_questions(
        engine,
        questions,
        arguments.images,
        arguments.output,
        options=options,
        model_id=_model_name(arguments),
        progress=progress_of("answers") if is_main else iter,
    )
    if not is_main:
        return
    print(f"{arguments.output}: {len(questions)} answers")
    if arguments.truth:
        print(score_file(arguments.output, arguments.truth).table())


class _LazyEngine:
    """Loads the model when the first question comes: scoring again, or with a judge, needs none."""

    def __init__(self, arguments: argparse.Namespace):
        self._arguments, self._engine = arguments, None

    def __getattr__(self, name: str) -> Any:
        if self._engine is None:
            arguments = argparse.Namespace(**vars(self._arguments))
            arguments.max_new_tokens = arguments.max_new_tokens or _ANSWER_TOKENS
            self._engine, _ = load_engine(arguments)
        return getattr(self._engine, name)


def _judge(arguments: argparse.Namespace, benchmark: Any) -> Any:
    """A judge, if one is given and the benchmark has a use for one."""
    import pathlib

    from sg4v_jax.caption.collect.endpoint import Endpoint
    from sg4v_jax.evaluate.judge import Judge
    from sg4v_jax.evaluate.judged import JudgedBenchmark, verdict_cache

    if not arguments.judge or not isinstance(benchmark, JudgedBenchmark):
        return None
    endpoint = Endpoint(arguments.judge_endpoint, os.environ.get(arguments.judge_key_env, ""))
    cache = verdict_cache(pathlib.Path(arguments.output) / benchmark.name)
    return Judge(endpoint, arguments.judge, cache, runs=arguments.judge_runs)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--shard {text!r}: expected index/count, such as 0/4")
    return int(index), int(count)


def _require(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if not getattr(arguments, name):
            raise ValueError(f"give --{name}")


def _model_name(arguments: argparse.Namespace) -> str:
    return os.path.basename(os.path.normpath(arguments.model))
