"""Batch APIs: the same requests as files to upload, the same results from the files that come back.

A request that is in a file counts as asked until its answer is read or the file is forgotten, so
neither another file nor the endpoint gets it meanwhile.
"""

import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sg4v_jax.caption.collect.collection import Collection
from sg4v_jax.caption.collect.endpoint import EndpointError, completion_of, error_of_status
from sg4v_jax.caption.collect.request import Completion, Item, body
from sg4v_jax.caption.collect.scan import read_image

FOLDER = "batch"
# The limits of OpenAI's Batch API.
MAX_BYTES, MAX_REQUESTS = 200_000_000, 50_000
_URL = "/v1/chat/completions"
_LOST = "the batch file was given up"


def write_batch(
    collection: Collection,
    *,
    max_bytes: int = MAX_BYTES,
    max_requests: int = MAX_REQUESTS,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[pathlib.Path]:
    """Writes request files for everything that is open, within the budget.

    Args:
      collection: what to ask.
      max_bytes: of one file.
      max_requests: in one file.
      progress: wraps the iteration over items.

    Returns:
      The new files, to upload.

    Raises:
      ValueError: one request alone is larger than a file may be.
    """
    folder = collection.output / FOLDER
    folder.mkdir(exist_ok=True)
    shard = _Shard(collection, folder)
    written = []
    for item in progress(collection.todo()):
        cost = collection.ledger.max_cost(item, collection.settings.request)
        if not collection.ledger.affords(shard.cost + cost):
            break
        line = _line(collection, item)
        if len(line) > max_bytes:
            raise ValueError(
                f"{item.path}: a request of {len(line)} bytes, more than a file of {max_bytes} may hold; "
                "give a smaller --max-image-side"
            )
        if shard.size + len(line) > max_bytes or len(shard.costs) == max_requests:
            written.append(shard.close())
            shard = _Shard(collection, folder)
        shard.add(item, line, cost)
    if shard.costs:
        written.append(shard.close())
    else:
        shard.discard()
    return written


def read_batch(collection: Collection, files: Sequence[str | os.PathLike[str]]) -> Counter[str]:
    """Reads output and error files, in any order and as often as you like.

    Returns:
      Lines by what they were: "answers", "errors", "read before", "unknown" (not of these images, prompts
      and model).

    Raises:
      ValueError: a line is damaged; all others of the file are in.
    """
    counts: Counter[str] = Counter()
    damaged: list[str] = []
    for file in files:
        for where, line in _lines(file):
            if line is None:
                damaged.append(where)
            else:
                counts[_take(collection, line)] += 1
    if damaged:
        raise ValueError(
            f"{damaged[0]}: cut off, or no batch output (so are {len(damaged) - 1} more); all other lines "
            "are in: download the file again and read it once more"
        )
    return counts


def forget_batch(collection: Collection, files: Sequence[str | os.PathLike[str]]) -> int:
    """Gives up request files that never ran, so that their requests can be asked again.

    Returns:
      The number of requests that were waited for.
    """
    forgotten = 0
    for file in files:
        for where, line in _lines(file):
            if line is None:
                raise ValueError(f"{where}: not a request file")
            item = _item(collection, line)
            if item and collection.ledger.state(item.id).waiting == line["custom_id"]:
                collection.ledger.error(item, EndpointError("transient", _LOST))
                forgotten += 1
    return forgotten


class _Shard:
    """A request file in the making. It takes its name when it is whole, then the ledger hears of it.

    After a kill in between, the same file is written again: the ledger gives it its number.
    """

    def __init__(self, collection: Collection, folder: pathlib.Path):
        self._ledger = collection.ledger
        self._path = folder / f"requests-{len(collection.ledger.batch_files):05d}.jsonl"
        self._temporary = self._path.with_suffix(".tmp")
        self._file = self._temporary.open("wb")
        self.size, self.cost = 0, 0.0
        self.costs: dict[str, float] = {}

    def add(self, item: Item, line: bytes, cost: float) -> None:
        self._file.write(line)
        self.size += len(line)
        self.cost += cost
        self.costs[_custom_id(self._ledger, item)] = cost

    def close(self) -> pathlib.Path:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        self._ledger.batch(self._path.name, self.costs)
        return self._path

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink()


def _line(collection: Collection, item: Item) -> bytes:
    state = collection.ledger.state(item.id)
    image = read_image(collection.root, item.path, item.image_sha256)
    request = {
        "custom_id": _custom_id(collection.ledger, item),
        "method": "POST",
        "url": _URL,
        "body": body(item, image, collection.settings.request, state.answers),
    }
    return json.dumps(request).encode() + b"\n"


def _custom_id(ledger: Any, item: Item) -> str:
    """Unique for each time that an item is asked, and at most 64 characters long."""
    return f"{item.id}-{ledger.state(item.id).asks}"


def _lines(file: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(file and line, object with a custom_id) of each line; None for a damaged one."""
    with pathlib.Path(file).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
                good = isinstance(found, dict) and isinstance(found.get("custom_id"), str)
            except ValueError:
                good = False
            yield f"{os.fspath(file)}: line {number}", found if good else None


def _item(collection: Collection, line: dict[str, Any]) -> Item | None:
    return collection.items.get(line["custom_id"].rpartition("-")[0])


def _take(collection: Collection, line: dict[str, Any]) -> str:
    """Puts one line into the ledger; returns what it was."""
    item, custom_id = _item(collection, line), line["custom_id"]
    if item is None:
        return "unknown"
    state = collection.ledger.state(item.id)
    if custom_id in state.read:
        return "read before"
    try:
        collection.record(item, _completion(line), custom_id)
        return "answers"
    except EndpointError as error:
        if state.waiting != custom_id:
            return "read before"
        collection.ledger.error(item, error)
        return "errors"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _completion(line: dict[str, Any]) -> Completion:
    """The answer in a line of an output file; those of error files have none."""
    response = _object(line.get("response"))
    status, content = response.get("status_code"), _object(response.get("body"))
    if status == 200:
        return completion_of(content)
    if isinstance(status, int):
        raise error_of_status(status, content, {})
    # It expired, or the whole batch was cancelled: there was no request.
    error = _object(line.get("error"))
    raise EndpointError("transient", f"batch: {error.get('code')}: {error.get('message')}")
