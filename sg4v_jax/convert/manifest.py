"""What the files of a checkpoint should be: a list with sizes and checksums, made when they are written.

Orbax's commit tells a finished checkpoint from an unfinished one. It doesn't see what happens to files
afterwards: cut, lost, a bit flipped. Those read as an error from deep inside, or as other weights.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

ITEM = "manifest"
FILE = "files.json"
_CHUNK_BYTES = 1 << 24
_SMALL_BYTES = 1 << 20
_THREADS = 4


class DamagedCheckpoint(ValueError):
    """Files of a checkpoint are not as they were written."""

    def __init__(self, what: str, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n  ".join([f"{what}:", *problems]))


class ManifestHandler(ocp.AsyncCheckpointHandler):
    """Writes the list after all other items are complete, and before the checkpoint gets its name.

    It has to be the last of the items: Orbax finalizes them in their order, on the first process.
    """

    async def async_save(self, directory: epath.Path, args: Any) -> None:
        """Nothing yet."""

    def save(self, directory: epath.Path, args: Any) -> None:
        """Nothing yet."""

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        """Nothing; see `problems`."""

    def finalize(self, directory: epath.Path) -> None:
        """Lists the files of all items. `directory` is this item's, within the checkpoint's."""
        own = pathlib.Path(directory)
        write(own.parent, own)


@ocp.args.register_with_handler(ManifestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ManifestArgs(ocp.args.CheckpointArgs):
    """Asks for a manifest."""


def write(checkpoint: pathlib.Path, own: pathlib.Path) -> None:
    """Lists all files of the items of a checkpoint.

    Args:
      checkpoint: directory with a subdirectory for each item.
      own: the one for the list.
    """
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.glob("*/**/*")}
    files = {name: path for name, path in files.items() if path.is_file() and own not in path.parents}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda path: [path.stat().st_size, _checksum(path)], files.values())
        listed = dict(zip(files, found, strict=True))
    own.mkdir(exist_ok=True)
    (own / FILE).write_text(json.dumps({"files": listed, "checksum": _checksum_of(listed)}))


def has_manifest(checkpoint: pathlib.Path) -> bool:
    """Whether the checkpoint has a list at all: converted models don't."""
    return (checkpoint / ITEM).exists()


def problems(
    checkpoint: pathlib.Path,
    *,
    items: Collection[str] | None = None,
    checksums: bool = True,
    share: tuple[int, int] = (0, 1),
) -> list[str]:
    """What is wrong with a checkpoint's files; nothing if they are as they were written.

    Args:
      checkpoint: its directory.
      items: only files of these; all by default.
      checksums: whether to read all files; otherwise of large ones only the size is looked at.
      share: (index, count) of the processes that each read their part of the files.
    """
    path = checkpoint / ITEM / FILE
    try:
        content = json.loads(path.read_text())
        listed, checksum = content["files"], content["checksum"]
    except FileNotFoundError:
        return [f"{path} does not exist: the checkpoint is not complete"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path} can't be read: {error!r}"]
    if _checksum_of(listed) != checksum:
        return [f"{path} is damaged: its checksum is another one"]
    names = sorted(listed, key=lambda name: (-listed[name][0], name))
    mine = [name for name in names if items is None or name.partition("/")[0] in items][share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(
            lambda name: _problem(
                checkpoint / name, *listed[name], read=checksums or listed[name][0] <= _SMALL_BYTES
            ),
            mine,
        )
        return [problem for problem in found if problem]


def _problem(path: pathlib.Path, size: int, checksum: str, *, read: bool) -> str:
    try:
        if (found := path.stat().st_size) != size:
            return f"{path} has {found:,} bytes instead of {size:,}"
        if read and _checksum(path) != checksum:
            return f"{path} is damaged: its checksum is another one"
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    return ""


def _checksum(path: pathlib.Path) -> str:
    """CRC-32: against accidents, not against anybody; it reads as fast as most disks."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _checksum_of(listed: Any) -> str:
    return f"{zlib.crc32(json.dumps(listed, sort_keys=True).encode()):08x}"
