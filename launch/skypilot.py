"""`python -m launch.skypilot --config=...`: a launch as a task for `sky jobs launch`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from launch import config, manifest
from launch.config import PREEMPTED, Launch


def task(launch: Launch) -> dict[str, Any]:
    """The task. SkyPilot starts `run` on every host of a slice, and again after a preemption.

    Raises:
      ValueError: several slices, or a reservation: SkyPilot has neither for TPU VMs.
    """
    if launch.slices > 1:
        raise ValueError("SkyPilot has no multi-slice TPUs: config.slices=1, or launch.tpu_vm or launch.gke")
    if launch.capacity == "reserved":
        raise ValueError("config.capacity=reserved is for launch.tpu_vm and launch.gke")
    install = launch.install
    requirement = "." if not install.source.startswith("git+") else f"sg4v_jax @ {install.source}"
    if install.extras:
        # `.[tpu]`, or `sg4v_jax[tpu] @ git+https://...`
        name, at, url = requirement.partition(" @ ")
        requirement = f"{name}[{install.extras}]{at}{url}"
    setup = [
        *([install.setup] if install.setup else []),
        "python3 -m pip install --quiet --user uv",
        f'"$HOME/.local/bin/uv" venv --quiet --python {shlex.quote(install.python)} "$HOME/sg4v-venv"',
        '"$HOME/.local/bin/uv" pip install --quiet --python "$HOME/sg4v-venv/bin/python" '
        + shlex.quote(requirement),
    ]
    return {
        "name": launch.name,
        # What is installed is the working directory: check out the commit that is meant.
        "workdir": ".",
        "resources": {
            "cloud": "gcp",
            "zone": launch.zone,
            "accelerators": f"tpu-{launch.slice.accelerator_type}:1",
            "accelerator_args": {"tpu_vm": True, "runtime_version": launch.runtime_version},
            "use_spot": launch.capacity == "spot",
            "job_recovery": {
                "max_restarts_on_errors": launch.max_failures,
                "recover_on_exit_codes": [PREEMPTED],
            },
        },
        "envs": dict(launch.job_env),
        "setup": "\n".join(["set -e", *setup]),
        "run": f'export PATH="$HOME/sg4v-venv/bin:$PATH"\nexec {shlex.join(launch.command)}',
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the task."""
    own, config_argv, command = config.split(list(sys.argv[1:] if argv is None else argv))
    argparse.ArgumentParser("launch.skypilot", description=__doc__).parse_args(own)
    try:
        text = manifest.dump(task(config.load(config_argv, command)))
    except (ValueError, OSError) as error:
        print(f"launch.skypilot: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(text.rstrip("\n"))


if __name__ == "__main__":
    main()
