"""Everything a pod goes through but the training itself, on the fake cloud."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from launch import follow, source, tpu_vm
from launch.gcloud import GcloudError, Runner
from launch.pod import Pod, PodError, PodGone
from tests.launch.conftest import REPOSITORY, make_launch
from tests.launch.fake import gcloud as fake

MakePod = Callable[..., tuple[Pod, list[str]]]


def fates(cloud: fake.Cloud, *states: list[str]) -> None:
    """What becomes of the next queued resources, a state for each look at them."""
    cloud.root.mkdir(exist_ok=True)
    (cloud.root / "fates").write_text(json.dumps(states))


def ready(made: tuple[Pod, list[str]]) -> tuple[Pod, list[str]]:
    made[0].create()
    made[0].wait()
    made[0].install()
    return made


def test_wait_tells_each_state_once(make_pod: MakePod, cloud: fake.Cloud) -> None:
    fates(cloud, ["CREATING", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    pod, printed = make_pod()
    pod.create()
    pod.wait()
    assert printed == ["pod: CREATING", "pod: WAITING_FOR_RESOURCES", "pod: PROVISIONING", "pod: ACTIVE"]


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        (
            ["WAITING_FOR_RESOURCES", "FAILED"],
            PodError,
            "pod failed: Quota limit 'TPUV4' exceeded. (delete it",
        ),
        (
            ["PROVISIONING", "SUSPENDING", "SUSPENDED"],
            PodGone,
            "taken back (SUSPENDING): delete it and create",
        ),
        (["WAITING_FOR_RESOURCES"], PodError, "still WAITING_FOR_RESOURCES after 1e-05 hours"),
    ],
)
def test_wait_in_vain(
    states: list[str], error: type[Exception], message: str, make_pod: MakePod, cloud: fake.Cloud
) -> None:
    fates(cloud, states)
    pod, _ = make_pod(wait__timeout_hours=0.00001 if len(states) == 1 else 1.0)
    pod.create()
    with pytest.raises(error) as raised:
        pod.wait()
    assert message in str(raised.value)


def test_nothing_there(make_pod: MakePod) -> None:
    pod, _ = make_pod()
    with pytest.raises(PodError, match="there is no pod in us-central2-b: create it"):
        pod.wait()
    with pytest.raises(GcloudError, match="NOT_FOUND"):
        pod.delete()
    with pytest.raises(GcloudError, match="NOT_FOUND"):
        pod.install()


def test_install_goes_to_all_workers_once(make_pod: MakePod, cloud: fake.Cloud) -> None:
    pod, _ = ready(make_pod(accelerator="v4-16", install__setup="echo up >> mounted"))
    homes = cloud.homes("pod")
    assert len(homes) == 2
    times = [(home / "sg4v/venv/bin/sg4v").stat().st_mtime_ns for home in homes]
    pod.install()
    assert [(home / "sg4v/venv/bin/sg4v").stat().st_mtime_ns for home in homes] == times
    # The setup is not of the install: what it mounted may be gone after a restart.
    assert [(home / "mounted").read_text() for home in homes] == ["up\nup\n"] * 2


def test_install_of_a_git_ref(
    make_pod: MakePod, cloud: fake.Cloud, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was committed there, and not what lies around."""
    repository = tmp_path / "repository"
    (repository / "sg4v_jax").mkdir(parents=True)
    (repository / "configs").mkdir()
    for name in ("setup.py", "sg4v_jax/version.py", "configs/a.py"):
        (repository / name).write_text("committed")
    git = ["git", "-C", os.fspath(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a"], ["tag", "v1"]):
        subprocess.run([*git, *arguments], check=True)
    (repository / "setup.py").write_text("changed")
    monkeypatch.setattr(source, "REPOSITORY", repository)
    ready(make_pod(install__source="v1"))
    (tree,) = (cloud.homes("pod")[0] / "sg4v/venv/src").iterdir()
    assert re.fullmatch(r"sg4v_jax-[0-9a-f]{12}", tree.name)
    assert (tree / "setup.py").read_text() == "committed"
    for wrong in ("v2", "--help", "gone.tar.gz"):
        with pytest.raises(ValueError, match=f"config.install.source={wrong}"):
            make_pod(install__source=wrong)[0].install()


@pytest.mark.slow
def test_run_on_all_workers_of_all_slices(make_pod: MakePod, cloud: fake.Cloud) -> None:
    script = 'echo "I am $TPU_WORKER_ID of slice $MEGASCALE_SLICE_ID, $A"; exit $TPU_WORKER_ID'
    made, printed = ready(
        make_pod("bash", "-c", script, accelerator="v4-16", slices=2, env=dict(A="it's $(not) run"))
    )
    outcome = made.follow(made.start())
    assert sorted(line for line in printed if line.startswith("[")) == [
        f"[s{i}w{j}] I am {j} of slice {i}, it's $(not) run" for i in range(2) for j in range(2)
    ]
    assert outcome.exits == {"s0w0": "0", "s0w1": "1", "s1w0": "0", "s1w1": "1"}
    assert (outcome.done, outcome.exit_code) == (False, 1)
    assert str(outcome) == "exit code 0: s0w0, s1w0; exit code 1: s0w1, s1w1"


@pytest.mark.slow
def test_a_dropped_connection_loses_and_repeats_nothing(make_pod: MakePod, cloud: fake.Cloud) -> None:
    lines = 40
    made, printed = ready(make_pod("bash", "-c", f"for i in $(seq {lines}); do echo $i; sleep 0.05; done"))
    (cloud.root / "drops").write_text("2")
    outcome = made.follow(made.start())
    assert outcome.done
    assert [line for line in printed if line.startswith("[w0]")] == [f"[w0] {i + 1}" for i in range(lines)]
    assert printed.count("(connection to pod lost; connecting again)") == 2
    # It is still there to be told, from the start.
    del printed[:]
    made.follow(to_the_end=False)
    assert len(printed) == lines


def test_garbled_lines_are_owned_up_to(make_pod: MakePod) -> None:
    made, printed = make_pod(accelerator="v4-16")
    one = follow._Slice(made.launch, made.runner, "", 0, True)
    for line in (
        "@0\t1\ta",
        "@0\t1\ta",
        "Warning: added key",
        "@1\t1\tx",
        "@0\t4\td",
        "@7\t1\tx",
        "@1\texit\t0",
    ):
        one._take(line)
    assert printed == [
        "[w0] a",
        "Warning: added key",
        "[w1] x",
        "[w0] (lines garbled on the way: see `logs`)",
        "[w0] d",
        "@7\t1\tx",
    ]
    assert one.exits == {1: "0"}


# A run that gets `$N` steps further each time, counted in checkpoints, before it fails.
STEPS_THEN_FAIL = """
at=$(ls {0}/checkpoints 2>/dev/null | sort -n | tail -1); at=$((${{at:-0}} + $N))
mkdir -p {0}/checkpoints/$at; [ $at -ge 4 ] && exit 0; exit $CODE
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", ["1", "75"])
def test_babysit_goes_on_while_there_is_progress(
    code: str, make_pod: MakePod, cloud: fake.Cloud, tmp_path: pathlib.Path
) -> None:
    """Four attempts, where one failure is allowed that doesn't get further."""
    workdir = os.fspath(tmp_path / "run")
    script = STEPS_THEN_FAIL.format(workdir)
    made, printed = make_pod(
        "bash", "-c", script, env={"N": "1", "CODE": code}, workdir=workdir, babysit__max_failures=1
    )
    assert made.babysit().done
    assert [line for line in printed if line.startswith("starting")] == [
        f"starting from step {i}, failures so far: 0" for i in range(4)
    ]
    # All on the same pod: nothing was wrong with it.
    calls = [json.loads(line) for line in (cloud.root / "calls").read_text().splitlines()]
    assert [call[3] for call in calls if call[3] in ("create", "delete")] == ["create"]


@pytest.mark.slow
def test_babysit_gives_up_without_progress(make_pod: MakePod, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    (workdir / "checkpoints/5").mkdir(parents=True)
    made, printed = make_pod("false", workdir=os.fspath(workdir), babysit__max_failures=2)
    with pytest.raises(PodError, match="2 failures since step 5 was saved; giving up"):
        made.babysit()
    assert [line for line in printed if line.startswith("starting")] == [
        f"starting from step 5, failures so far: {i}" for i in range(2)
    ]


@pytest.mark.slow
def test_babysit_after_preemptions(make_pod: MakePod, cloud: fake.Cloud, tmp_path: pathlib.Path) -> None:
    """Taken back while it is made, and found suspended: made anew; a failure to make it is told."""
    fates(
        cloud,
        ["SUSPENDED"],
        ["PROVISIONING", "SUSPENDING", "SUSPENDED"],
        ["ACTIVE"],
    )
    made, _ = make_pod("true", workdir=os.fspath(tmp_path / "run"))
    made.create()
    assert made.babysit().done
    calls = [json.loads(line) for line in (cloud.root / "calls").read_text().splitlines()]
    assert [call[3] for call in calls if call[3] in ("create", "delete")] == ["create", "delete"] * 2 + [
        "create"
    ]
    made.delete()
    fates(cloud, ["FAILED"])
    with pytest.raises(PodError, match="Quota"):
        made.babysit()


@pytest.mark.slow
def test_the_worker_that_vanishes_under_a_job(
    make_pod: MakePod, cloud: fake.Cloud, tmp_path: pathlib.Path
) -> None:
    """SIGKILL to all, without notice."""
    workdir = tmp_path / "run"
    script = f"mkdir {workdir} && sleep 600"  # The second time mkdir fails, which ends the test.
    made, printed = make_pod("bash", "-c", script, workdir=os.fspath(workdir), babysit__max_failures=2)

    def vanish() -> None:
        while not workdir.exists():
            time.sleep(0.02)
        with cloud.resource("pod") as resource:
            cloud.become(resource, "SUSPENDED")

    thread = threading.Thread(target=vanish, daemon=True)
    thread.start()
    with pytest.raises(PodError, match="2 failures since step 0"):
        made.babysit()
    assert printed.count("pod: ACTIVE") >= 2


def test_stop(make_pod: MakePod, tmp_path: pathlib.Path) -> None:
    up = tmp_path / "up"
    script = f'trap "exit 75" TERM; touch {up}; while true; do sleep 0.05; done'
    made, _ = ready(make_pod("bash", "-c", script))
    job = made.start()
    while not up.exists():
        time.sleep(0.01)
    made.stop(grace=20)
    outcome = made.follow(job)
    assert (outcome.exits, outcome.exit_code) == ({"w0": "75"}, 75)
    assert str(outcome) == "told to stop, saved: w0"


@pytest.mark.parametrize(
    ("exits", "code"),
    [
        ({"w0": "0", "w1": "0"}, 0),
        ({"w0": "75", "w1": "1"}, 75),
        ({"w0": "0", "w1": ""}, 1),
        ({"w0": "lost", "w1": "lost"}, 1),
        ({"w0": "0", "w1": "139"}, 139),
    ],
)
def test_outcomes(exits: dict[str, str], code: int) -> None:
    assert follow.Outcome(exits).exit_code == code


def test_command_line(
    cloud: fake.Cloud, small_archive: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = ["--config=launch/configs/pretrain.py:7b", "--config.zone=us-central2-b", "--config.name=pod"]
    config += ["--config.accelerator=v4-8", "--config.wait.poll_seconds=0.05"]
    config += [f"--config.install.source={small_archive}"]

    def call(command: str, *rest: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_:
            tpu_vm.main([command, *config, *rest])
        return exit_.value.code, "".join(capsys.readouterr())

    assert call("status") == (0, "ABSENT\n")
    assert call("create") == (
        0,
        "# pod: v4-8 (2x2x1), 1 workers, spot, in us-central2-b; an hour is 4 chip-hours\n",
    )
    assert call("wait")[0] == call("install")[0] == 0
    code, shown = call("run", "--", "bash", "-c", "echo hello; exit 7")
    assert code == 7 and "[w0] hello\n" in shown and "exit code 7: w0" in shown
    assert call("run", "--detach", "--", "bash", "-c", "echo bye")[0] == 0
    code, shown = call("attach")
    assert code == 0 and "[w0] bye\nfinished on all workers\n" in shown
    assert "[w0] bye" in call("logs")[1]
    code, shown = call("create")
    assert code == 2 and "launch.tpu_vm create: error: exit code 1 of: gcloud compute tpus" in shown
    assert "ALREADY_EXISTS" in shown
    assert call("stop")[0] == call("delete")[0] == 0
    code, shown = call("wait")
    assert code == 2 and "there is no pod in us-central2-b" in shown


def test_dry_run_prints_commands_that_gcloud_takes(
    cloud: fake.Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    """And runs none."""
    launch = make_launch(slices=2, accelerator="v4-16", install__source="git+https://x/y@abc")
    for command in tpu_vm.COMMANDS:
        tpu_vm.act(command, Pod(launch, Runner(dry_run=True)))
        lines = capsys.readouterr().out.splitlines()
        commands = [line for line in lines if line.startswith("gcloud ")]
        assert commands, command
        for line in commands:
            fake.parse(shlex.split(line)[1:])
    assert not (cloud.root / "calls").exists()
