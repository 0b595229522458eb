"""`sg4v report` on generated captions: captions per second and memory, beside reading the file alone."""

import argparse
import collections
import json
import multiprocessing
import pathlib
import re
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sg4v_jax.caption.report.measure import measure
from sg4v_jax.caption.report.report import make_report, write_report
from sg4v_jax.data.json_stream import read_entries

_DIFFERENT = 5000  # captions; nothing in a report gets faster when they come again
SOURCES = ("coco/train2017", "llava/llava_pretrain/images", "sam/images")


def write_captions(path: pathlib.Path, count: int) -> None:
    """LLaVA records with captions of 160 words on average in sentences of 18, with the words of our docs."""
    rng = np.random.default_rng(0)
    docs = sorted((pathlib.Path(__file__).parents[1] / "docs").glob("*.md"))
    counts = collections.Counter(re.findall("[a-z]{2,}", " ".join(map(pathlib.Path.read_text, docs)).lower()))
    vocabulary = np.array([word for word, _ in counts.most_common()])
    chances = 1 / np.arange(1, len(vocabulary) + 1)
    chances /= chances.sum()
    captions = []
    for _ in range(min(count, _DIFFERENT)):
        words = rng.choice(vocabulary, max(20, int(rng.normal(160, 40))), p=chances)
        sentences = (" ".join(words[i : i + 18]).capitalize() for i in range(0, len(words), 18))
        captions.append(". ".join(sentences) + ".")
    with path.open("w") as file:
        for index in range(count):
            record = {
                "id": str(index),
                "image": f"{SOURCES[index % 3]}/{index:09d}.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is this?"},
                    {"from": "gpt", "value": captions[index % _DIFFERENT]},
                ],
            }
            file.write(("[" if not index else ",\n") + json.dumps(record))
        file.write("]")


def read_only(path: pathlib.Path, folder: pathlib.Path) -> None:
    """What any program must do that streams the file."""
    for _ in read_entries(path):
        pass


def report(path: pathlib.Path, folder: pathlib.Path) -> None:
    """The whole report; no image is there, so that pages show names."""
    write_report(make_report([measure([path])], folder), folder / "report.html")


def timed(work: Callable[..., None], *arguments: Any) -> tuple[float, float, float]:
    """(CPU seconds, MiB at the peak, MiB before) of a call in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_run, args=(queue, work, *arguments))
    process.start()
    found: tuple[float, float, float] = queue.get()
    process.join()
    return found


def _run(queue: Any, work: Callable[..., None], *arguments: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.process_time()
    work(*arguments)
    seconds = time.process_time() - start
    queue.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, before))


def main() -> None:
    """Prints one line for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, nargs="+", default=[20_000, 200_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.captions:
            path = pathlib.Path(folder) / "captions.json"
            write_captions(path, count)
            reading, _, _ = timed(read_only, path, pathlib.Path(folder))
            seconds, peak, before = timed(report, path, pathlib.Path(folder))
            print(
                f"{count} captions, {path.stat().st_size / 2**20:.0f} MiB: {count / seconds:.0f} captions/s, "
                f"{seconds / reading:.1f} x reading alone; peak {peak:.0f} MiB, {before:.0f} MiB before"
            )


if __name__ == "__main__":
    main()
