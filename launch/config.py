"""A launch as one checked value, from a config file, its overrides and a command line."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launch.accelerators import Slice, find
from launch.configs import common
from sg4v_jax import config as configs
from sg4v_jax.__main__ import split_config

# Of `sg4v_jax.train.preemption`, and what it is set to: EX_TEMPFAIL of sysexits.h.
EXIT_CODE, PREEMPTED = "SG4V_PREEMPTED_EXIT_CODE", 75
CAPACITIES = ("on-demand", "spot", "reserved")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,47}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Install:
    """What goes onto the workers; see `configs/common.py`."""

    source: str
    python: str
    extras: str
    setup: str


@dataclasses.dataclass(frozen=True)
class Gke:
    """What only a JobSet needs.

    Attributes:
      image: the container's, with this library installed (launch/Dockerfile).
      bucket, mount: the Cloud Storage bucket that all pods share, and where they see it.
      cluster: name of the GKE cluster, for xpk.
      service_account: of Kubernetes, for the bucket.
      max_restarts: of the whole set, preemptions included.
      grace_seconds: between SIGTERM and SIGKILL: the time for the last save.
    """

    image: str
    bucket: str
    mount: str
    cluster: str
    service_account: str
    max_restarts: int
    grace_seconds: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """A checked launch; the fields are those of `launch/configs/common.py`."""

    name: str
    project: str
    zone: str
    slice: Slice
    slices: int
    capacity: str
    runtime_version: str
    valid_until: str
    network: str
    subnetwork: str
    internal_ips: bool
    service_account: str
    install: Install
    workdir: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    poll_seconds: float
    timeout_hours: float
    max_failures: int
    gke: Gke

    @property
    def nodes(self) -> list[str]:
        """Names of the TPU VMs, one a slice; several are named by gcloud, after the prefix."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    @property
    def job_env(self) -> dict[str, str]:
        """What the command finds in its environment; a stop that isn't the end has an exit code."""
        return {EXIT_CODE: str(PREEMPTED), **self.env}


def split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(own arguments, those of the config, the command behind `--`, whose --config is its own)."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, config_argv = split_config(argv[:end])
    return own, config_argv, list(argv[end + 1 :])


def load(argv: Sequence[str], command: Sequence[str] = ()) -> Launch:
    """Reads `--config=FILE[:ARG]` and `--config.field=value`.

    Args:
      argv: as for `sg4v_jax.config.parse`.
      command: replaces the config's command, if given.

    Raises:
      ValueError: naming the field and what it may be.
    """
    file = next((value.removeprefix("--config=") for value in argv if value.startswith("--config=")), "")
    if not os.path.exists(file.partition(":")[0]):
        raise ValueError(f"no launch config {file or 'given'}; there are {', '.join(_files())}")
    fields = configs.parse(argv).to_dict()
    if different := sorted(set(fields) ^ set(common.base("", next(iter(common.SLICES))))):
        raise ValueError(
            f"{file} is no launch config ({', '.join(different)}); there are {', '.join(_files())}"
        )
    return check(fields, command)


def check(fields: dict[str, Any], command: Sequence[str] = ()) -> Launch:
    """A launch of these fields; see `load`."""
    fields = dict(fields)
    wait, babysit = fields.pop("wait"), fields.pop("babysit")
    tpu = find(fields.pop("accelerator"))
    argv = [str(part) for part in command or fields["command"]]
    launch = Launch(
        **fields
        | {
            "zone": fields["zone"] or "",
            "slice": tpu,
            "install": Install(**fields["install"]),
            "gke": Gke(**fields["gke"]),
            "runtime_version": fields["runtime_version"] or tpu.generation.runtime_version,
            "command": tuple(part.replace("{workdir}", fields["workdir"]) for part in argv),
            "env": {name: str(value) for name, value in fields["env"].items()},
        },
        poll_seconds=float(wait["poll_seconds"]),
        timeout_hours=float(wait["timeout_hours"]),
        max_failures=int(babysit["max_failures"]),
    )
    for good, message in _conditions(launch):
        if not good:
            raise ValueError(message)
    return launch


def _conditions(launch: Launch) -> list[tuple[bool, str]]:
    bad = [name for name in launch.env if not _VARIABLE.fullmatch(name)]
    return [
        (bool(launch.zone), "config.zone is not set; give --config.zone=ZONE (docs/launch.md: where)"),
        (
            bool(_NAME.fullmatch(launch.name)),
            f"config.name={launch.name!r}: up to 49 lower-case letters, digits and '-', a letter first",
        ),
        (
            launch.capacity in CAPACITIES,
            f"config.capacity={launch.capacity!r} is not one of {', '.join(CAPACITIES)}",
        ),
        (launch.slices >= 1, f"config.slices={launch.slices}: at least 1"),
        (bool(launch.command), "config.command is empty; give the command after --"),
        (not bad, f"config.env: {bad} cannot be names of environment variables"),
        (
            launch.workdir.startswith("/"),
            f"config.workdir={launch.workdir!r} must be absolute, on a disk that all workers share",
        ),
        (launch.poll_seconds > 0, "config.wait.poll_seconds must be positive"),
    ]


def describe(launch: Launch) -> str:
    """One line for people: what is asked for, and what an hour of it is."""
    chips = launch.slices * launch.slice.chips
    what = f"{launch.slices} x {launch.slice.name}" if launch.slices > 1 else launch.slice.name
    return (
        f"{launch.name}: {what} ({launch.slice.topology}), {launch.slices * launch.slice.hosts} workers, "
        f"{launch.capacity}, in {launch.zone}; an hour is {chips} chip-hours"
    )


def _files() -> list[str]:
    hidden = ("__init__.py", "common.py")
    folder = pathlib.Path(__file__).parent / "configs"
    return [f"launch/configs/{path.name}" for path in sorted(folder.glob("*.py")) if path.name not in hidden]
