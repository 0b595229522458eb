"""The commands of docs/launch.md, run dry."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from launch import config, gke, skypilot, tpu_vm
from tests.launch.conftest import REPOSITORY
from tests.launch.fake import gcloud as fake

PAGE = (REPOSITORY / "docs/launch.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
OURS = [line for line in LINES if line.startswith("python -m launch.")]
# What is typed by hand, and not by `launch`.
BY_HAND = (
    "gcloud auth",
    "gcloud services",
    "gcloud storage",
    "ssh-add",
    "sg4v data build",
    "docker",
    "kubectl",
    "sky",
)


@pytest.mark.parametrize("line", OURS)
def test_command(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + ":/usr/bin:/bin")
    argv = shlex.split(line.partition(" > ")[0])[2:]
    module = {"launch.tpu_vm": tpu_vm, "launch.gke": gke, "launch.skypilot": skypilot}[argv.pop(0)]
    if module is not tpu_vm:
        module.main(argv)
        assert "sg4v" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as exit_:
        module.main([argv[0], "--dry-run", *argv[1:]])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("gcloud compute tpus ", "git ", "# ")) for line in shown), shown
    commands = [shlex.split(line) for line in shown if line.startswith("gcloud")]
    assert commands
    for command in commands:
        fake.parse(command[1:], any_slice=True)


def test_all_of_the_commands_are_there() -> None:
    shown = {shlex.split(line)[3] for line in OURS if "tpu_vm" in line}
    assert shown == set(tpu_vm.COMMANDS) - {"status"}
    others = [line for line in LINES if line not in OURS and line.strip()]
    assert all(
        line.startswith(BY_HAND) or re.match("gcloud compute tpus [a-z-]+ list ", line) for line in others
    )


def test_the_config_of_the_page(tmp_path: "os.PathLike[str]", monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    file = os.path.join(tmp_path, "mine.py")
    with open(file, "w") as out:
        out.write(code)
    monkeypatch.chdir(REPOSITORY)
    launch = config.load([f"--config={file}:7b"])
    assert launch.zone == "us-west4-a" and launch.command[-1].startswith("--config.data.tokenizer=")
    # The setup is a script that a shell can read.
    subprocess.run(["bash", "-n", "-c", launch.install.setup], check=True)
