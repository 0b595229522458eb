"""The fields of every launch, overridden by `--config.section.field=value`."""

from ml_collections import ConfigDict, config_dict

# Where to start from; nothing here checks what fits.
SLICES = {"7b": "v5e-64", "13b": "v5e-256"}


def base(stage: str, size: str) -> ConfigDict:
    """A launch of `configs/STAGE.py:SIZE`; only the zone and the command's data are left to say."""
    if size not in SLICES:
        raise ValueError(
            f"size {size!r} is not one of {tuple(SLICES)}; use e.g. launch/configs/{stage}.py:7b"
        )
    config = ConfigDict()
    config.name = f"sg4v-{stage}-{size}"
    config.project = ""  # gcloud's own default
    config.zone = config_dict.placeholder(str)

    config.accelerator = SLICES[size]
    config.slices = 1
    # "on-demand", "spot" (cheap, may be taken away at any time) or "reserved".
    config.capacity = "spot"
    config.runtime_version = ""  # that of the accelerator
    config.valid_until = ""  # give up waiting in the queue, e.g. "12h"
    config.network = ""
    config.subnetwork = ""
    config.internal_ips = False
    config.service_account = ""

    # `source`: a git ref of this repository (sent as it is committed there), a .whl or .tar.gz file,
    # or git+https://...@ref, which the workers fetch. `setup`: shell commands, before the install,
    # again in each one: mount what the run reads and writes.
    config.install = ConfigDict({"source": "HEAD", "python": "3.12", "extras": "tpu", "setup": ""})

    # `{workdir}` in the command is this one. All workers must see it as the same directory.
    config.workdir = f"/mnt/sg4v/runs/{stage}"
    config.command = ("sg4v", "train", f"--config=configs/{stage}.py:{size}", "--workdir={workdir}")
    config.env = ConfigDict()

    config.wait = ConfigDict({"poll_seconds": 30.0, "timeout_hours": 24.0})
    # Failures in a row that got no further than the checkpoint they began at; between them it waits
    # for poll_seconds, then twice that, and so on.
    config.babysit = ConfigDict({"max_failures": 5})
    config.gke = ConfigDict(
        {
            "image": "",
            "bucket": "",
            "mount": "/mnt/sg4v",
            "cluster": "",
            "service_account": "",
            "max_restarts": 100,
            "grace_seconds": 120,
        }
    )
    return config
