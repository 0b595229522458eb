"""A launch whose gcloud is the fake one."""

import os
import pathlib
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from launch import config
from launch.config import Launch
from launch.configs import common
from launch.gcloud import Runner
from launch.pod import Pod
from tests.launch.fake import gcloud as fake

FAKE = pathlib.Path(__file__).parent / "fake"
REPOSITORY = pathlib.Path(__file__).parents[2]


def make_launch(argv: tuple[str, ...] = (), /, **overrides: Any) -> Launch:
    """A launch of one v4-8 called `pod`; `section__field=value` overrides."""
    fields = common.base("pretrain", "7b")
    values = {"name": "pod", "zone": "us-central2-b", "accelerator": "v4-8", "wait.poll_seconds": 0.05}
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    fields.update_from_flattened_dict(values)
    return config.check(fields.to_dict(), argv)


@pytest.fixture
def cloud(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake.Cloud]:
    """The fake cloud, with the fake gcloud first on PATH. Nothing outlives the test."""
    monkeypatch.setenv("PATH", f"{FAKE}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", os.fspath(tmp_path / "cloud"))
    monkeypatch.setenv("FAKE_PYTHON", sys.executable)
    assert shutil.which("gcloud") == os.fspath(FAKE / "gcloud")
    cloud = fake.Cloud(tmp_path / "cloud")
    yield cloud
    for home in cloud.root.glob("nodes/*/worker-*"):
        for pid in fake.supervisors(home):
            os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def archive(tmp_path: pathlib.Path) -> str:
    """The library as it lies here, packed as `git archive` would."""
    return pack(tmp_path / "sg4v_jax-here.tar.gz", "sg4v_jax", "configs")


@pytest.fixture
def small_archive(tmp_path: pathlib.Path) -> str:
    """Enough of the library for commands that don't use it."""
    return pack(tmp_path / "sg4v_jax-small.tar.gz", "sg4v_jax/__init__.py", "sg4v_jax/version.py", "configs")


def pack(file: pathlib.Path, *names: str) -> str:
    with tarfile.open(file, "w:gz", compresslevel=1) as out:
        for name in ("setup.py", "pyproject.toml", *names):
            out.add(
                REPOSITORY / name, f"here/{name}", filter=lambda i: None if "__pycache__" in i.name else i
            )
    return os.fspath(file)


@pytest.fixture
def make_pod(cloud: fake.Cloud, small_archive: str) -> Callable[..., tuple[Pod, list[str]]]:
    """(a pod, what it prints) of `make_launch`'s arguments."""

    def make(*command: str, **overrides: Any) -> tuple[Pod, list[str]]:
        printed: list[str] = []
        launch = make_launch(command or ("true",), **{"install.source": small_archive, **overrides})
        return Pod(launch, Runner(echo=printed.append)), printed

    return make
