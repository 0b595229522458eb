"""The commands, word for word, and that a strict gcloud takes them."""

import shlex
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import gcloud
from launch.gcloud import GcloudError, Runner
from tests.launch.conftest import make_launch
from tests.launch.fake import gcloud as fake

QUEUED = "gcloud compute tpus queued-resources"
TPU_VM = "gcloud compute tpus tpu-vm"


@pytest.mark.parametrize(
    ("overrides", "flags"),
    [
        (
            {"capacity": "on-demand"},
            "--node-id=pod --accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base",
        ),
        (
            {"accelerator": "v5e-16", "capacity": "spot", "valid_until": "12h"},
            "--node-id=pod --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot "
            "--valid-until-duration=12h",
        ),
        (
            {"accelerator": "v5p-8", "slices": 3, "capacity": "reserved", "project": "mine"},
            "--project=mine --node-count=3 --node-prefix=pod --accelerator-type=v5p-8 "
            "--runtime-version=v2-alpha-tpuv5 --reserved",
        ),
        (
            {"network": "n", "subnetwork": "s", "service_account": "a@b", "internal_ips": True},
            "--node-id=pod --accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base --spot --network=n "
            "--subnetwork=s --service-account=a@b --internal-ips",
        ),
    ],
)
def test_create(overrides: dict, flags: str) -> None:
    argv = gcloud.create(make_launch(**overrides))
    assert shlex.join(argv) == f"{QUEUED} create pod --zone=us-central2-b {flags} --quiet"
    fake.parse(argv[1:])


def test_the_others() -> None:
    launch = make_launch(internal_ips=True)
    commands = {
        f"{QUEUED} describe pod --zone=us-central2-b --format=json": gcloud.describe(launch),
        f"{QUEUED} delete pod --zone=us-central2-b --force --quiet": gcloud.delete(launch),
        f"{TPU_VM} ssh pod --zone=us-central2-b --worker=all --internal-ip --quiet "
        "--ssh-flag=-oServerAliveInterval=30 '--command=a '\"'\"'b c'\"'\"''": gcloud.ssh(
            launch, "pod", ["a", "b c"]
        ),
        f"{TPU_VM} scp f g pod:d/ --zone=us-central2-b --worker=all --internal-ip --quiet": gcloud.scp(
            launch, "pod", ["f", "g"], "d"
        ),
    }
    for line, argv in commands.items():
        assert shlex.join(argv) == line
        fake.parse(argv[1:])


WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@given(st.lists(WORDS, max_size=4))
@settings(max_examples=40, deadline=None)
def test_what_users_write_stays_words(words: list[str]) -> None:
    """Quotes, blanks, $(...), newlines: on the worker each word arrives as it was written."""
    argv = gcloud.ssh(make_launch(), "pod", ["printf", "%s\\0", *words])
    (command,) = [
        argument.removeprefix("--command=") for argument in argv if argument.startswith("--command=")
    ]
    said = subprocess.run(
        ["bash", "-c", " ".join(command.split(" "))], capture_output=True, check=True
    ).stdout
    assert said == b"".join(word.encode() + b"\0" for word in words or [""])


@pytest.mark.parametrize(
    "line",
    [
        "compute tpus queued-resources create x --zone=us-west4-a --node-id=x --accelerator-type=v4-8",
        "compute tpus queued-resources create x --node-id=x --accelerator-type=v4-8 --runtime-version=r",
        "compute tpus queued-resources create x --zone=us-west4-a --node-id=x --node-count=2 "
        "--accelerator-type=v4-8 --runtime-version=r",
        "compute tpus queued-resources create x --zone=us-west4-a --node-count=1 --accelerator-type=v4-8 "
        "--runtime-version=r",
        "compute tpus queued-resources create x --zone=us-west4-a --node-id=x --accelerator-type=v5e-8 "
        "--runtime-version=r",
        "compute tpus queued-resources create x --zone=us-west4-a --node-id=x --accelerator-type=v4-8 "
        "--runtime-version=r --provisioning-model=spot",
        "compute tpus queued-resources delete x --zone=us-west4-a --force=yes",
        "compute tpus tpu-vm ssh x --zone=us-west4-a --worker=all",
        "compute tpus tpu-vm create x --zone=us-west4-a",
    ],
)
def test_the_fake_is_strict(line: str) -> None:
    with pytest.raises(SystemExit):
        fake.parse(line.split())


def test_dry_runs_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("ran"))
    printed: list[str] = []
    runner = Runner(dry_run=True, echo=printed.append)
    assert runner.run(["a", "b c", "$(d)"]) == "" and printed == ["a 'b c' '$(d)'"]
    assert runner.state(make_launch())[0] == "ACTIVE"
    assert printed[1].startswith(f"{QUEUED} describe pod")


def test_failures_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GcloudError, match="exit code 3 of: bash -c 'echo no >&2; exit 3'\nno"):
        Runner().run(["bash", "-c", "echo no >&2; exit 3"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(GcloudError, match="gcloud is not installed"):
        Runner().run(["gcloud"])
