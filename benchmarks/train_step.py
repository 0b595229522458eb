"""Times our train step against the same model in transformers and PyTorch, and packing against padding.

Both libraries get the same weights, the same rows and the same optimizer, and it is checked that their
losses agree before anything is timed. They take turns, so that whatever else the machine does hits both.

  python benchmarks/train_step.py --output=train_step.json
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from sg4v_jax.configs import common
from transformers import LlavaConfig, LlavaForConditionalGeneration

from sg4v_jax import config as config_lib
from sg4v_jax.convert.huggingface import write_config
from sg4v_jax.convert.params import to_params
from sg4v_jax.data.batch import Batch, from_rows, to_devices
from sg4v_jax.data.conversation import training_texts
from sg4v_jax.data.packing import pack
from sg4v_jax.data.records import parse_record, read_records
from sg4v_jax.data.sample import SampleFormat, make_sample
from sg4v_jax.data.tokenizer import train_tokenizer
from sg4v_jax.models.config import CLIP_MEAN, CLIP_STD, ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.train import groups
from sg4v_jax.train.optimizer import make_optimizer
from sg4v_jax.train.step import make_train_step
from sg4v_jax.world import write_world

# The demo's rows: their length, the images and the packer's window.
DEMO = common.base("tiny").data
ROW, SLOTS, WINDOW = DEMO.seq_len, DEMO.image_slots, DEMO.packing_window
LEARNING_RATE, B1, B2, EPS, CLIP_NORM = 1e-3, 0.9, 0.99, 1e-8, 1.0
GROUPS = ((common.ABOVE_BLOCKS, None), (".*", 1.0))
# Losses of the first steps, whose updates differ by the order of float32 sums.
TOLERANCE = 1e-3
# Ids that no text has: `<unk>` marks an image's positions, `</s>` fills rows up.
IMAGE_ID, PADDING_ID = 0, 2

SIZES: dict[str, dict[str, Any]] = {
    "demo": {"vision": common.VISION["tiny"], "text": common.TEXT["tiny"]},
    "larger": {
        "vision": {
            **common.VISION["tiny"],
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_layers": 6,
            "num_heads": 8,
        },
        "text": {
            **common.TEXT["tiny"],
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_layers": 8,
            "num_heads": 8,
            "num_kv_heads": 8,
        },
    },
}

Sample = dict[str, np.ndarray]
# Runs one step and waits for it; the loss.
Step = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Rows:
    """One batch of some form.

    Attributes:
      batch: the rows.
      useful: positions of a batch that aren't padding; the mean over all the samples.
    """

    batch: Batch
    useful: float

    @property
    def positions(self) -> int:
        return int(self.batch.tokens.size)

    @property
    def fill(self) -> float:
        return self.useful / self.positions

    @property
    def shape(self) -> str:
        rows, length = self.batch.tokens.shape
        return f"{rows} x {length}"


# --- Data ------------------------------------------------------------------------------------------


def make_samples(config: ModelConfig, scenes: int) -> dict[str, list[Sample]]:
    """The demo's datasets as training samples, by the stage that learns from them.

    Photographs and text-only records stay out: they are so few that the demo's lengths don't depend
    on them, but in a world as small as this one they would.
    """
    vision = config.vision
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        files = write_world(root, train_scenes=scenes, heldout_scenes=1, seed=0)
        texts = training_texts([files.cap_brief, files.cap_dense, files.sft_mix])
        path = root / "tokenizer.model"
        tokenizer = train_tokenizer(texts, path, config.text.vocab_size, hard_vocab_limit=False)
        samples: dict[str, list[Sample]] = {}
        stages = {"align": files.cap_brief, "captioner": files.cap_dense, "finetune": files.sft_mix}
        for stage, file in stages.items():
            data = config_lib.load(f"configs/{stage}.py:tiny").data
            form = SampleFormat(
                data.template,
                data.aspect,
                data.prompt,
                vision.image_size,
                vision.num_image_tokens,
                ROW,
                SLOTS,
            )
            samples[stage] = []
            for index, line in enumerate(read_records(file)):
                record = parse_record(line, source=file.name, index=index)
                if record.images and record.images[0].startswith("world/"):
                    images = [(files.image_root / name).read_bytes() for name in record.images]
                    samples[stage].append(make_sample(record, images, form, tokenizer))
    return samples


def make_rows(samples: Sequence[Sample], positions: int, *, packing: bool) -> Rows:
    """A batch of about `positions` positions; without packing, rows are as long as the longest sample."""
    longest = max(len(sample["tokens"]) for sample in samples)
    length = ROW if packing else -(-longest // 8) * 8
    size = lambda sample: (len(sample["tokens"]), len(sample["images"]))  # noqa: E731
    slots, window = (SLOTS, WINDOW) if packing else (1, 1)
    rows = list(pack(samples, size, length=length, image_slots=slots, window=window))
    count = max(1, positions // length)
    # The packer's last rows are what was left as the samples ran out; a long run hardly sees any.
    typical = (rows[:-WINDOW] if packing else rows) or rows
    useful = statistics.mean(sum(len(sample["tokens"]) for sample in row) for row in typical)
    batch = from_rows(rows[:count], length, slots, samples[0]["images"].shape[1])
    return Rows(batch, useful * count)


# --- The two libraries -------------------------------------------------------------------------------


def torch_model(config: ModelConfig) -> LlavaForConditionalGeneration:
    """The model in transformers, randomly initialised."""
    fields = write_config(config, "float32")
    fields |= {"image_token_index": IMAGE_ID, "pad_token_id": PADDING_ID}
    fields["text_config"]["vocab_size"] = config.text.vocab_size
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig.from_dict(fields)).float().train()


def torch_step(model: LlavaForConditionalGeneration, batch: Batch) -> Step:
    """Forward, backward, clipping and AdamW on one unpacked batch."""
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(B1, B2), eps=EPS, weight_decay=0.0, fused=True
    )
    inputs = torch_inputs(batch)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return loss.item()

    return step


def torch_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """What transformers wants of a batch with one sample and one image per row."""
    used = np.asarray(batch.segment_ids) > 0
    is_image = np.asarray(batch.image_index) >= 0
    tokens = np.where(used & ~is_image, batch.tokens, np.where(is_image, IMAGE_ID, PADDING_ID))
    labels = np.full(tokens.shape, -100)
    supervised = np.asarray(batch.loss_weights)[:, :-1] > 0
    labels[:, 1:] = np.where(supervised, np.asarray(batch.targets)[:, :-1], -100)
    images = np.asarray(batch.images)[:, 0].astype(np.float32) / 255
    pixels = (images - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return {
        "input_ids": torch.from_numpy(tokens.astype(np.int64)),
        "attention_mask": torch.from_numpy(used.astype(np.int64)),
        "labels": torch.from_numpy(labels.astype(np.int64)),
        "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
    }


def our_step(config: ModelConfig, params: dict[str, Any], batch: Batch) -> Step:
    """Our train step, as `train.loop` builds it."""
    mesh = make_mesh()
    graphdef, shapes, _ = abstract_model(config)
    trainable_shapes, _ = groups.split(shapes, GROUPS)
    optimizer = make_optimizer(
        trainable_shapes,
        GROUPS,
        schedule=lambda step: LEARNING_RATE,
        b1=B1,
        b2=B2,
        eps=EPS,
        weight_decay=0.0,
        clip_norm=CLIP_NORM,
    )
    step_fn = make_train_step(graphdef, optimizer, compute_dtype=jnp.dtype("float32"), loss_chunk=6400)
    train_step = jax.jit(step_fn, donate_argnums=(0, 1))
    # Copies: the step donates its arguments, and the next step function starts from the same values.
    trainable, frozen = groups.split(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params), GROUPS)
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init)(trainable)

    def step() -> float:
        nonlocal trainable, opt_state
        with jax.set_mesh(mesh):
            trainable, opt_state, metrics = train_step(trainable, opt_state, frozen, to_devices(batch, mesh))
            jax.block_until_ready(trainable)
        return float(metrics["loss"])

    return step


# --- Measuring -----------------------------------------------------------------------------------------


def take_turns(steps: dict[str, Step], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each contender in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def measure(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one size of model."""
    config = ModelConfig.from_dict(SIZES[size])
    positions = arguments.rows * ROW
    forms = {
        stage: (make_rows(samples, positions, packing=False), make_rows(samples, positions, packing=True))
        for stage, samples in make_samples(config, arguments.scenes).items()
    }
    padded, packed = forms["captioner"]

    model = torch_model(config)
    state = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    params = to_params(config, state)
    theirs, ours = torch_step(model, padded.batch), our_step(config, params, padded.batch)
    losses = [(theirs(), ours()) for _ in range(arguments.warmup)]
    for step, (their_loss, our_loss) in enumerate(losses):
        # Three steps tell whether model, data and optimizer are the same; then rounding may grow.
        if step < 3 and abs(their_loss - our_loss) > TOLERANCE:
            raise SystemExit(f"{size}: losses differ at step {step}: {their_loss:.6f} and {our_loss:.6f}")
    ours_packed = our_step(config, params, packed.batch)
    for _ in range(arguments.warmup):
        ours_packed()
    steps = {"transformers": theirs, "ours": ours, "ours, packed": ours_packed}
    seconds = take_turns(steps, arguments.rounds, arguments.repeats)
    rows = {"transformers": padded, "ours": padded, "ours, packed": packed}
    return {
        "size": size,
        "parameters": groups.count(params),
        "first_losses": losses[:3],
        "fill": {stage: {"padded": rows[0].fill, "packed": rows[1].fill} for stage, rows in forms.items()},
        "contenders": {name: _figures(seconds[name], rows[name]) for name in steps},
        "ours_over_transformers": _ratio(seconds["transformers"], seconds["ours"]),
        "packed_over_padded": _ratio(
            [s / padded.useful for s in seconds["ours"]],
            [s / packed.useful for s in seconds["ours, packed"]],
        ),
    }


def _figures(seconds: list[float], rows: Rows) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "rows": rows.shape,
        "fill": rows.fill,
        "seconds_per_step": median,
        "seconds_of_rounds": seconds,
        "positions_per_second": rows.positions / median,
        "useful_tokens_per_second": rows.useful / median,
    }


def _ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as fast the second is, within rounds and by the best round of each.

    Other processes only ever add time, so on a shared machine the best rounds tell most.
    """
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "of_best": min(slow) / min(fast),
    }


def machine() -> dict[str, Any]:
    """What this ran on."""
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _print(result: dict[str, Any]) -> None:
    print(f"\n{result['size']}: {result['parameters']:,} parameters")
    print(f"{'':<14}{'rows':>10}{'fill':>7}{'ms/step':>10}{'positions/s':>13}{'useful tokens/s':>17}")
    for name, figures in result["contenders"].items():
        milliseconds = 1000 * figures["seconds_per_step"]
        print(
            f"{name:<14}{figures['rows']:>10}{figures['fill']:>7.2f}{milliseconds:>10.0f}"
            f"{figures['positions_per_second']:>13.0f}{figures['useful_tokens_per_second']:>17.0f}"
        )
    for key in ("ours_over_transformers", "packed_over_padded"):
        ratio = result[key]
        span = f"{ratio['min']:.2f} to {ratio['max']:.2f} over rounds, {ratio['of_best']:.2f} by best rounds"
        print(f"{key.replace('_', ' ')}: {ratio['median']:.2f} ({span})")
    fills = [f"{stage} {f['padded']:.2f} / {f['packed']:.2f}" for stage, f in result["fill"].items()]
    print(f"fill of the demo's rows, padded / packed: {', '.join(fills)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models to time")
    parser.add_argument("--rows", type=int, default=4, help=f"packed rows of {ROW} positions per batch")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--repeats", type=int, default=2, help="steps per turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first turn")
    parser.add_argument("--scenes", type=int, default=200, help="scenes that the lengths come from")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the figures")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    report: dict[str, Any] = {"machine": machine(), "results": []}
    print(json.dumps(report["machine"], indent=1))
    for size in arguments.sizes:
        report["results"].append(measure(size, arguments))
        _print(report["results"][-1])
    report["machine"]["load_average_after"] = os.getloadavg()
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
