"""A strict gcloud: knows the few commands that `launch` needs, and refuses whatever else there is.

Flags and their rules are those of `gcloud 528.0.0 compute tpus {queued-resources,tpu-vm}`. Queued
resources live in the folder $FAKE_GCLOUD; each `describe` takes one a state further. A worker is a
folder that is its home, and `ssh` runs commands there, with the environment of a TPU host. What is
suspended or deleted loses its workers' processes and disks.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# --accelerator-type: (workers, runtime versions that know it).
ACCELERATORS = {
    "v4-8": (1, "tpu-ubuntu2204-base"),
    "v4-16": (2, "tpu-ubuntu2204-base"),
    "v5litepod-16": (4, "v2-alpha-tpuv5-lite"),
    "v5p-8": (1, "v2-alpha-tpuv5"),
    "v6e-8": (1, "v2-alpha-tpuv6e"),
}
ZONES = {"us-central2-b", "us-west4-a", "us-east5-a"}
NAME = r"[a-z][-a-z0-9]{0,61}[a-z0-9]"
ANY, FLAG = ".+", None  # A flag without a value.
PLACE = {"--zone": "|".join(ZONES), "--project": "[a-z][-a-z0-9]+", "--quiet": FLAG}
QUEUED = ("compute", "tpus", "queued-resources")
TPU_VM = ("compute", "tpus", "tpu-vm")

# Flags with what their values match; positionals; flags that are needed; groups of which exactly one is.
COMMANDS: dict[
    tuple[str, ...], tuple[dict[str, str | None], str, tuple[str, ...], tuple[tuple[str, ...], ...]]
] = {
    (*QUEUED, "create"): (
        PLACE
        | {
            "--node-id": NAME,
            "--node-count": "[2-9]|[1-9][0-9]+",
            "--node-prefix": NAME,
            "--accelerator-type": "|".join(ACCELERATORS),
            "--runtime-version": ANY,
            "--spot": FLAG,
            "--reserved": FLAG,
            "--valid-until-duration": r"\d+[smhd]",
            "--network": ANY,
            "--subnetwork": ANY,
            "--service-account": r"[^@]+@[^@]+",
            "--internal-ips": FLAG,
        },
        NAME,
        ("--zone", "--accelerator-type", "--runtime-version"),
        (("--node-id", "--node-count"),),
    ),
    (*QUEUED, "describe"): (PLACE | {"--format": "json"}, NAME, ("--zone",), ()),
    (*QUEUED, "delete"): (PLACE | {"--force": FLAG}, NAME, ("--zone",), ()),
    (*TPU_VM, "ssh"): (
        PLACE
        | {"--worker": r"all|\d+", "--command": r"[\s\S]+", "--ssh-flag": "-o.+", "--internal-ip": FLAG},
        NAME,
        ("--zone", "--command"),
        (),
    ),
    (*TPU_VM, "scp"): (PLACE | {"--worker": r"all|\d+", "--internal-ip": FLAG}, ANY, ("--zone",), ()),
}


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    raise SystemExit(code)


def parse(argv: list[str], *, any_slice: bool = False) -> tuple[tuple[str, ...], list[str], dict[str, str]]:
    """(command, positionals, flags); ends the process on anything that gcloud would not take.

    Slices larger than this machine could play are refused, unless `any_slice`.
    """
    command = tuple(argv[:4])
    if command not in COMMANDS:
        fail(f"Invalid choice: {' '.join(argv[:4])!r}")
    allowed, positional, needed, groups = COMMANDS[command]
    positionals, flags = [], {}
    for argument in argv[4:]:
        if not argument.startswith("-"):
            positionals.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if name not in allowed:
            fail(f"unrecognized arguments: {argument}")
        pattern = allowed[name]
        if name == "--accelerator-type" and any_slice:
            pattern = r"(v4|v5litepod|v5p|v6e)-\d+"
        if (pattern is FLAG) == bool(equals) or (pattern is not None and not re.fullmatch(pattern, value)):
            fail(f"argument {name}: Invalid value {value!r}")
        if name in flags:
            fail(f"argument {name}: given twice")
        flags[name] = value
    for name in needed:
        if name not in flags:
            fail(f"argument {name}: Must be specified.")
    for group in groups:
        if sum(name in flags for name in group) != 1:
            fail(f"Exactly one of ({' | '.join(group)}) must be specified.")
    if "--node-prefix" in flags and "--node-count" not in flags:
        fail("argument --node-count: Must be specified.")
    if "--spot" in flags and "--reserved" in flags:
        fail("INVALID_ARGUMENT: both spot and reserved", 1)
    if command[-1] != "scp" and (len(positionals) != 1 or not re.fullmatch(positional, positionals[0])):
        fail(f"bad names: {positionals}")
    return command, positionals, flags


class Cloud:
    """What lies in $FAKE_GCLOUD."""

    def __init__(self, root: pathlib.Path):
        self.root = root

    @contextlib.contextmanager
    def resource(self, name: str) -> Iterator[dict[str, Any]]:
        """A queued resource, locked; what is changed is kept, what is emptied is gone."""
        self.root.mkdir(exist_ok=True)
        file = self.root / f"{name}.json"
        with open(self.root / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            resource = json.loads(file.read_text()) if file.exists() else {}
            yield resource
            if resource:
                file.write_text(json.dumps(resource))
            else:
                file.unlink(missing_ok=True)

    def homes(self, node: str) -> list[pathlib.Path]:
        return sorted((self.root / "nodes" / node).glob("worker-*"))

    def create(self, name: str, flags: dict[str, str]) -> None:
        workers, runtime = ACCELERATORS[flags["--accelerator-type"]]
        if flags["--runtime-version"] != runtime:
            fail(
                f"INVALID_ARGUMENT: {flags['--runtime-version']} is not for {flags['--accelerator-type']}", 1
            )
        with self.resource(name) as resource:
            if resource:
                fail(f"ALREADY_EXISTS: Resource '{name}' already exists", 1)
            prefix = flags.get("--node-prefix", name)
            count = int(flags.get("--node-count", 0))
            nodes = [f"{prefix}-{i}" for i in range(count)] or [flags["--node-id"]]
            # A test may have said what is to become of the next ones.
            fates = self.root / "fates"
            todo = json.loads(fates.read_text()) if fates.exists() else []
            fate = todo.pop(0) if todo else ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
            fates.write_text(json.dumps(todo))
            resource.update(zone=flags["--zone"], state="CREATING", fate=fate, nodes=nodes, workers=workers)

    def describe(self, name: str, zone: str) -> None:
        with self.resource(name) as resource:
            if not resource or resource["zone"] != zone:
                fail(f"NOT_FOUND: Resource '{name}' was not found", 1)
            if resource["fate"]:
                self.become(resource, resource["fate"].pop(0))
            state: dict[str, Any] = {"state": resource["state"]}
            if resource["state"] == "FAILED":
                state["failedData"] = {"error": {"code": 8, "message": "Quota limit 'TPUV4' exceeded."}}
        print(json.dumps({"name": name, "state": state}))

    def become(self, resource: dict[str, Any], state: str) -> None:
        if state == "ACTIVE":
            with socket.socket() as free:
                free.bind(("localhost", 0))
                resource["port"] = free.getsockname()[1]
            for node in resource["nodes"]:
                for worker in range(resource["workers"]):
                    (self.root / "nodes" / node / f"worker-{worker}").mkdir(parents=True)
        elif resource["state"] == "ACTIVE":
            self.take_away(resource)
        resource["state"] = state

    def take_away(self, resource: dict[str, Any]) -> None:
        """Ends what runs on the workers, and their disks."""
        for node in resource["nodes"]:
            for home in self.homes(node):
                for pid in supervisors(home):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
            shutil.rmtree(self.root / "nodes" / node, ignore_errors=True)

    def delete(self, name: str, zone: str, force: bool) -> None:
        with self.resource(name) as resource:
            if not resource or resource["zone"] != zone:
                fail(f"NOT_FOUND: Resource '{name}' was not found", 1)
            if not force:
                fail("FAILED_PRECONDITION: has nodes; use --force", 1)
            self.take_away(resource)
            resource.clear()

    def on_workers(self, node: str, flags: dict[str, str], act: Callable[..., Any]) -> None:
        """Runs `act(home, environment)` for the workers that --worker means; exits as gcloud does."""
        resources = [json.loads(file.read_text()) for file in self.root.glob("*.json")]
        found = [resource for resource in resources if node in resource["nodes"]]
        if not found or found[0]["zone"] != flags["--zone"]:
            fail(f"NOT_FOUND: Resource '{node}' was not found", 1)
        if found[0]["state"] != "ACTIVE":
            fail(f"This TPU has state {found[0]['state']}", 1)
        homes = self.homes(node)
        which = (
            range(len(homes)) if flags.get("--worker", "0") == "all" else [int(flags.get("--worker", "0"))]
        )
        running = [act(homes[worker], environment(found[0], node, worker)) for worker in which]
        codes = [process.wait() for process in running]
        raise SystemExit(next((code if code > 0 else 255 for code in codes if code), 0))

    def ssh(self, node: str, flags: dict[str, str]) -> None:
        drops = self.root / "drops"  # How many of the next connections to a log break off.
        left = int(drops.read_text()) if drops.exists() else 0
        dropped = left > 0 and "--follow" in flags["--command"]
        if dropped:
            drops.write_text(str(left - 1))

        def run(home: pathlib.Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
            # gcloud splits the command at blanks, and ssh joins it: to the remote shell it is one string.
            command = " ".join(flags["--command"].split(" "))
            process = subprocess.Popen(["bash", "-c", command], cwd=home, env=env, stdin=subprocess.DEVNULL)
            if dropped:
                time.sleep(0.7)
                process.kill()
            return process

        self.on_workers(node, flags, run)

    def scp(self, positionals: list[str], flags: dict[str, str]) -> None:
        *files, target = positionals
        node, colon, folder = target.partition(":")
        if not colon or not files or any(":" in file for file in files):
            fail("scp: only from here to the workers")

        def copy(home: pathlib.Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
            # Like scp: a folder that isn't there is an error.
            return subprocess.Popen(["cp", *files, f"{home / folder}/."])

        self.on_workers(node, flags, copy)


def environment(resource: dict[str, Any], node: str, worker: int) -> dict[str, str]:
    """Of a process on a TPU host; JAX finds its peers by this as it does on GKE."""
    several = len(resource["nodes"]) > 1
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("JAX_", "XLA_", "FAKE_"))}
    fake = os.path.dirname(os.path.abspath(__file__))
    return kept | {
        "HOME": str(pathlib.Path(os.environ["FAKE_GCLOUD"], "nodes", node, f"worker-{worker}")),
        "PATH": f"{fake}:/usr/bin:/bin",
        "JAX_PLATFORMS": "cpu",
        "JAX_FORCE_TPU_INIT": "1",
        "JAX_COORDINATOR_PORT": str(resource["port"]),
        "TPU_WORKER_ID": str(worker),
        "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * resource["workers"]),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost" if several else "",
        "MEGASCALE_NUM_SLICES": str(len(resource["nodes"])) if several else "",
        "MEGASCALE_SLICE_ID": str(resource["nodes"].index(node)) if several else "",
    }


def supervisors(home: pathlib.Path) -> list[int]:
    return [int(file.read_text()) for file in home.glob("sg4v/jobs/*/pid") if alive(int(file.read_text()))]


def alive(pid: int) -> bool:
    try:
        return bool(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def preempt(root: pathlib.Path, name: str, seconds: float = 60.0) -> None:
    """What Google does to a spot slice: SIGTERM to all that runs, on one worker first; then all is gone.

    For tests, which import this file.
    """
    cloud = Cloud(root)
    nodes = json.loads((root / f"{name}.json").read_text())["nodes"]
    homes = [home for node in nodes for home in cloud.homes(node)]
    for pid in supervisors(homes[-1]):
        os.killpg(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while any(map(supervisors, homes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # The connections have this long to tell the rest of the log.
    with cloud.resource(name) as resource:
        cloud.become(resource, "SUSPENDING")
        resource["fate"] = ["SUSPENDED"]


def main(argv: list[str]) -> None:
    command, positionals, flags = parse(argv)
    cloud = Cloud(pathlib.Path(os.environ["FAKE_GCLOUD"]))
    cloud.root.mkdir(exist_ok=True)
    with open(cloud.root / "calls", "a") as calls:
        calls.write(json.dumps(argv) + "\n")
    zone = flags["--zone"]
    match command[-1]:
        case "create":
            cloud.create(positionals[0], flags)
        case "describe":
            cloud.describe(positionals[0], zone)
        case "delete":
            cloud.delete(positionals[0], zone, "--force" in flags)
        case "ssh":
            cloud.ssh(positionals[0], flags)
        case "scp":
            cloud.scp(positionals, flags)


if __name__ == "__main__":
    main(sys.argv[1:])
