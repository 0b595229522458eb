"""A pod from the queue to its deletion: what each command of `launch.tpu_vm` does."""

import concurrent.futures
import pathlib
import secrets
import time
from collections.abc import Sequence

from launch import gcloud
from launch.config import Launch
from launch.follow import WORKER, Outcome, follow
from launch.gcloud import GcloudError, Runner
from launch.source import prepared

_FOLDER = "sg4v"  # Below home, on each worker.
_GONE = ("SUSPENDING", "SUSPENDED")


class PodError(ValueError):
    """The pod isn't in a state for this, and what to do about it."""


class PodGone(PodError):
    """Google took the pod back."""


class Pod:
    """The slices of a launch, by gcloud."""

    def __init__(self, launch: Launch, runner: Runner):
        self.launch, self.runner = launch, runner

    def create(self) -> None:
        """Gets in the queue."""
        self.runner.run(gcloud.create(self.launch))

    def delete(self) -> None:
        """Gives everything back; it costs nothing from then on."""
        self.runner.run(gcloud.delete(self.launch))

    def wait(self) -> None:
        """Waits until all slices are there.

        Raises:
          PodError: it failed, doesn't exist or takes longer than `config.wait.timeout_hours`.
          PodGone: it was preempted.
        """
        name, seen = self.launch.name, ""
        deadline = time.monotonic() + 3600 * self.launch.timeout_hours
        while True:
            state, about = self.runner.state(self.launch)
            if state != seen:
                self.runner.note(f"{name}: {state}")
                seen = state
            if state == "ACTIVE":
                return
            if state in _GONE:
                raise PodGone(f"{name} was taken back ({state}): delete it and create it again, or babysit")
            if state == "ABSENT":
                raise PodError(f"there is no {name} in {self.launch.zone}: create it")
            if state == "FAILED":
                reason = about.get("state", {}).get("failedData", {}).get("error", {}).get("message", "")
                raise PodError(
                    f"{name} failed: {reason or 'no reason given'} (delete it before the next try)"
                )
            if time.monotonic() > deadline:
                raise PodError(
                    f"{name} is still {state} after {self.launch.timeout_hours:g} hours. It stays in the "
                    "queue: wait again (config.wait.timeout_hours), or delete it"
                )
            time.sleep(self.launch.poll_seconds)

    def install(self) -> None:
        """Sets up every worker; where everything is there already, that is quick."""
        install, worker = self.launch.install, pathlib.Path(__file__).with_name("worker.py")
        with prepared(install.source, self.runner) as (requirement, files):
            self._on_workers(["mkdir", "-p", _FOLDER])
            for node in self.launch.nodes:
                self.runner.run(gcloud.scp(self.launch, node, [str(worker), *files], _FOLDER))
            remote = [*WORKER, "install", requirement, f"--python={install.python}"]
            remote += [f"--extras={install.extras}"] if install.extras else []
            remote += [f"--setup={install.setup}"] if install.setup else []
            self._on_workers(remote)

    def start(self) -> str:
        """Starts the command on all workers, where it goes on without us; the id of this job."""
        job = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        variables = [f"--env={name}={value}" for name, value in self.launch.job_env.items()]
        self._on_workers([*WORKER, "start", job, *variables, "--", *self.launch.command])
        return job

    def follow(self, job: str = "", *, to_the_end: bool = True) -> Outcome:
        """Prints the log; see `launch.follow`."""
        return follow(self.launch, self.runner, job, to_the_end=to_the_end)

    def stop(self, grace: float = 60.0) -> None:
        """Asks the job to save and end, as a preemption would; ends it after `grace` seconds."""
        self._on_workers([*WORKER, "stop", f"--grace={grace:g}"])

    def progress(self) -> int:
        """The newest checkpoint's step below the workdir; -1 if there is none."""
        told = self._on_workers([*WORKER, "progress", f"{self.launch.workdir}/checkpoints"])
        steps = [line.rsplit("\t", 1)[-1] for line in told if "\tprogress\t" in line]
        return max(map(int, steps), default=-1)

    def babysit(self) -> Outcome:
        """Runs the command until it exits with 0 on all workers, on one pod after the other.

        Whatever ends it otherwise, the pod is made anew if it is gone, and the same command started
        again. `config.babysit.max_failures` attempts in a row that got no further end this.

        Raises:
          PodError: they did; or a pod could not be had.
        """
        failures, furthest = 0, -1
        while True:
            try:
                self._have()
                self.install()
                reached = self.progress()
                if reached > furthest:
                    failures, furthest = 0, reached
                if failures >= self.launch.max_failures:
                    raise PodError(f"{failures} failures since step {max(furthest, 0)} was saved; giving up")
                self.stop()  # What may be left from before: of a babysitter that was interrupted, too.
                self.runner.note(f"starting from step {max(reached, 0)}, failures so far: {failures}")
                outcome = self.follow(self.start())
                if outcome.done:
                    break
                self.runner.note(str(outcome))
            except (GcloudError, PodGone) as error:
                self.runner.note(str(error))
                if failures >= self.launch.max_failures:
                    raise
            failures += 1
            time.sleep(self.launch.poll_seconds * 2 ** (failures - 1))
        if self.runner.dry_run:
            self.runner.note("after a preemption the same again, from the start, and before it")
            self.delete()
        return outcome

    def _have(self) -> None:
        """A pod that is ready, whatever there is now."""
        while (state := self.runner.state(self.launch)[0]) == "DELETING":
            time.sleep(self.launch.poll_seconds)
        if state in ("FAILED", *_GONE):
            self.delete()
        if self.runner.dry_run or state in ("FAILED", "ABSENT", *_GONE):
            self.create()
        self.wait()

    def _on_workers(self, remote: Sequence[str]) -> list[str]:
        """What an argv says, on all workers of all slices."""
        commands = [gcloud.ssh(self.launch, node, remote) for node in self.launch.nodes]
        if self.runner.dry_run:
            outputs = [self.runner.run(argv) for argv in commands]
        else:
            with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:
                outputs = list(pool.map(self.runner.run, commands))
        return [line for output in outputs for line in output.splitlines()]
