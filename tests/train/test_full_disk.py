"""What a full disk does to files that are only watched.

Failed saves are in test_survival.py, the files of a run are written by sg4v_jax.atomic.
"""

import json
import pathlib
import warnings

import pytest

from sg4v_jax.train import goodput, metrics, writers
from tests.disk import small_files


def test_metrics_outlast_a_full_disk(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, 0)
    file.write(0, {"loss": 1.0})
    with small_files(path.stat().st_size + 5):
        file.write(1, {"loss": 2.0})
        file.write(2, {"loss": 3.0})
    assert [line["step"] for line in metrics.read(path)] == [0]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "metrics.jsonl can't be written" in line
    file.write(3, {"loss": 4.0})
    assert [line["step"] for line in metrics.read(path)] == [0, 1, 2, 3]
    # A restart needs no room to drop the lines it repeats, whole or cut off.
    path.open("a").write('{"step": 4, "lo')
    with small_files(10):
        metrics.MetricsFile(path, 2).close()
    assert path.read_text() == '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n'


def test_goodput_outlasts_a_full_disk(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    file, seconds = tmp_path / goodput.FILE_NAME, {"init": 1.0, "step": 5.0}
    run = goodput.Goodput(file, 0)
    run.write(1, seconds)
    before = file.read_bytes()
    for _ in range(2):  # It is told anew after it had worked again.
        with small_files(10):
            run.write(2, seconds, saved=True)
            run.write(3, seconds)
        assert file.read_bytes() == before
        (line,) = caplog.messages
        assert line.startswith(f"{file} can't be written (File too large): make room there; it stays as it")
        caplog.clear()
        run.write(4, seconds)
        assert json.loads(file.read_text())["step"] == 4 and run.seconds["init"] == 1.0
        before = file.read_bytes()
    assert list(json.loads(file.read_text())["saved"]) == ["2"]


def test_tensorboard_ends_on_a_full_disk(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its thread dies of it; more numbers than its queue would hold must not wait for that."""
    board = writers.TensorBoard(tmp_path, 0)
    values = {f"speed/{i}": float(i) for i in range(40)}
    with small_files(1000), warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnhandledThreadExceptionWarning)
        for step in range(4):
            board.write(step, values)
        board.close()
    (line,) = caplog.messages
    assert "tensorboard can't be written (File too large)" in line
    assert "TensorBoard gets nothing from step " in line and "metrics.jsonl has it all" in line
