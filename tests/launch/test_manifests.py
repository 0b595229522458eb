"""What is generated for GKE and SkyPilot, read back as they would."""

import shlex

import pytest
import yaml

from launch import gke, manifest, skypilot
from launch.accelerators import GENERATIONS
from tests.launch.conftest import REPOSITORY, make_launch

GKE = {"gke__image": "r/i:t", "gke__bucket": "b", "gke__cluster": "c"}


@pytest.mark.parametrize(("name", "chips", "hosts"), [("v5e-8", 8, 1), ("v5e-64", 4, 16), ("v4-32", 4, 4)])
def test_jobset(name: str, chips: int, hosts: int) -> None:
    env = {"A": "it's: #1"}
    launch = make_launch(accelerator=name, slices=2, env=env, gke__service_account="ksa", **GKE)
    read = yaml.safe_load(manifest.dump(gke.jobset(launch)))
    assert read == gke.jobset(launch)
    assert (read["apiVersion"], read["kind"], read["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "pod",
    )
    (replicated,) = read["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (hosts, hosts, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == "ksa"
    generation = GENERATIONS[name.partition("-")[0]]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": generation.gke,
        "cloud.google.com/gke-tpu-topology": launch.slice.topology,
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {kind: {"google.com/tpu": chips} for kind in ("requests", "limits")}
    assert container["command"] == list(launch.command)
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    # Or a preempted run would count as complete.
    assert environment == env | {"SG4V_PREEMPTED_EXIT_CODE": "75"}
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"] and launch.workdir.startswith(mount["mountPath"])
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "b"


def test_on_demand_nodes_are_no_spot_nodes() -> None:
    assert "gke-spot" not in manifest.dump(gke.jobset(make_launch(capacity="on-demand", **GKE)))


def test_xpk() -> None:
    argv = gke.xpk(make_launch(("a", "b c"), accelerator="v5e-64", slices=2, project="p", **GKE))
    assert shlex.split(shlex.join(argv)) == argv
    assert argv[:3] == ["xpk", "workload", "create"]
    flags = dict(argument.split("=", 1) for argument in argv[3:])
    assert flags["--tpu-type"] == "v5litepod-64" and flags["--num-slices"] == "2"
    assert flags["--env"] == "SG4V_PREEMPTED_EXIT_CODE=75"
    assert shlex.split(flags["--command"]) == ["a", "b c"]


def test_skypilot() -> None:
    launch = make_launch(("a", "b c"), accelerator="v6e-8", install__setup="mount $it\nls", env={"N": 1})
    text = manifest.dump(skypilot.task(launch))
    assert "setup: |" in text
    read = yaml.safe_load(text)
    resources = read["resources"]
    assert resources["accelerators"] == "tpu-v6e-8:1" and resources["use_spot"] is True
    assert resources["accelerator_args"] == {"tpu_vm": True, "runtime_version": "v2-alpha-tpuv6e"}
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75]
    assert read["envs"] == {"SG4V_PREEMPTED_EXIT_CODE": "75", "N": "1"}
    lines = read["setup"].splitlines()
    assert lines[:3] == ["set -e", "mount $it", "ls"]
    assert shlex.split(lines[-1])[-1] == ".[tpu]"
    assert shlex.split(read["run"].splitlines()[-1]) == ["exec", "a", "b c"]
    pinned = skypilot.task(make_launch(install__source="git+https://x/y@abc"))
    assert shlex.split(pinned["setup"].splitlines()[-1])[-1] == "sg4v_jax[tpu] @ git+https://x/y@abc"


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (gke, [], "config.gke.image is not set"),
        (gke, ["--config.gke.image=i"], "config.gke.bucket is not set"),
        (gke, ["--xpk", "--config.gke.image=i"], "config.gke.cluster is not set"),
        (skypilot, ["--config.slices=2"], "no multi-slice"),
        (skypilot, ["--config.capacity=reserved"], "is for launch.tpu_vm and launch.gke"),
        (skypilot, ["--config.accelerator=v9-1"], "say one of v4, v5e, v5p, v6e"),
    ],
)
def test_errors_are_one_line(
    module: object,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as exit_:
        module.main(["--config=launch/configs/pretrain.py:7b", "--config.zone=z", *flags])
    shown = capsys.readouterr()
    assert exit_.value.code == 2 and message in shown.err and not shown.out
    assert "Traceback" not in shown.err
