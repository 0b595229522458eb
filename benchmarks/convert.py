"""Converting a checkpoint of real size: peak memory, and speed against `cp` of the same bytes.

    python benchmarks/convert.py --size 7b --workdir /big/disk

Writes a random checkpoint in share4v's layout, converts it share4v -> run -> hf -> share4v with the
`sg4v` command, and compares the last with the first. Every source is copied with `cp` right before it
is converted; both start with the source out of the page cache and end with the target on disk.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

from sg4v_jax.convert.checkpoint import Checkpoint
from sg4v_jax.convert.load import convert, open_checkpoint
from sg4v_jax.convert.names import entries
from sg4v_jax.convert.params import param_shapes, param_tensor
from sg4v_jax.convert.tensors import DTYPES, Tensor
from sg4v_jax.models.config import ModelConfig, TextConfig

SIZES = {
    "7b": ModelConfig(),
    "13b": ModelConfig(
        text=TextConfig(
            hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40
        )
    ),
    "small": ModelConfig(text=TextConfig(num_layers=2)),
}
GIB = 2**30


def random_checkpoint(config: ModelConfig) -> Checkpoint:
    """A model of random bfloat16 weights, each made when it is read."""
    shapes = param_shapes(config)
    tensors = {}
    for number, entry in enumerate(entries(config)):
        shape = shapes[entry.path]
        shapes_only = param_tensor(entry, shape, DTYPES["bfloat16"], None)
        tensors[entry.key] = Tensor(
            entry.key, shapes_only.shape, shapes_only.dtype, "random", _RandomBits(number, shapes_only.shape)
        )
    return Checkpoint(pathlib.Path("random"), "memory", tensors, config.vision, config.text, config.projector)


class _RandomBits:
    """Reads as random bits without the exponents of NaN and infinity."""

    def __init__(self, seed: int, shape: tuple[int, ...]):
        self.seed, self.shape = seed, shape

    def __call__(self) -> np.ndarray:
        bits = np.random.default_rng(self.seed).integers(0, 2**16, self.shape, np.uint16)
        bits &= 0xBFFF
        return bits.view(DTYPES["bfloat16"])


def files(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def forget(directory: pathlib.Path) -> None:
    """Drops a directory's files from the page cache."""
    for path in files(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident GiB) of a command and the `sync` after it."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    subprocess.run(["sync"], check=True)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.monotonic() - start, usage.ru_maxrss / 2**20


def measure(source: pathlib.Path, target: pathlib.Path, layout: str) -> dict[str, float | str]:
    """Copies `source`, then converts it to `target`."""
    size = sum(path.stat().st_size for path in files(source))
    copy = target.with_name("copy")
    forget(source)
    copied, _ = timed(["cp", "-r", str(source), str(copy)])
    shutil.rmtree(copy)
    forget(source)
    command = [sys.executable, "-m", "sg4v_jax", "convert", "--model", str(source), "--output", str(target)]
    converted, peak = timed([*command, "--to", layout])
    largest = max(path.stat().st_size for path in (*files(source), *files(target)))
    return {
        "conversion": f"{source.name} -> {target.name}",
        "GB": size / 1e9,
        "cp MB/s": size / copied / 1e6,
        "convert MB/s": size / converted / 1e6,
        "of cp": copied / converted,
        "peak GiB": peak,
        "largest file GiB": largest / GIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="twice the model must fit there")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows there too")
    arguments = parser.parse_args()
    work = arguments.workdir / f"convert-{arguments.size}"
    first = work / "share4v"
    convert(random_checkpoint(SIZES[arguments.size]), first, layout="share4v", overwrite=True)
    rows = []
    source = first
    for layout, name in (("run", "run"), ("hf", "hf"), ("share4v", "again")):
        target = work / name
        shutil.rmtree(target, ignore_errors=True)
        rows.append(measure(source, target, layout))
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(source)  # The disk need not hold more than two.
        source = target
    original = random_checkpoint(SIZES[arguments.size]).tensors
    again = open_checkpoint(source).tensors
    same = all(tensor.read().tobytes() == again[key].read().tobytes() for key, tensor in original.items())
    print(f"bit-identical after the round trip: {same}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    shutil.rmtree(work)
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
