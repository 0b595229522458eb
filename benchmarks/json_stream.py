"""Peak memory and speed of reading a data file as a stream, against `json.load`.

Each way of reading runs in a process of its own, in turns, on a generated file of captions.

  python benchmarks/json_stream.py --megabytes 600 --output=json_stream.json
"""

import argparse
import json
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from typing import Any

READERS = {
    "json.load": "with open(path) as file: records = len(json.load(file))",
    "stream": "records = split_entries(path, 1024).entries",
}
PROGRAM = """
import json, resource, sys, time
from sg4v_jax.data.json_stream import split_entries
path = sys.argv[1]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
{reader}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
figures = {{"records": records, "seconds": seconds, "peak_mb": peak / 1024, "before_mb": before / 1024}}
print(json.dumps(figures))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="JSON to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "captions.json"
        write_captions(path, arguments.megabytes * 10**6)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in READERS}
        for _ in range(arguments.rounds):
            for name, reader in READERS.items():
                runs[name].append(measure(reader, path))
    figures = {
        name: {key: statistics.median(run[key] for run in some) for key in some[0]}
        for name, some in runs.items()
    }
    records = figures["stream"]["records"]
    print(f"{arguments.megabytes} MB, {records:.0f} records, Python {platform.python_version()}")
    print("| reader | peak memory, MB | before reading, MB | seconds |\n|---|--:|--:|--:|")
    for name, figure in figures.items():
        print(f"| {name} | {figure['peak_mb']:.0f} | {figure['before_mb']:.0f} | {figure['seconds']:.1f} |")
    ratio = figures["json.load"]["peak_mb"] / figures["stream"]["peak_mb"]
    slower = figures["stream"]["seconds"] / figures["json.load"]["seconds"]
    print(f"the stream takes 1/{ratio:.0f} of the memory and {slower:.2f} times as long")
    if arguments.output:
        about = {"megabytes": arguments.megabytes, "platform": platform.platform(), "runs": runs}
        pathlib.Path(arguments.output).write_text(json.dumps(about, indent=1))


def write_captions(path: pathlib.Path, size: int) -> None:
    """A JSON array of captions of 144 words, the mean of ShareGPT4V-PT."""
    dice, written, index = random.Random(0), 0, 0
    words = [f"word{i}" for i in range(5000)]
    with open(path, "w") as file:
        while written < size:
            turns = [
                {"from": "human", "value": "<image>\nDescribe."},
                {"from": "gpt", "value": " ".join(dice.choices(words, k=144))},
            ]
            record = {"id": f"{index:012d}", "image": f"sam/images/sa_{index}.jpg", "conversations": turns}
            written += file.write(("," if index else "[") + json.dumps(record))
            index += 1
        file.write("]")


def measure(reader: str, path: pathlib.Path) -> dict[str, Any]:
    """Reads the file in a fresh process."""
    command = [sys.executable, "-c", PROGRAM.format(reader=reader), str(path)]
    figures: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return figures


if __name__ == "__main__":
    main()
