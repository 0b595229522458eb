"""A pre-training on preemptible slices, start to end, with real processes and a fake gcloud."""

import json
import os
import pathlib
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from launch.config import Launch
from launch.gcloud import Runner
from launch.pod import Pod
from sg4v_jax.convert.orbax import CHECKPOINTS
from sg4v_jax.train import groups, metrics
from tests.conftest import TinyWorld
from tests.launch.conftest import make_launch
from tests.launch.fake import gcloud as fake
from tests.tiny import small_argv
from tests.train.test_resume import logged

# The notice takes up to two seconds to go round: the run must last longer than that from there on.
STEPS, PREEMPTED_AFTER, STEP_SECONDS = 60, 4, 0.07
CONFIG = {
    "data.packing_window": 2,
    "train.num_steps": STEPS,
    "checkpoint.every": 1000,
    "checkpoint.keep": 2,
}


def pretraining(
    name: str, world: TinyWorld, workdir: pathlib.Path, archive: str, **overrides: object
) -> Launch:
    argv = ["sg4v", *small_argv(world, "{workdir}", CONFIG)]
    place = {"name": name, "workdir": os.fspath(workdir), "install.source": archive, "wait.poll_seconds": 0.3}
    return make_launch(tuple(argv), **place, **overrides)


@pytest.mark.slow
def test_preempted_pretraining_ends_with_the_same_bits(
    cloud: fake.Cloud,
    archive: str,
    tiny_world: TinyWorld,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", str(STEP_SECONDS))
    # Six processes compile the same small programs.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Undisturbed: two slices of one host each, step by step.
    workdir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    printed: list[str] = []
    launch = pretraining("calm", tiny_world, undisturbed, archive, slices=2, capacity="on-demand")
    calm = Pod(launch, Runner(echo=printed.append))
    calm.create()
    calm.wait()
    calm.install()
    outcome = calm.follow(calm.start())
    assert outcome.exits == {"s0w0": "0", "s1w0": "0"}, printed
    assert any(line.startswith("[s0w0]") and "done, loss" in line for line in printed)
    calm.delete()

    # Preempted: one slice of two hosts, told to stop by a notice to the second.
    story: list[str] = []
    pod = Pod(
        pretraining("spot", tiny_world, workdir, archive, accelerator="v4-16"), Runner(echo=story.append)
    )
    taken = threading.Thread(target=preempt_when_it_trains, args=(cloud, workdir), daemon=True)
    taken.start()
    assert pod.babysit().exits == {"w0": "0", "w1": "0"}, story
    taken.join()
    pod.delete()

    (resumed,) = [line for line in story if "resuming at step" in line and line.startswith("[w0]")]
    step = int(resumed.rsplit(" ", 1)[1])
    assert PREEMPTED_AFTER < step < STEPS
    assert f"starting from step {step}, failures so far: 0" in story
    assert "told to stop, saved: w0, w1" in story
    assert [f"saved step {step} of {STEPS}" in line for line in story].count(True) == 2
    calls = [json.loads(line) for line in (cloud.root / "calls").read_text().splitlines()]
    made = [call[3] for call in calls if call[2] == "queued-resources" and call[4] == "spot"]
    assert [name for name in made if name != "describe"] == ["create", "delete", "create", "delete"]

    assert [line["step"] for line in logged(workdir)] == list(range(STEPS))
    assert logged(workdir) == logged(undisturbed)
    for item in ("params", "opt_state"):
        ours, theirs = (arrays(run / CHECKPOINTS / str(STEPS) / item) for run in (workdir, undisturbed))
        assert ours.keys() == theirs.keys() and len(ours) > 50
        for name, leaf in theirs.items():
            np.testing.assert_array_equal(ours[name], leaf, err_msg=f"{item} {name}")
        before = arrays(workdir / CHECKPOINTS / str(step) / item)
        assert any(not np.array_equal(before[name], leaf) for name, leaf in ours.items())


def arrays(item: pathlib.Path) -> dict[str, np.ndarray]:
    """What lies in a checkpoint, whatever number of processes wrote it."""
    checkpointer = ocp.PyTreeCheckpointer()
    wanted = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), checkpointer.metadata(item).item_metadata.tree
    )
    return dict(groups.flatten(checkpointer.restore(item, args=ocp.args.PyTreeRestore(restore_args=wanted))))


def preempt_when_it_trains(cloud: fake.Cloud, workdir: pathlib.Path) -> None:
    file = workdir / metrics.FILE_NAME
    while not file.exists() or len(metrics.read(file)) < PREEMPTED_AFTER:
        time.sleep(0.05)
    fake.preempt(cloud.root, "spot")
