"""From finished shards to what comes next: the LLaVA-format JSON for training, failures, counts, Parquet."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

from sg4v_jax.caption.corpus.claims import Line, Shards, new_file
from sg4v_jax.data.records import IMAGE_PLACEHOLDER
from sg4v_jax.infer.request import Completion

RECORDS, ERRORS, SUMMARY, PARQUET = "captions.json", "errors.jsonl", "summary.json", "captions.parquet"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a finished job did; the counts are of all processes and runs.

    Attributes:
      records: the LLaVA-format JSON.
      images: of the corpus.
      captioned: images with a caption, flagged or not.
      flags: captions by flag (`guards.FLAGS`).
      failed: images without a caption, by kind (`data.defects.KINDS`, or `not_answered`).
      retried: captions that took more than one attempt.
      tokens: generated for the captions that were kept.
    """

    records: pathlib.Path
    images: int
    captioned: int
    flags: dict[str, int]
    failed: dict[str, int]
    retried: int
    tokens: int

    def __str__(self) -> str:
        parts = [f"{self.captioned} of {self.images} captioned"]
        counts = {**self.flags, "retried": self.retried}
        parts += [f"{count} {name}" for name, count in counts.items() if count]
        if self.failed:
            failed = ", ".join(f"{count} {kind}" for kind, count in self.failed.items())
            parts.append(f"{sum(self.failed.values())} failed ({failed})")
        return f"{self.records}: {', '.join(parts)}"


def caption_line(
    name: str, sha256: str, completion: Completion, flags: tuple[str, ...], attempts: int
) -> Line:
    """The line of an image with a caption, and of which bytes it is the caption."""
    probability = completion.log_probability
    return {
        "image": name,
        "image_sha256": sha256,
        "caption": completion.text.strip(),
        "finished": completion.finished,
        "stop": completion.stop,
        "tokens": len(completion.tokens),
        "log_probability": None if probability is None else round(probability, 4),
        "flags": list(flags),
        "attempts": attempts,
    }


def failure_line(name: str, kind: str, error: str) -> Line:
    """The line of an image without a caption."""
    return {"image": name, "error": error, "kind": kind or "unreadable_image"}


def read_shard(path: pathlib.Path) -> list[Line]:
    """The lines of a finished shard, one for each image, in order.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        # Not `str.splitlines`: captions may hold what Unicode calls a line break.
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and run the same command again") from error


def write_outputs(
    shards: Shards, images: int, shard_size: int, prompt: str, *, drop_flagged: bool = False
) -> Summary:
    """Writes `captions.json`, `errors.jsonl` and `summary.json`, each whole or not at all.

    Every process of a job does so when all shards are finished, with the same result.

    Raises:
      ValueError: a shard's file is damaged.
    """
    failed: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    captioned = retried = tokens = 0
    output = shards.output
    with _replacing(output, RECORDS) as records, _replacing(output, ERRORS) as errors:
        separator = "[\n"
        for line in all_lines(shards, images, shard_size):
            if "error" in line:
                failed[line["kind"]] += 1
                errors.write(json.dumps(line, ensure_ascii=False) + "\n")
                continue
            flags.update(line["flags"])
            captioned += bool(line["caption"])
            retried += line["attempts"] > 1
            tokens += line["tokens"]
            # An empty answer is nothing to train on.
            if line["caption"] and not (drop_flagged and line["flags"]):
                records.write(separator + json.dumps(_record(line, prompt), ensure_ascii=False))
                separator = ",\n"
        records.write("[]\n" if separator == "[\n" else "\n]\n")
    summary = Summary(
        output / RECORDS, images, captioned, dict(flags), dict(failed), retried=retried, tokens=tokens
    )
    with _replacing(output, SUMMARY) as file:
        json.dump(dataclasses.asdict(summary) | {"records": RECORDS}, file, indent=1)
        file.write("\n")
    return summary


def write_parquet(shards: Shards, images: int, shard_size: int) -> None:
    """Writes all lines as one Parquet file, `captions.parquet`, a row group for each shard."""
    import pyarrow
    import pyarrow.parquet

    kinds = {
        "image": pyarrow.string(),
        "image_sha256": pyarrow.string(),
        "caption": pyarrow.string(),
        "finished": pyarrow.bool_(),
        "stop": pyarrow.string(),
        "tokens": pyarrow.int32(),
        "log_probability": pyarrow.float64(),
        "flags": pyarrow.list_(pyarrow.string()),
        "attempts": pyarrow.int32(),
        "kind": pyarrow.string(),
        "error": pyarrow.string(),
    }
    schema = pyarrow.schema(list(kinds.items()))
    with (
        _replacing(shards.output, PARQUET) as file,
        pyarrow.parquet.ParquetWriter(file.name, schema) as writer,
    ):
        lines = all_lines(shards, images, shard_size)
        while group := list(itertools.islice(lines, shard_size)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


def all_lines(shards: Shards, images: int, shard_size: int) -> Iterator[Line]:
    """A line for each image of the corpus, in its order, one shard at a time in memory.

    Raises:
      ValueError: a shard's file is damaged.
    """
    for shard in range(shards.count):
        path = shards.path(shard)
        lines, expected = read_shard(path), min(shard_size, images - shard * shard_size)
        if len(lines) != expected:
            raise ValueError(
                f"{path}: {len(lines)} lines, {expected} expected; remove it, and run the same command again"
            )
        yield from lines


def _record(line: Line, prompt: str) -> dict[str, Any]:
    return {
        "id": pathlib.PurePosixPath(line["image"]).stem,
        "image": line["image"],
        "conversations": [
            {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{prompt}"},
            {"from": "gpt", "value": line["caption"]},
        ],
    }


@contextlib.contextmanager
def _replacing(output: pathlib.Path, name: str) -> Iterator[IO[str]]:
    with new_file(output) as file:
        yield file
    os.replace(file.name, output / name)
