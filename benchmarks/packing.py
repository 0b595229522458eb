"""How full rows are: our packing against Grain's and against the padding of LLaVA's sampler.

The lengths are drawn from distributions rebuilt from what is known of the released files (LENGTHS below
says from what); the files themselves aren't needed, and `--config` measures a real dataset instead.

  python benchmarks/packing.py
  python benchmarks/packing.py --config=configs/finetune.py:7b --config.data.sources.sft_mix.directory=...
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import grain
import numpy as np

from sg4v_jax import config as config_lib
from sg4v_jax.data.packing import pack

# (tokens, images) of a sample; an image is 576 tokens.
Size = tuple[int, int]
IMAGE, LONGEST = 576, 2048
# Tokens of Vicuna's tokenizer per word of dense prose: 1.28 on a paragraph in the captions' style; with
# names, numbers and typographical marks a little more.
TOKENS_PER_WORD = 1.3
# `v1`: the system text with `<s>` and "USER: " (spec 3.6), and " ASSISTANT:" with `</s>` of each round.
SYSTEM, ROUND = 35, 7

# --- Lengths -------------------------------------------------------------------------------------------


def lognormal(generator: np.random.Generator, mean: float, spread: float, count: int) -> np.ndarray:
    """Values of the given mean, whose standard deviation is `spread` times as large."""
    variance = np.log(1 + spread**2)
    return generator.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)


def pretraining(generator: np.random.Generator, count: int) -> list[Size]:
    """ShareGPT4V-PT: `<s>`, an image, 144 words on average (spec 1.8), a newline."""
    text = lognormal(generator, 144 * TOKENS_PER_WORD, 0.28, count)
    return [(2 + IMAGE + max(20, int(n)), 1) for n in text]


def brief(generator: np.random.Generator, count: int) -> list[Size]:
    """blip_laion_cc_sbu_558k: 54 characters on average (spec 1.8)."""
    return [(2 + IMAGE + max(3, int(n)), 1) for n in lognormal(generator, 14, 0.5, count)]


def dense(generator: np.random.Generator, count: int) -> list[Size]:
    """The captioner's data: `v1`, one fixed prompt of 12 tokens, 162 words of GPT4-Vision (spec 1.8)."""
    text = lognormal(generator, 162 * TOKENS_PER_WORD, 0.28, count)
    return [(SYSTEM + ROUND + 12 + IMAGE + max(30, int(n)), 1) for n in text]


def instructions(generator: np.random.Generator, count: int) -> list[Size]:
    """The SFT mix: the parts of spec 1.6 by their records, rounds and usual length of a round."""

    def rounds(mean: float, each: float) -> Callable[[int], np.ndarray]:
        return lambda n: (1 + generator.poisson(mean - 1, n)) * (each + ROUND)

    def answer(question: float, mean: float, spread: float) -> Callable[[int], np.ndarray]:
        return lambda n: ROUND + question + lognormal(generator, mean, spread, n)

    parts: list[tuple[int, int, Callable[[int], np.ndarray]]] = [
        (57_000, 1, rounds(4, 75)),  # LLaVA conversations
        (23_000, 1, answer(15, 162 * TOKENS_PER_WORD, 0.28)),  # dense captions
        (77_000, 1, answer(20, 230, 0.3)),  # LLaVA complex reasoning
        (40_688, 0, answer(60, 1050, 0.8)),  # ShareGPT, the only text without images
        (82_783, 1, rounds(5.4, 12)),  # VQAv2: 444K questions
        (72_140, 1, rounds(13, 13)),  # GQA: 943K questions
        (8_998, 1, answer(25, 5, 0.4)),  # OKVQA
        (80_000, 1, rounds(5, 20)),  # OCR-VQA
        (66_160, 1, answer(60, 4, 0.4)),  # A-OKVQA, with its choices
        (21_953, 1, answer(70, 25, 0.5)),  # TextCaps, with its OCR tokens
        (48_447, 1, rounds(9, 36)),  # RefCOCO: boxes as text
        (86_417, 1, rounds(10, 36)),  # Visual Genome: boxes as text
    ]
    total = sum(part[0] for part in parts)
    sizes: list[Size] = []
    for records, images, text in parts:
        lengths = SYSTEM + text(round(count * records / total)) + images * IMAGE
        sizes += [(min(LONGEST, int(length)), images) for length in lengths]
    return [sizes[i] for i in generator.permutation(len(sizes))]


# Config, lengths, and the original's rows per device (16 devices) and whether it grouped them.
STAGES: dict[str, tuple[Callable[[np.random.Generator, int], list[Size]], int, bool]] = {
    "align": (brief, 16, False),
    "captioner": (dense, 8, False),
    "pretrain": (pretraining, 16, False),
    "finetune": (instructions, 8, True),
}

# --- Contenders ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fill:
    """How full rows are.

    Attributes:
      tokens: share of positions that are not padding.
      empty_slots: share of image slots without an image, which the vision tower runs on all the same.
      samples: per row.
      microseconds: of packing, per sample.
    """

    tokens: float
    empty_slots: float
    samples: float
    microseconds: float = float("nan")


def measure(rows: list[list[Size]], length: int, slots: int, seconds: float, window: int) -> Fill:
    """Of all rows but the last, which are what was left as samples ran out."""
    placed, total = 0, sum(map(len, rows))
    for whole, row in enumerate(rows):
        if placed + window > total:
            rows = rows[:whole] or rows
            break
        placed += len(row)
    tokens = sum(size[0] for row in rows for size in row) / (len(rows) * length)
    images = sum(size[1] for row in rows for size in row) / (len(rows) * slots)
    samples = sum(map(len, rows))
    return Fill(tokens, 1 - images, samples / len(rows), 1e6 * seconds / total)


def ours(sizes: list[Size], length: int, slots: int, window: int) -> Fill:
    """`sg4v_jax.data.packing`."""
    start = time.perf_counter()
    rows = list(pack(sizes, lambda size: size, length=length, image_slots=slots, window=window))
    return measure(rows, length, slots, time.perf_counter() - start, window)


def grains(sizes: list[Size], length: int, slots: int, bins: int = 64) -> Fill:
    """`grain.experimental.BestFitPackIterDataset`: closes all open rows when a sample fits into none."""
    source = grain.MapDataset.source(sizes).map(
        lambda size: {"tokens": np.full(size[0], 1, np.int8), "images": np.full(size[1], 1, np.int8)}
    )
    start = time.perf_counter()
    rows = list(
        grain.experimental.BestFitPackIterDataset(
            source.to_iter_dataset(grain.ReadOptions(num_threads=0)),
            length_struct={"tokens": length, "images": slots},
            num_packing_bins=bins,
            shuffle_bins=False,
        )
    )[:-bins]
    seconds = time.perf_counter() - start
    samples = np.mean([row["tokens_segment_ids"].max() for row in rows])
    tokens = np.mean([row["tokens"].sum() for row in rows]) / length
    images = np.mean([row["images"].sum() for row in rows]) / slots
    return Fill(float(tokens), float(1 - images), float(samples), 1e6 * seconds / len(sizes))


def padded(sizes: list[Size], per_device: int, grouped: bool, generator: np.random.Generator) -> Fill:
    """The original: each device's batch padded to its longest sample, an empty image for text."""
    order = group_by_modality_length(sizes, per_device, generator) if grouped else list(range(len(sizes)))
    batches = [order[i : i + per_device] for i in range(0, len(order) - per_device + 1, per_device)]
    used = sum(sizes[i][0] for batch in batches for i in batch)
    total = sum(max(sizes[i][0] for i in batch) * per_device for batch in batches)
    images = sum(sizes[i][1] for batch in batches for i in batch) / (len(batches) * per_device)
    return Fill(used / total, 1 - images, 1.0)


def group_by_modality_length(
    sizes: list[Size], per_device: int, generator: np.random.Generator, devices: int = 16
) -> list[int]:
    """LLaVA's sampler (spec 3.9): batches of one modality and of similar length."""
    mega = per_device * devices
    batches, leftover = [], []
    for images in (True, False):
        mine = [i for i in generator.permutation(len(sizes)) if (sizes[i][1] > 0) == images]
        parts = []
        for start in range(0, len(mine), mega):
            longest_first = sorted(mine[start : start + mega], key=lambda i: -sizes[i][0])
            chunks: list[list[int]] = [[] for _ in range(devices)]
            for i in longest_first:
                # To the device with the least text that still has room.
                open_chunks = [chunk for chunk in chunks if len(chunk) < per_device]
                min(open_chunks, key=lambda chunk: sum(sizes[j][0] for j in chunk)).append(i)
            parts.append([i for chunk in chunks for i in chunk])
        leftover += parts.pop()
        batches += parts
    order = [i for part in generator.permutation(len(batches)) for i in batches[part]]
    return order + sorted(leftover)


# --- Tables --------------------------------------------------------------------------------------------


def stage(name: str, count: int, seed: int) -> dict[str, Fill]:
    """Every contender on one stage's lengths, by name."""
    lengths, per_device, grouped = STAGES[name]
    sizes = lengths(np.random.default_rng(seed), count)
    data = config_lib.load(f"configs/{name}.py:7b").data
    sampler = "LLaVA, grouped by length" if grouped else "LLaVA, random order"
    shape = f"{data.seq_len} x {data.image_slots}"
    return {
        f"one sample a row of {LONGEST}": Fill(
            sum(size[0] for size in sizes) / (LONGEST * len(sizes)),
            1 - sum(size[1] for size in sizes) / len(sizes),
            1.0,
        ),
        f"{sampler}, padded": padded(sizes, per_device, grouped, np.random.default_rng(seed)),
        f"Grain's best fit, {shape}": grains(sizes, data.seq_len, data.image_slots),
        f"ours, {shape}": ours(sizes, data.seq_len, data.image_slots, data.packing_window),
    }


def print_table(title: str, fills: dict[str, Fill]) -> None:
    """As Markdown, for the README."""
    print(f"\n| {title} | tokens | empty slots | samples a row | µs a sample |\n|---|--:|--:|--:|--:|")
    for name, fill in fills.items():
        speed = "" if np.isnan(fill.microseconds) else f"{fill.microseconds:.0f}"
        print(
            f"| {name} | {fill.tokens:.3f} | {100 * fill.empty_slots:.1f} % | {fill.samples:.2f} | {speed} |"
        )


def of_config(argv: list[str], count: int) -> dict[str, Fill]:
    """A real dataset's first samples, in the config's rows and in others near them."""
    from sg4v_jax.data.reader import Reader
    from sg4v_jax.data.tokenizer import Tokenizer
    from sg4v_jax.train.setup import loader_config, model_config, required

    run = config_lib.parse(argv)
    tokenizer = Tokenizer(required(run.data.tokenizer, "config.data.tokenizer"))
    config = loader_config(run, model_config(run, tokenizer))
    reader = Reader(config.sources, config.form, tokenizer, config.seed, config.replacement)
    sizes = [size for size in map(reader.size, range(count)) if size is not None]
    fills = {}
    for slots in range(max(1, config.form.image_slots - 1), config.form.image_slots + 2):
        for length in sorted({config.form.length, *range(128 * (config.form.length // 128 - 6), 8192, 256)}):
            if max(size[0] for size in sizes) <= length and max(size[1] for size in sizes) <= slots:
                fills[f"{length} x {slots}"] = ours(sizes, length, slots, config.packing_window)
    best = sorted(fills.items(), key=lambda item: item[1].empty_slots - item[1].tokens)
    own = f"{config.form.length} x {config.form.image_slots}"
    return {f"{own} (as configured)": fills[own]} | dict(best[:8])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=20_000, help="lengths to draw, or records to read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the figures")
    arguments, config_argv = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if config_argv:
        tables = {"dataset": of_config(config_argv, arguments.samples)}
    else:
        tables = {name: stage(name, arguments.samples, arguments.seed) for name in STAGES}
    for name, fills in tables.items():
        print_table(name, fills)
    if arguments.output:
        found = {name: {k: dataclasses.asdict(v) for k, v in fills.items()} for name, fills in tables.items()}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
