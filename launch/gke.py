"""`python -m launch.gke --config=...`: a launch as a JobSet for GKE, or as xpk's command for one."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from launch import config, manifest
from launch.config import Launch


def jobset(launch: Launch) -> dict[str, Any]:
    """The manifest: one Job a slice, one pod a host, all started again together.

    GKE tells the pods of a TPU slice of each other (TPU_WORKER_HOSTNAMES and MEGASCALE_*), and
    `sg4v` finds that by itself. A run that is told to stop exits with `config.PREEMPTED`, so that its
    Job does not count as complete.

    Raises:
      ValueError: `config.gke.image` or `config.gke.bucket` is not set.
    """
    _require(launch, "image")
    _require(launch, "bucket")
    pod = {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": _pod(launch),
    }
    job = {
        "parallelism": launch.slice.hosts,
        "completions": launch.slice.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # What fails, fails as a whole; the set starts again.
        "template": pod,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": launch.name,
            # A slice is a node pool, and must not be shared.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": launch.gke.max_restarts},
            "replicatedJobs": [
                {"name": "slice", "replicas": launch.slices, "template": {"spec": job}},
            ],
        },
    }


def xpk(launch: Launch) -> list[str]:
    """The command that makes xpk run the same on a cluster that it made.

    Raises:
      ValueError: `config.gke.image` or `config.gke.cluster` is not set.
    """
    _require(launch, "image")
    _require(launch, "cluster")
    argv = ["xpk", "workload", "create", f"--workload={launch.name}", f"--cluster={launch.gke.cluster}"]
    argv += [f"--project={launch.project}"] if launch.project else []
    argv += [f"--zone={launch.zone}", f"--tpu-type={launch.slice.accelerator_type}"]
    argv += [f"--num-slices={launch.slices}", f"--docker-image={launch.gke.image}"]
    argv += [f"--max-restarts={launch.gke.max_restarts}"]
    argv += [f"--termination-grace-period-seconds={launch.gke.grace_seconds}"]
    argv += [f"--env={name}={value}" for name, value in launch.job_env.items()]
    # xpk hands this to a shell in the container.
    return [*argv, f"--command={shlex.join(launch.command)}"]


def _pod(launch: Launch) -> dict[str, Any]:
    tpu = {"google.com/tpu": launch.slice.chips_per_host}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": launch.slice.generation.gke,
        "cloud.google.com/gke-tpu-topology": launch.slice.topology,
    }
    if launch.capacity == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "sg4v",
        "image": launch.gke.image,
        # Not through a shell: it would keep SIGTERM to itself.
        "command": list(launch.command),
        "env": [{"name": name, "value": value} for name, value in launch.job_env.items()],
        "resources": {"requests": dict(tpu), "limits": dict(tpu)},
        "volumeMounts": [{"name": "bucket", "mountPath": launch.gke.mount}],
    }
    bucket = {
        "driver": "gcsfuse.csi.storage.gke.io",
        "volumeAttributes": {"bucketName": launch.gke.bucket, "mountOptions": "implicit-dirs"},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.gke.grace_seconds,
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [{"name": "bucket", "csi": bucket}],
    }
    account = launch.gke.service_account
    return pod | ({"serviceAccountName": account} if account else {})


def _require(launch: Launch, field: str) -> None:
    if not getattr(launch.gke, field):
        raise ValueError(f"config.gke.{field} is not set; give --config.gke.{field}=...")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the manifest, or with --xpk the command."""
    own, config_argv, command = config.split(list(sys.argv[1:] if argv is None else argv))
    parser = argparse.ArgumentParser("launch.gke", description=__doc__)
    parser.add_argument("--xpk", action="store_true", help="print xpk's command instead of a JobSet")
    arguments = parser.parse_args(own)
    try:
        launch = config.load(config_argv, command)
        text = shlex.join(xpk(launch)) if arguments.xpk else manifest.dump(jobset(launch))
    except (ValueError, OSError) as error:
        print(f"launch.gke: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(text.rstrip("\n"))


if __name__ == "__main__":
    main()
