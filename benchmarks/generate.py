"""Bulk captioning with our engine against `generate` of transformers, and what the engine itself costs.

Both libraries get the same random weights, images, prompts and lengths of answers, and it is checked that
they generate the same tokens before anything is timed. They take turns, so that whatever else the machine
does hits both.

  python benchmarks/generate.py --output=generate.json
"""

import argparse
import dataclasses
import itertools
import json
import operator
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.convert.load import load_model
from sg4v_jax.data.conversation import encode_prompt, get_template, place_images, training_texts
from sg4v_jax.data.image import load_image, normalize_reference, preprocess
from sg4v_jax.data.records import Turn
from sg4v_jax.data.sample import expand_images
from sg4v_jax.data.tokenizer import Tokenizer, train_tokenizer
from sg4v_jax.infer.engine import Engine
from sg4v_jax.infer.request import Prompt, Request, ScoreRequest
from sg4v_jax.infer.sampling import SamplingOptions
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.world import write_world

QUESTION = "<image>\nAnalyze the image in a comprehensive and detailed manner."
# The original tool's.
THEIR_BATCH = 4
# A 7B model's decode step of 32 slots with full caches on four v5e chips, at least, in seconds: `sg4v plan
# --config=configs/finetune.py:7b --config.mesh.data=2 --config.mesh.fsdp=1 --config.mesh.tensor=4
# --topology=v5e:2x4 --steps=decode --slots=64 --capacity=1024` (two copies of it), libtpu 0.0.52.
STEP_7B = 8.4e-3


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides do.

    Attributes:
      prompts: one image each.
      lengths: tokens of each answer, of which no earlier one may be the last.
    """

    prompts: list[Prompt]
    lengths: list[int]

    def requests(self, **fields: Any) -> list[Request]:
        rows = [SamplingOptions(max_new_tokens=n, min_new_tokens=n, **fields) for n in self.lengths]
        return [Request(i, *both) for i, both in enumerate(zip(self.prompts, rows, strict=True))]


class EndsOnSchedule(StoppingCriteria):
    """Ends each row of a batch at its own length."""

    def __init__(self, start: int, lengths: list[int]):
        self.ends = torch.tensor(lengths) + start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def make_models(directory: pathlib.Path, size: str) -> tuple[LlavaForConditionalGeneration, ModelBundle, Any]:
    """The same random weights twice, and the world whose images are captioned."""
    files = write_world(directory / "world", train_scenes=96, heldout_scenes=4, seed=0, image_size=112)
    tokenizer = directory / "tokenizer.model"
    train_tokenizer(training_texts([files.cap_dense]), tokenizer, 4000, hard_vocab_limit=False)
    vocab = Tokenizer(tokenizer).vocab_size
    width, layers = {"mid": (512, 8), "tiny": (64, 1)}[size]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width // 2, intermediate_size=width, num_hidden_layers=4, num_attention_heads=4,
            image_size=112, patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab + 2, hidden_size=width, intermediate_size=width * 11 // 4,
            num_hidden_layers=layers, num_attention_heads=max(width // 128, 1),
            num_key_value_heads=max(width // 128, 1), max_position_embeddings=1024,
        ),
        image_token_index=vocab, pad_token_id=vocab + 1,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(config).eval()
    # HF's initial weights say next to nothing; these tell tokens apart.
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    theirs.save_pretrained(directory / size)
    return theirs, dataclasses.replace(load_model(directory / size), tokenizer_file=tokenizer), files


def make_work(files: Any, count: int, mean: float, seed: int = 0) -> Work:
    """Captions of the paper's spread: most within a factor of two of each other, some far from it."""
    paths = (
        sorted((files.image_root).rglob("*.png"))[:count] or sorted(files.image_root.rglob("*.jpg"))[:count]
    )
    images = [paths[i % len(paths)].read_bytes() for i in range(count)]
    draws = np.random.default_rng(seed).lognormal(0, 0.4, count)
    lengths = np.clip(mean * draws / draws.mean(), 4, 2.5 * mean).astype(int).tolist()
    return Work([Prompt((Turn("human", QUESTION),), (image,)) for image in images], lengths)


def their_run(model: LlavaForConditionalGeneration, bundle: ModelBundle, work: Work) -> list[list[int]]:
    """The original tool's loop: a batch of images, until its longest caption ends, then the next."""
    tokenizer = Tokenizer(bundle.tokenizer_file)
    turns = place_images(work.prompts[0].turns)
    ids = encode_prompt(get_template(bundle.template), turns, tokenizer)
    tokens, _, is_image = expand_images(ids, None, bundle.config.vision.num_image_tokens)
    size = bundle.config.vision.image_size
    row = torch.from_numpy(np.where(is_image, model.config.image_token_index, tokens))
    answers = []
    for start in range(0, len(work.prompts), THEIR_BATCH):
        batch = slice(start, start + THEIR_BATCH)
        pixels = [
            preprocess(load_image(p.images[0], name=""), size=size, aspect=bundle.aspect)
            for p in work.prompts[batch]
        ]
        inputs = row[None].repeat(len(pixels), 1)
        output = model.generate(
            input_ids=inputs,
            pixel_values=torch.from_numpy(normalize_reference(np.stack(pixels)).transpose(0, 3, 1, 2).copy()),
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max(work.lengths[batch]),
            do_sample=False,
            suppress_tokens=[tokenizer.eos_id, *range(tokenizer.vocab_size, tokenizer.vocab_size + 2)],
            stopping_criteria=StoppingCriteriaList([EndsOnSchedule(len(row), work.lengths[batch])]),
        )
        new = output[:, len(row) :].tolist()
        answers += [tokens[:n] for tokens, n in zip(new, work.lengths[batch], strict=True)]
    return answers


def our_run(engine: Engine, work: Work) -> list[list[int]]:
    results = {result.key: result for result in engine.complete(work.requests())}
    return [list(results[i].completion.tokens) for i in range(len(work.prompts))]


def seconds(run: Callable[[], Any]) -> dict[str, float]:
    """By the clock, and of the process's cores."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}


def compare(arguments: argparse.Namespace, directory: pathlib.Path) -> dict[str, Any]:
    """Time per token of both, in turns; transformers takes the first captions only, as its time is linear."""
    theirs, bundle, files = make_models(directory, "mid")
    millions = sum(parameter.numel() for parameter in theirs.parameters()) / 1e6
    work = make_work(files, arguments.captions, arguments.mean_tokens)
    part = Work(work.prompts[: arguments.their_captions], work.lengths[: arguments.their_captions])
    engine = make_engine(arguments, bundle)
    first = Work(work.prompts[:THEIR_BATCH], [16] * THEIR_BATCH)
    ours, expected = our_run(engine, first), their_run(theirs, bundle, first)
    if ours != expected:
        raise SystemExit(f"the tokens differ: ours {ours}, transformers' {expected}")
    engine.stats = type(engine.stats)(engine.stats.groups)
    rounds = []
    for _ in range(arguments.rounds):
        both = {
            "ours": (seconds(lambda: our_run(engine, work)), work),
            "transformers": (seconds(lambda: their_run(theirs, bundle, part)), part),
        }
        rounds.append(
            {
                name: {kind: value / sum(done.lengths) for kind, value in times.items()}
                for name, (times, done) in both.items()
            }
        )
    print(f"{millions:.0f} M parameters, {len(work.lengths)} captions of {np.mean(work.lengths):.0f} tokens,")
    print(f"slots {engine.stats.occupancy:.3f} full to the end of the last one")
    report: dict[str, Any] = {"millions": millions, "lengths": work.lengths, "rounds": rounds}
    for kind in ("clock", "cpu"):
        times = {name: statistics.median(each[name][kind] for each in rounds) for name in rounds[0]}
        ratios = [each["transformers"][kind] / each["ours"][kind] for each in rounds]
        for name, per_token in times.items():
            rate = 1 / per_token
            print(
                f"{kind:>6} {name:>13}: {1e3 * per_token:.2f} ms a token, {rate:.0f} tokens/s, "
                f"{rate / np.mean(work.lengths):.2f} captions/s"
            )
        print(f"{kind:>6} ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        report[f"ratio_{kind}"] = ratios
    report["occupancy"] = engine.stats.occupancy
    return report | {"int8": quantized(arguments, bundle, work, engine)}


def make_engine(arguments: argparse.Namespace, bundle: ModelBundle, **fields: Any) -> Engine:
    return Engine(
        bundle,
        make_mesh(),
        "float32",
        slots=arguments.slots,
        capacity=arguments.capacity,
        prefill_rows=4,
        **fields,
    )


INT8: tuple[dict[str, str], ...] = ({"weights": "int8"}, {"kv": "int8"}, {"weights": "int8", "kv": "int8"})


def quantized(
    arguments: argparse.Namespace, bundle: ModelBundle, work: Work, engine: Engine
) -> dict[str, dict[str, float]]:
    """Speed and memory of int8, against the engine in float32."""
    few = Work(work.prompts[: arguments.slots], [min(n, 64) for n in work.lengths[: arguments.slots]])
    report = {}
    for fields in INT8:
        other = make_engine(arguments, bundle, **fields)
        our_run(other, few)
        turns = [
            [seconds(lambda each=each: our_run(each, few))["cpu"] for each in (engine, other)]  # type: ignore[misc]
            for _ in range(arguments.rounds)
        ]
        name = " and ".join(fields)
        report[name] = {
            "speed": statistics.median(a / b for a, b in turns),
            "parameters": other.memory.parameters / engine.memory.parameters,
            "slots": other.memory.slots / engine.memory.slots,
        }
        print(f"{name} int8 against float32: " + ", ".join(f"{k} {v:.3f}" for k, v in report[name].items()))
    return report


def trained(arguments: argparse.Namespace, directory: pathlib.Path) -> dict[str, dict[str, float]]:
    """What int8 does to a captioner that has learned something: on scenes that it hasn't seen."""
    bundle = load_model(arguments.trained)
    files = write_world(directory, train_scenes=arguments.scenes, heldout_scenes=1, seed=91, dense_share=1.0)
    drawn = [r for r in json.loads(files.cap_dense.read_text()) if r["image"].startswith("world/")]
    turn = Turn("human", bundle.prompt or QUESTION)
    prompts = [Prompt((turn,), ((files.image_root / r["image"]).read_bytes(),)) for r in drawn]
    captions = [r["conversations"][1]["value"] for r in drawn]
    scored = [ScoreRequest(i, p, (c,)) for i, (p, c) in enumerate(zip(prompts, captions, strict=True))]
    asked = [Request(i, p, SamplingOptions(max_new_tokens=200)) for i, p in enumerate(prompts)]
    report, exact = {}, None
    for fields in ({}, *INT8):
        engine = Engine(bundle, make_mesh(), "float32", slots=arguments.slots, capacity=512, **fields)
        # A score prefills in floating point: int8 keys and values only show in what is generated.
        scores = sorted(engine.score(scored), key=lambda score: score.key)
        loss = -sum(s.log_probabilities[0] for s in scores) / sum(s.num_tokens[0] for s in scores)
        done = sorted(engine.complete(asked), key=lambda result: result.key)
        found = [result.completion for result in done]
        exact = exact or found
        pairs = list(zip(exact, found, strict=True))
        # As far as both say the same, they say it with nearly the same probability.
        same = [(a, b) for a, b in pairs if a.tokens == b.tokens]
        shared = [
            sum(itertools.takewhile(bool, map(operator.eq, a.tokens, b.tokens))) / len(a.tokens)
            for a, b in pairs
        ]
        report[" and ".join(fields) or "float32"] = {
            "perplexity": float(np.exp(loss)),
            "captions_equal": len(same) / len(pairs),
            "prefix_equal": float(np.mean(shared)),
            "log_probability_change_per_token": float(
                np.mean([abs(a.log_probability - b.log_probability) / len(a.tokens) for a, b in same])
            ),
        }
    for name, row in report.items():
        print(f"{name:>14}: " + ", ".join(f"{k} {v:.5f}" for k, v in row.items()))
    return report


def overhead(arguments: argparse.Namespace, directory: pathlib.Path) -> dict[str, float]:
    """Occupancy of the slots, and what the host does per step: a model so small that little else is left."""
    _, bundle, files = make_models(directory, "tiny")
    engine = Engine(bundle, make_mesh(), "float32", slots=arguments.bulk_slots, capacity=640)
    list(engine.complete(make_work(files, 8, 8).requests()))
    engine.stats = type(engine.stats)(engine.stats.groups)
    work = make_work(files, arguments.bulk, 180, seed=1)
    # Processor time of this thread: what waits for the device, or for other processes, doesn't count.
    start, full = time.thread_time(), 0.0

    def requests() -> Iterator[Request]:
        nonlocal full
        yield from work.requests()
        full = engine.stats.occupancy

    list(engine.complete(requests()))
    host = (time.thread_time() - start) / engine.stats.steps
    print(f"{arguments.bulk} captions, {arguments.bulk_slots} slots: occupancy {full:.3f} with more to come,")
    print(f"{engine.stats.occupancy:.3f} to the end of the last one; the host takes {1e6 * host:.0f} us")
    print(f"per step, {host / STEP_7B:.1%} of a 7B model's on v5e ({1e3 * STEP_7B:.1f} ms)")
    return {
        "occupancy_with_more_to_come": full,
        "occupancy": engine.stats.occupancy,
        "host_seconds_per_step": host,
        "share_of_7b_step": host / STEP_7B,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=768)
    parser.add_argument("--their-captions", type=int, default=24, help="the first of them, for transformers")
    parser.add_argument("--mean-tokens", type=float, default=180)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--capacity", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bulk", type=int, default=1000, help="captions of the run that measures occupancy")
    parser.add_argument("--bulk-slots", type=int, default=32)
    parser.add_argument("--trained", help="a captioner's run, as of `sg4v demo`: what int8 does to it")
    parser.add_argument("--scenes", type=int, default=64, help="unseen scenes for --trained")
    parser.add_argument("--only", choices=("overhead", "comparison", "trained"))
    parser.add_argument("--output", help="JSON of all figures")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()},
        "jax": jax.__version__,
        "torch": torch.__version__,
    }
    parts = {"overhead": overhead, "comparison": compare} | (
        {"trained": trained} if arguments.trained else {}
    )
    for name, part in parts.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as directory:
                report[name] = part(arguments, pathlib.Path(directory))
    report["machine"]["load_after"] = os.getloadavg()
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
