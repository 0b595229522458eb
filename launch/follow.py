"""The log of a job, from all workers at once, for as long as it runs and whatever the connection does."""

import dataclasses
import subprocess
import threading
import time

from launch import gcloud
from launch.config import PREEMPTED, Launch
from launch.gcloud import GcloudError, Runner

# The workers' side (launch/worker.py), relative to home.
WORKER = ("python3", "sg4v/worker.py")
# How long a worker may stay out of reach; the job may well be running on.
UNREACHED_SECONDS = 1800.0
# How long the others may run on after one worker has failed: JAX notices within two minutes.
STRAGGLE_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
      exits: by worker ("w3", or "s1w3" with several slices): an exit code, "lost" if the worker was
        shut down, "none" if it knows of no job, "" if it could not be asked.
    """

    exits: dict[str, str]

    @property
    def done(self) -> bool:
        return all(code == "0" for code in self.exits.values())

    @property
    def exit_code(self) -> int:
        """0 if all is done; what says "go on later" if that is what some worker said; else a failure."""
        codes = [int(code) for code in self.exits.values() if code.isdecimal()]
        return 0 if self.done else PREEMPTED if PREEMPTED in codes else next(filter(None, codes), 1)

    def __str__(self) -> str:
        if self.done:
            return "finished on all workers"
        words = {
            "lost": "shut down",
            "none": "no job",
            "": "not reached",
            str(PREEMPTED): "told to stop, saved",
        }
        parts: dict[str, list[str]] = {}
        for name, code in self.exits.items():
            parts.setdefault(words.get(code, f"exit code {code}"), []).append(name)
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items())


def follow(launch: Launch, runner: Runner, job: str = "", *, to_the_end: bool = True) -> Outcome:
    """Prints the log of a job (the last one, by default), each line with its worker's name.

    Args:
      launch, runner: of the pod.
      job: its id.
      to_the_end: stay until it ends; otherwise print what there is.
    """
    slices = [_Slice(launch, runner, job, index, to_the_end) for index in range(launch.slices)]
    for one in slices:
        one.start()
    failed_at = None
    try:
        while any(one.is_alive() for one in slices):
            slices[0].join(0.2)
            time.sleep(0.05)
            failed = any(code not in ("0", None) for one in slices for code in one.exits.values())
            failed_at = failed_at or (time.monotonic() if failed else None)
            if failed_at and time.monotonic() - failed_at > STRAGGLE_SECONDS:
                break
    finally:
        for one in slices:
            one.close()
    names = {(one.index, worker): one for one in slices for worker in range(launch.slice.hosts)}
    return Outcome({one.name_of(worker): one.exits.get(worker, "") for (_, worker), one in names.items()})


class _Slice(threading.Thread):
    """Reads from the workers of one slice.

    Lines carry their number, so that one that comes again, over a new connection, is told once.
    """

    def __init__(self, launch: Launch, runner: Runner, job: str, index: int, to_the_end: bool):
        super().__init__(daemon=True)
        self.launch, self.runner, self.job, self.index = launch, runner, job, index
        self.to_the_end, self.closed = to_the_end, False
        self.exits: dict[int, str] = {}
        self.told = dict.fromkeys(range(launch.slice.hosts), 0)
        self.process: subprocess.Popen[str] | None = None

    def name_of(self, worker: int) -> str:
        return f"s{self.index}w{worker}" if self.launch.slices > 1 else f"w{worker}"

    def run(self) -> None:
        heard = time.monotonic()
        while not self.closed and len(self.exits) < len(self.told):
            before = dict(self.told)
            self._read()
            if self.runner.dry_run or not self.to_the_end:
                return
            if self.closed or len(self.exits) == len(self.told):
                return
            heard = time.monotonic() if self.told != before else heard
            if time.monotonic() - heard > UNREACHED_SECONDS or not self._there():
                return
            self.runner.echo(f"(connection to {self.launch.nodes[self.index]} lost; connecting again)")
            time.sleep(min(30.0, self.launch.poll_seconds))

    def _there(self) -> bool:
        """Whether the slice is, as far as can be told: a connection is lost here as well as there."""
        try:
            return self.runner.state(self.launch)[0] == "ACTIVE"
        except GcloudError:
            return True

    def close(self) -> None:
        """Ends the connection, not the job."""
        self.closed = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def _read(self) -> None:
        remote = [*WORKER, "logs", f"--skip={min(self.told.values())}"]
        remote += [f"--job={self.job}"] if self.job else []
        remote += ["--follow"] if self.to_the_end else []
        argv = gcloud.ssh(self.launch, self.launch.nodes[self.index], remote)
        if self.runner.dry_run:
            self.runner.run(argv)
            self.exits = dict.fromkeys(self.told, "0")
            return
        self.process = self.runner.stream(argv)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._take(line.rstrip("\n"))
        self.process.wait()

    def _take(self, line: str) -> None:
        head, _, rest = line.partition("\t")
        what, _, text = rest.partition("\t")
        if not head.startswith("@") or not head[1:].isdecimal() or int(head[1:]) not in self.told:
            self.runner.echo(line)  # Not of the worker's side: something that ssh has to say.
            return
        worker = int(head[1:])
        if what == "exit":
            self.exits[worker] = text
        elif what.isdecimal() and int(what) > self.told[worker]:
            if int(what) > self.told[worker] + 1:
                self.runner.echo(f"[{self.name_of(worker)}] (lines garbled on the way: see `logs`)")
            self.told[worker] = int(what)
            self.runner.echo(f"[{self.name_of(worker)}] {text}")
