"""Times the input pipeline against the PyTorch way and against what decoding and resizing alone take.

All work on the same generated JPEGs and texts, in turns, so that whatever else the machine does hits all.
"Per core" is CPU time: one process, one thread, and the seconds it really had.

  python benchmarks/input.py --output=input.json
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.resources
import io
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from sg4v_jax.data import image as image_lib
from sg4v_jax.data.build import build
from sg4v_jax.data.conversation import get_template
from sg4v_jax.data.loader import Loader, LoaderConfig
from sg4v_jax.data.mixture import Source
from sg4v_jax.data.sample import SampleFormat
from sg4v_jax.data.tokenizer import Tokenizer

SIZE, FEATURES, ROWS, SLOTS = 336, 576, 4, 4
PAD = (122, 116, 104)
IMAGE_ID, IGNORED = -200, -100
# An open model with LLaMA's size and settings, from the test dependencies.
TOKENIZER = importlib.resources.files("mistral_common") / "data/tokenizer.model.v1"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A recipe's form, its rows, and the FLOPs of one sample in training (7B)."""

    template: str
    aspect: str
    length: int
    flops: float


# Six FLOPs a parameter and token in training; two where nothing is trained; the tower's blocks likewise.
STAGES = {
    "pretrain": Stage("plain", "square", 3072, 768 * 6 * 6.74e9 + 577 * 4 * 0.3e9),
    "finetune": Stage("v1", "pad", 3584, 850 * 6 * 6.74e9 + 577 * 2 * 0.3e9),
}

# --- Data ------------------------------------------------------------------------------------------------


def photo(generator: np.random.Generator) -> bytes:
    """A JPEG of 640 x 480 or 480 x 640 pixels and about 130 KB: noise at all scales, as photographs have."""
    width, height = (640, 480) if generator.random() < 0.7 else (480, 640)
    pixels = generator.normal(128, 6, (height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128):
        noise = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        pixels += (np.asarray(Image.fromarray(noise).resize((width, height)), np.float64) - 128) / 3
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_data(root: pathlib.Path, count: int, stage: Stage) -> list[dict[str, Any]]:
    """Records in LLaVA's format, with images below `root/images`: one image, 144 words, and in SFT a
    second round."""
    generator = np.random.default_rng(0)
    words = [w for t in _words() for w in t.split()]
    (root / "images").mkdir()
    records = []
    for i in range(count):
        (root / "images" / f"{i:06d}.jpg").write_bytes(photo(generator))
        caption = " ".join(generator.choice(words, int(np.clip(generator.normal(144, 30), 40, 260))))
        turns = ["<image>\nDescribe the image in detail.", caption]
        if stage.template != "plain":
            turns += ["What stands in front of the window?", "A table with a red cup on it."]
        conversation = [{"from": ("human", "gpt")[j % 2], "value": turn} for j, turn in enumerate(turns)]
        records.append({"id": str(i), "image": f"{i:06d}.jpg", "conversations": conversation})
    (root / "records.json").write_text(json.dumps(records))
    return records


def _words() -> list[str]:
    return [
        "In the center of the photograph stands a weathered wooden boat, its red hull peeling after what",
        "must have been many seasons on the water. A coil of thick rope rests on the deck beside two orange",
        "buoys, and a small dog with a spotted coat looks out over the bow. Behind the boat the harbour",
        "stretches towards a row of narrow houses, painted in yellow, pale blue and white, whose reflections",
        "tremble on the calm surface. To the left, a woman in a green raincoat carries silver fish home",
    ]


# --- The PyTorch way -------------------------------------------------------------------------------------


class LlavaDataset(torch.utils.data.Dataset):
    """What spec 3.3 to 3.7 describe, on transformers: CLIP's image processor, a tokenizer in Python."""

    def __init__(self, records: list[dict[str, Any]], root: pathlib.Path, stage: Stage):
        self._records, self._root, self._stage = records, root, stage
        self._processor = CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        )
        self._tokenizer = SentencePieceBackend(
            vocab_file=str(TOKENIZER), legacy=False, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self._records[index]
        image = Image.open(self._root / record["image"]).convert("RGB")
        if self._stage.aspect == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), PAD)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        pixels = self._processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        ids, labels = self._text([turn["value"] for turn in record["conversations"]])
        return {"input_ids": ids, "labels": labels, "image": pixels}

    def _text(self, turns: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the whole, and labels by tokenising each round and each instruction once more."""
        if self._stage.template == "plain":
            ids = self._tokenize("<image>" + turns[1] + "\n")
            labels = ids.clone()
            labels[: len(self._tokenize("<image>"))] = IGNORED
            return ids, labels
        template = get_template(self._stage.template)
        rounds = [
            f"{template.opening if i == 0 else template.reopening}{turns[i]} ASSISTANT: {turns[i + 1]}"
            for i in range(0, len(turns), 2)
        ]
        ids = self._tokenize("</s>".join(rounds) + "</s>")
        labels, at = ids.clone(), 1
        labels[0] = IGNORED
        for text in rounds:
            instruction = text.split(" ASSISTANT: ")[0] + " ASSISTANT: "
            labels[at : at + len(self._tokenize(instruction)) - 2] = IGNORED
            at += len(self._tokenize(text))
        labels[at:] = IGNORED
        return ids, labels

    def _tokenize(self, text: str) -> torch.Tensor:
        chunks = [self._tokenizer(chunk).input_ids for chunk in text.split("<image>")]
        ids = [1, *chunks[0]]
        for chunk in chunks[1:]:
            ids += [IMAGE_ID, *chunk]
        return torch.tensor(ids)


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pads ids with 0 and labels with -100, cuts both at 2048, stacks the images."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad([s["input_ids"] for s in samples])[:, :2048]
    labels = pad([s["labels"] for s in samples], padding_value=IGNORED)[:, :2048]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": ids.ne(0),
        "images": torch.stack([s["image"] for s in samples]),
    }


def torch_batches(dataset: LlavaDataset, workers: int) -> Iterator[int]:
    """Samples of each batch, without end."""
    while True:
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=ROWS * SLOTS, shuffle=True, num_workers=workers, collate_fn=collate
        )
        for batch in loader:
            yield len(batch["images"])


# --- Ours, and the floors --------------------------------------------------------------------------------


def our_batches(directory: pathlib.Path, stage: Stage, workers: int) -> Iterator[int]:
    """Samples of each batch, without end."""
    form = SampleFormat(stage.template, stage.aspect, "", SIZE, FEATURES, stage.length, SLOTS, 2048)
    config = LoaderConfig(
        {"data": Source(os.fspath(directory))},
        form,
        ROWS,
        True,
        128,
        seed=0,
        num_threads=0,
        num_workers=workers,
    )
    batches = iter(Loader(config, Tokenizer(str(TOKENIZER)), shard=(0, 1)))
    try:
        while True:
            yield int(next(batches).segment_ids.max(axis=1).sum())
    finally:
        batches.close()


def floor(images: list[bytes], aspect: str, decode: Callable[[bytes], Image.Image]) -> Iterator[int]:
    """Decoding, padding and one call of Pillow's resize for each image; nothing else."""
    while True:
        for data in images:
            image = decode(data)
            width, height = image.size
            if aspect == "pad":
                side = max(width, height)
                square = Image.new("RGB", (side, side), PAD)
                square.paste(image, ((side - width) // 2, (side - height) // 2))
                np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            else:
                longer = int(SIZE * max(width, height) / min(width, height))
                resized = (SIZE, longer) if width <= height else (longer, SIZE)
                np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
            yield 1


def pillow_decode(data: bytes) -> Image.Image:
    """Pillow's decoder."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def simplejpeg_decode(data: bytes) -> Image.Image:
    """simplejpeg's decoder."""
    return Image.fromarray(image_lib.simplejpeg.decode_jpeg(data, "RGB"))


# --- Measuring -------------------------------------------------------------------------------------------


def take(samples: Iterator[int], count: int, clock: Callable[[], float]) -> float:
    """Seconds per sample of at least `count` samples."""
    start, done = clock(), 0
    while done < count:
        done += next(samples)
    return (clock() - start) / done


def take_turns(
    contenders: dict[str, Iterator[int]], rounds: int, count: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds per sample of each contender in each round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for samples in contenders.values():
        take(samples, 2 * ROWS * SLOTS, clock)  # Warm, and our packing window is full.
    for _ in range(rounds):
        for name, samples in contenders.items():
            found[name].append(1000 * take(samples, count, clock))
    return found


def without_simplejpeg(samples: Iterator[int]) -> Iterator[int]:
    """The same with Pillow's decoder."""
    library = image_lib.simplejpeg
    while True:
        image_lib.simplejpeg = None
        try:
            done = next(samples)
        finally:
            image_lib.simplejpeg = library
        yield done


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as fast the second is: median and extremes over the rounds."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one stage."""
    stage = STAGES[name]
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        records = write_data(root, arguments.images, stage)
        directory, _ = build("data", root / "records.json", root / "images", root / "datasets")
        images = [(root / "images" / record["image"]).read_bytes() for record in records]
        dataset = LlavaDataset(records, root / "images", stage)
        contenders = {
            "PyTorch": torch_batches(dataset, 0),
            "ours with Pillow's decoder": without_simplejpeg(our_batches(directory, stage, 0)),
            "floor: Pillow decode + resize": floor(images, stage.aspect, pillow_decode),
        }
        if image_lib.simplejpeg is not None:
            contenders["ours"] = our_batches(directory, stage, 0)
            contenders["floor: simplejpeg decode + Pillow resize"] = floor(
                images, stage.aspect, simplejpeg_decode
            )
        alone = take_turns(contenders, arguments.rounds, arguments.samples, time.process_time)
        result: dict[str, Any] = {
            "kilobytes_per_image": statistics.mean(map(len, images)) / 1000,
            "milliseconds": alone,
            "ratios": ratios(alone),
        }
        if arguments.workers:
            result["workers"] = with_workers(dataset, directory, stage, arguments)
    return result


def ratios(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Ours against PyTorch, and against the floor with the same decoder."""
    pairs = {
        "ours with Pillow's decoder": "floor: Pillow decode + resize",
        "ours": "floor: simplejpeg decode + Pillow resize",
    }
    result = {}
    for name, floor_name in pairs.items():
        if name in found:
            result[f"{name} over PyTorch"] = ratio(found["PyTorch"], found[name])
            result[f"{name} over its floor"] = ratio(found[floor_name], found[name])
    return result


def with_workers(
    dataset: LlavaDataset, directory: pathlib.Path, stage: Stage, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Wall time with as many worker processes in both; started anew in each round, so that none works
    while the other is timed, and timed over several times what their queues hold."""
    count, found = 6 * arguments.samples, {"PyTorch": [], "ours": []}
    for _ in range(max(1, arguments.rounds // 2)):
        for name, make in (
            ("PyTorch", lambda: torch_batches(dataset, arguments.workers)),
            ("ours", lambda: our_batches(directory, stage, arguments.workers)),
        ):
            samples = make()
            take(samples, 2 * ROWS * SLOTS, time.perf_counter)
            found[name].append(1000 * take(samples, count, time.perf_counter))
            samples.close()
    return {"processes": arguments.workers, "milliseconds": found, "ratio": ratio(*found.values())}


def machine() -> dict[str, Any]:
    """What this ran on."""
    packages = ("grain", "torch", "transformers", "pillow", "numpy", "sentencepiece")
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "simplejpeg": importlib.metadata.version("simplejpeg") if image_lib.simplejpeg else None,
    }


def print_stage(name: str, result: dict[str, Any]) -> None:
    """As Markdown, for the README."""
    print(f"\n| {name}, {result['kilobytes_per_image']:.0f} KB an image | ms a sample | samples/s a core |")
    print("|---|--:|--:|")
    for contender, values in result["milliseconds"].items():
        median = statistics.median(values)
        print(f"| {contender} | {median:.2f} | {1000 / median:.0f} |")
    found = dict(result["ratios"])
    if "workers" in result:
        found[f"ours over PyTorch, {result['workers']['processes']} worker processes (wall time)"] = result[
            "workers"
        ]["ratio"]
    for what, values in found.items():
        print(f"{what}: {values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f} over rounds)")
    ours = result["milliseconds"].get("ours", result["milliseconds"]["ours with Pillow's decoder"])
    # 64 hosts of 4 chips; 197 TFLOP/s each, of which half would be very good.
    need = 0.5 * 4 * 197e12 / STAGES[name].flops
    have = 1000 / statistics.median(ours)
    print(f"a v5e-256 at half its peak needs {need:.0f} samples/s a host; a core here makes {have:.0f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--images", type=int, default=64, help="different images")
    parser.add_argument("--samples", type=int, default=64, help="samples per turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--workers", type=int, default=2, help="processes of the last comparison; 0: none")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the figures")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine(), "results": {}}
    print(json.dumps(report["machine"], indent=1))
    for name in arguments.stages:
        report["results"][name] = measure(name, arguments)
        print_stage(name, report["results"][name])
    report["machine"]["load_average_after"] = os.getloadavg()
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
