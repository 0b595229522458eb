"""Reading the benchmarks' official files: JSON, JSON lines, tables; what is broken is named, not hidden."""

import csv
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sg4v_jax import atomic

# What pandas, which the official runners read tables with, takes for a missing cell.
_MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
    *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}


def find(root: pathlib.Path, names: Sequence[str], origin: str) -> pathlib.Path:
    """The first of several files that exists.

    Raises:
      FileNotFoundError: none does.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{root}: no {' or '.join(names)}; it is from {origin}")


def read_json(path: pathlib.Path, kind: type) -> Any:
    """A whole JSON file, which must be of a type.

    Raises:
      ValueError: not JSON, or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; fetch it again") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def json_lines(
    path: pathlib.Path, keys: Sequence[str], problems: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line; lines that lack a key or aren't JSON are added to `problems`."""
    # Not `splitlines`: questions may hold what Unicode calls a line break.
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            problems.append(f"{path.name}:{number}: not JSON: {error}")
            continue
        if complaint := lacks(line, keys):
            problems.append(f"{path.name}:{number}: {complaint}")
        else:
            yield number, line


def lacks(record: object, keys: Sequence[str]) -> str:
    """What a record is short of, or ""."""
    if not isinstance(record, dict):
        return f"expected an object, found {type(record).__name__}"
    missing = [key for key in keys if record.get(key) is None]
    return f"without {', '.join(missing)}" if missing else ""


def records(
    entries: Sequence[object], keys: Sequence[str], where: str, problems: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, object) of the entries of a list that have all keys; the others are added to `problems`."""
    for index, entry in enumerate(entries):
        if complaint := lacks(entry, keys):
            problems.append(f"{where}: record {index}: {complaint}")
        else:
            assert isinstance(entry, dict)
            yield index, entry


def read_table(path: pathlib.Path, columns: Sequence[str]) -> list[dict[str, str | None]]:
    """Rows of a tab-separated table, missing cells as None, as pandas' `read_table` finds them.

    Raises:
      ValueError: a column is missing.
    """
    csv.field_size_limit(sys.maxsize)  # Images are cells.
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        absent = [name for name in columns if name not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(
                f"{path}: no column {', '.join(absent)}; found {', '.join(reader.fieldnames or ())}"
            )
        return [
            {name: None if cell in _MISSING else cell for name, cell in row.items() if name is not None}
            for row in reader
        ]


def write_lines(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> pathlib.Path:
    """Writes JSON lines, whole or not at all; returns the path."""
    return write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_json(path: pathlib.Path, value: object, indent: int | None = None) -> pathlib.Path:
    """Writes JSON, whole or not at all; returns the path."""
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=indent))


def write_text(path: pathlib.Path, text: str) -> pathlib.Path:
    """Writes a file, whole or not at all, whatever stops the machine; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a model or a file made of half a surrogate pair has no UTF-8.
    atomic.write(path, text.encode("utf-8", "backslashreplace"))
    return path
