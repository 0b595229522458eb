"""Work that the processes of a job share without computing together: each on its own devices.

Generation is of this kind. The results meet where there is one of everything: in process 0.
"""

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

# A share may take as long as it likes; a process that dies is noticed by its silence.
_PATIENCE = 7 * 24 * 3600


def mine() -> tuple[int, int]:
    """(index, count): this process takes every `count`-th item from `index` on."""
    return jax.process_index(), jax.process_count()


def wait(name: str) -> None:
    """Returns when all processes have come here; `name` must be another at each place and time."""
    everyone = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(f"sg4v {name}", timeout=_PATIENCE, processes=everyone)


def gather(name: str, value: Any) -> list[Any]:
    """What every process gave (JSON-able), in their order, on all of them. `name` as for `wait`."""
    wait(name)
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    rows = rows.reshape(jax.process_count(), -1)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths.reshape(-1), strict=True)]


def interleave(parts: list[list[Any]]) -> list[Any]:
    """The items in their order again, from those that each process took (see `mine`)."""
    items: list[Any] = [None] * sum(map(len, parts))
    for index, part in enumerate(parts):
        items[index :: len(parts)] = part
    return items
