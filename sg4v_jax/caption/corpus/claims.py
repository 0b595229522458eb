"""Who works on which shard: files in a directory that all processes share, and nothing else.

A finished shard is one file, `shards/captions-00007-of-01200.jsonl`, that appears whole. A shard under
way is a claim, `work/00007.0.jsonl`: the lease, whose modification time is its heartbeat, and at the same
time the journal of what its owner has so far. Only its owner writes to it. Whoever finds the owner dead
creates the claim of the next number, `work/00007.1.jsonl`; linking a file to a new name succeeds for one
process only, and there never is a moment without an owner. What earlier owners left is read, not done again.

An owner that was only slow and finds its claim taken stops working on the shard. Should both come to the
end, the first to link the finished file into place has won: results can be neither mixed nor doubled.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import pathlib
import socket
import tempfile
import threading
import uuid
from collections.abc import Collection, Iterable, Iterator
from typing import IO, Any

log = logging.getLogger(__name__)

SHARDS, WORK = "shards", "work"
Line = dict[str, Any]


class Claim:
    """A shard that this process works on.

    Attributes:
      shard: its number.
      found: what earlier owners left in their journals.
      lost: somebody took the shard over, or finished it.
    """

    def __init__(self, shard: int, path: pathlib.Path, descriptor: int):
        self.shard, self.path = shard, path
        self.found: list[Line] = []
        self.lost = False
        self._descriptor = descriptor

    def append(self, line: Line) -> None:
        """Adds a line to the journal; it survives a kill (of this process, not of the machine).

        Raises:
          OSError: it could not be written; the journal has whole lines all the same.
        """
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self.path))
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def beat(self) -> None:
        """Says that the owner is alive, and looks whether it still is the owner."""
        following = self.path.with_name(f"{self.shard:05d}.{_numbers(self.path)[1] + 1}.jsonl")
        try:
            os.utime(self.path)
            self.lost = following.exists()
        except FileNotFoundError:
            self.lost = True
        except OSError as error:  # A file system may come back.
            log.warning("%s: no heartbeat: %s", self.path, error)

    def release(self) -> None:
        """Lets others go on at once; what there is stays."""
        with contextlib.suppress(OSError):
            os.utime(self.path, (0, 0))
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


@dataclasses.dataclass
class Shards:
    """The shards of a job in their directory.

    Attributes:
      output: the directory.
      count: of shards.
      lease_seconds: without a heartbeat for this long, this process may be taken for dead.
    """

    output: pathlib.Path
    count: int
    lease_seconds: float = 120.0

    def __post_init__(self) -> None:
        self._work, self._finished = self.output / WORK, self.output / SHARDS
        for folder in (self._work, self._finished):
            folder.mkdir(parents=True, exist_ok=True)
        self._claims: dict[int, Claim] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def path(self, shard: int) -> pathlib.Path:
        """The file of a finished shard."""
        return self._finished / f"captions-{shard:05d}-of-{self.count:05d}.jsonl"

    def finished(self) -> set[int]:
        """Shards whose file is there."""
        suffix = f"-of-{self.count:05d}.jsonl"
        names = (name for name in os.listdir(self._finished) if name.endswith(suffix))
        return {int(name.removeprefix("captions-").removesuffix(suffix)) for name in names}

    def held(self) -> list[int]:
        """Shards that this process works on."""
        return list(self._claims)

    def claim(self, wanted: Iterable[int], again: Collection[int] = ()) -> Claim | None:
        """Takes the first of some shards that nobody alive works on; None if there is none.

        Args:
          wanted: numbers of shards.
          again: those among them that may be finished.
        """
        under_way = self._under_way()
        now = self._now()
        for shard in wanted:
            journals = under_way.get(shard, [])
            if shard in self._claims or (journals and self._alive(journals[-1], now)):
                continue
            number = _numbers(journals[-1])[1] + 1 if journals else 0
            path = self._work / f"{shard:05d}.{number}.jsonl"
            # With its first line from the start: whoever sees it knows whose it is.
            with new_file(self.output) as file:
                said = {"owner": owner(), "seconds": self.lease_seconds}
                file.write(json.dumps(said) + "\n")
            descriptor = os.open(file.name, os.O_WRONLY | os.O_APPEND)
            if not put_new(file.name, path):
                os.close(descriptor)
                continue  # Somebody was quicker.
            claim = Claim(shard, path, descriptor)
            if shard not in again and self.path(shard).exists():  # Finished since it was looked for.
                os.close(descriptor)
                path.unlink(missing_ok=True)
                continue
            for journal in journals:
                with contextlib.suppress(FileNotFoundError):  # The one taken for dead is just finishing.
                    claim.found += [line for line in _lines(journal) if "index" in line]
            with self._lock:
                self._claims[shard] = claim
            return claim
        return None

    def finish(self, claim: Claim, lines: Iterable[Line], replace: bool = False) -> bool:
        """Writes a shard's file; False if somebody else had done so.

        Args:
          claim: of the shard.
          lines: all of it, in order.
          replace: whether an earlier file of the shard gives way.
        """
        path = self.path(claim.shard)
        with new_file(self.output) as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        first = True
        if replace:
            os.replace(file.name, path)
        else:
            first = put_new(file.name, path)
        with self._lock:
            self._claims.pop(claim.shard, None)
        claim.release()
        for journal in self._under_way().get(claim.shard, []):
            journal.unlink(missing_ok=True)
        return first

    def abandon(self, claim: Claim) -> None:
        """Stops working on a shard that somebody else took."""
        with self._lock:
            self._claims.pop(claim.shard, None)
        claim.release()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Keeps this process's claims alive meanwhile, and releases them at the end."""
        heart = threading.Thread(target=self._beat, name="lease heartbeat", daemon=True)
        heart.start()
        try:
            yield
        finally:
            self._stopped.set()
            heart.join()
            for claim in self._claims.values():
                claim.release()

    def clean(self) -> None:
        """Removes what killed processes left of shards that are finished."""
        finished, now = self.finished(), self._now()
        for path in self._work.glob("*.jsonl"):
            if _numbers(path)[0] in finished and not self._alive(path, now):
                path.unlink(missing_ok=True)
        for path in self._work.glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime >= self.lease_seconds:
                    path.unlink()

    def _beat(self) -> None:
        while not self._stopped.wait(max(self.lease_seconds / 5, 0.05)):
            with self._lock:
                claims = list(self._claims.values())
            for claim in claims:
                claim.beat()

    def _under_way(self) -> dict[int, list[pathlib.Path]]:
        """Claims by shard, the last of them the one that counts."""
        claims: dict[int, list[pathlib.Path]] = {}
        for path in sorted(self._work.glob("*.jsonl"), key=_numbers):
            claims.setdefault(_numbers(path)[0], []).append(path)
        return claims

    def _alive(self, path: pathlib.Path, now: float) -> bool:
        try:
            silent = now - path.stat().st_mtime
            with path.open("rb") as file:
                said = json.loads(file.readline())
        except FileNotFoundError:
            return True  # It was just finished.
        except ValueError:  # The machine went down: the file is there, not what was in it.
            return silent < self.lease_seconds
        return silent < said["seconds"] and not is_dead(said["owner"])

    def _now(self) -> float:
        """The time by the clock that modification times are taken from, which may be another machine's."""
        clock = self._work / "clock"
        clock.touch()
        return clock.stat().st_mtime


@contextlib.contextmanager
def new_file(output: pathlib.Path) -> Iterator[IO[str]]:
    """A file below a job's directory that will be given its place when it is whole and on disk."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=output / WORK, suffix=".tmp", delete=False
    ) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
        except BaseException:
            os.unlink(file.name)
            raise


def put_new(temporary: str | os.PathLike[str], path: pathlib.Path) -> bool:
    """Gives a finished file its name, unless there is one of that name; False if there was."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without links: two processes in the same instant both think that they were first.
        if path.exists():
            return False
        os.replace(temporary, path)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return True


def owner() -> dict[str, Any]:
    """This process, so that others on the same machine can tell when it is gone."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _started(pid),
        "id": uuid.uuid4().hex,
    }


def is_dead(process: dict[str, Any]) -> bool:
    """Whether an owner is certainly gone; of another machine's, nobody can tell."""
    if not process.get("machine") or process["machine"] != _machine():
        return False
    return _started(process["pid"]) != process["started"]


@functools.cache
def _machine() -> str:
    """Tells machines, and containers with process numbers of their own, apart; "" where there is no /proc."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the system's own count; "" for one that is not running."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _numbers(path: pathlib.Path) -> tuple[int, int]:
    """(shard, number of the claim) of a claim's name."""
    shard, number, _ = path.name.split(".")
    return int(shard), int(number)


def _lines(path: pathlib.Path) -> list[Line]:
    """Whole lines of a journal; what a kill cut off is left out, and so done again."""
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            log.warning("%s: a damaged line; what was in it is done again", path)
    return lines
