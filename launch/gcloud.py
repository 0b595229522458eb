"""The gcloud commands: each an argv, never a string for a shell on this side."""

import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

from launch.config import Launch

_QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
_TPU_VM = ("gcloud", "compute", "tpus", "tpu-vm")


class GcloudError(ValueError):
    """A gcloud command failed; the message has the command and what it said."""


def create(launch: Launch) -> list[str]:
    """Asks for the slices; they come when there is room."""
    tpu = launch.slice
    nodes = [f"--node-id={launch.name}"]
    if launch.slices > 1:
        nodes = [f"--node-count={launch.slices}", f"--node-prefix={launch.name}"]
    argv = [*_QUEUED, "create", launch.name, *_place(launch), *nodes]
    argv += [f"--accelerator-type={tpu.accelerator_type}", f"--runtime-version={launch.runtime_version}"]
    argv += [f"--{launch.capacity}"] if launch.capacity != "on-demand" else []
    optional = {
        "--valid-until-duration": launch.valid_until,
        "--network": launch.network,
        "--subnetwork": launch.subnetwork,
        "--service-account": launch.service_account,
    }
    argv += [f"{flag}={value}" for flag, value in optional.items() if value]
    argv += ["--internal-ips"] if launch.internal_ips else []
    return [*argv, "--quiet"]


def describe(launch: Launch) -> list[str]:
    """The queued resource, as JSON."""
    return [*_QUEUED, "describe", launch.name, *_place(launch), "--format=json"]


def delete(launch: Launch) -> list[str]:
    """Gives the slices back, or leaves the queue; waits until that is done."""
    return [*_QUEUED, "delete", launch.name, *_place(launch), "--force", "--quiet"]


def ssh(launch: Launch, node: str, remote: Sequence[str]) -> list[str]:
    """Runs an argv on all workers of a slice.

    gcloud starts it again, up to ten times, where the connection fails: whatever it is, a second time
    must do no harm.
    """
    inside = ["--internal-ip"] if launch.internal_ips else []
    # A machine that is gone says nothing; this notices within a minute and a half.
    flags = ["--worker=all", *inside, "--quiet", "--ssh-flag=-oServerAliveInterval=30"]
    flags += [f"--command={shlex.join(remote)}"]
    return [*_TPU_VM, "ssh", node, *_place(launch), *flags]


def scp(launch: Launch, node: str, files: Sequence[str], folder: str) -> list[str]:
    """Copies files to a folder below home on all workers of a slice."""
    inside = ["--internal-ip"] if launch.internal_ips else []
    return [*_TPU_VM, "scp", *files, f"{node}:{folder}/", *_place(launch), "--worker=all", *inside, "--quiet"]


def _place(launch: Launch) -> list[str]:
    project = [f"--project={launch.project}"] if launch.project else []
    return [f"--zone={launch.zone}", *project]


def _pass_on(stream: IO[str], said: list[str]) -> None:
    """What a command has to say, at once, and kept."""
    for line in stream:
        sys.stderr.write(line)
        said.append(line.strip())


class Runner:
    """Runs commands, or with `dry_run` prints what it would run, quoted for a shell."""

    def __init__(self, *, dry_run: bool = False, echo: Callable[[str], None] = print):
        self.dry_run, self.echo = dry_run, echo

    def run(self, argv: Sequence[str]) -> str:
        """Standard output of a command; its standard error goes to ours.

        Raises:
          GcloudError: it failed.
        """
        if self.dry_run:
            self.echo(shlex.join(argv))
            return ""
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except FileNotFoundError as error:
            raise GcloudError(f"{argv[0]} is not installed: docs/launch.md, 'Once'") from error
        said: list[str] = []
        reader = threading.Thread(target=_pass_on, args=(process.stderr, said), daemon=True)
        reader.start()
        assert process.stdout is not None
        output = process.stdout.read()
        reader.join()
        if process.wait():
            last = (said or ["(it said nothing)"])[-1]
            raise GcloudError(f"exit code {process.returncode} of: {shlex.join(argv)}\n{last}")
        return output

    def note(self, text: str) -> None:
        """Something for people; among printed commands a comment."""
        self.echo(f"# {text}" if self.dry_run else text)

    def stream(self, argv: Sequence[str]) -> subprocess.Popen[str]:
        """A running command whose standard output is to be read line by line."""
        return subprocess.Popen(
            argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, errors="replace"
        )

    def state(self, launch: Launch) -> tuple[str, dict[str, Any]]:
        """(state of the queued resource, all about it); ABSENT if there is none.

        States are those of the API: CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE,
        SUSPENDING, SUSPENDED, FAILED, DELETING.
        """
        argv = describe(launch)
        if self.dry_run:
            self.echo(shlex.join(argv))
            return "ACTIVE", {}
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            if "NOT_FOUND" in done.stderr:
                return "ABSENT", {}
            raise GcloudError(f"exit code {done.returncode} of: {shlex.join(argv)}\n{done.stderr.strip()}")
        found = json.loads(done.stdout)
        return found["state"]["state"], found
