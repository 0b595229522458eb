"""What is said where nobody can watch, where somebody does, and when an extra is missing."""

import io
import logging
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from sg4v_jax.parallel.peaks import peak_flops
from sg4v_jax.train import first_batch, recorder, writers

VALUES = {"loss": 1.23456, "speed/step_seconds": 2.0, "speed/tokens_per_second": 12345.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    console = writers.Console("pretrain", 10, 100)
    with caplog.at_level(logging.INFO, "sg4v_jax"):
        console.write(39, VALUES | {"speed/mfu": 0.4567})
        console.write(99, VALUES)
    console.close()
    assert caplog.messages == [
        "pretrain 40/100: loss 1.2346, 12.3k tokens/s, MFU 45.7 %, 02:00 left",
        "pretrain 100/100: loss 1.2346, 12.3k tokens/s, 00:00 left",
    ]
    assert sys.stderr.getvalue() == ""


def test_a_bar_for_who_watches(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = writers.Console("pretrain", 10, 12)
    for step in console:
        console.write(step, VALUES)
    console.close()
    shown = terminal.getvalue()
    assert "pretrain" in shown and "12/12" in shown and "loss 1.2346, 12.3k tokens/s, 00:02 left" in shown
    assert not caplog.messages


def test_missing_extras_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"config\.metrics\.tensorboard needs .*sg4v_jax\[tensorboard\]"):
        writers.TensorBoard(tmp_path, 0)
    with pytest.raises(ValueError, match=r"config\.metrics\.wandb_project needs wandb: .*sg4v_jax\[wandb\]"):
        writers.WeightsAndBiases(tmp_path, "project", {})


@pytest.mark.parametrize(
    ("loss", "pretrained", "good", "said"),
    [
        (np.log(640) + 0.5, False, True, "as random weights about do"),
        (0.5, False, False, "look at what is supervised"),
        (20.0, False, False, "look at what is supervised"),
        (2.0, True, True, "trained weights less, as here"),
        (np.log(640), True, False, "of one model?"),
        (float("nan"), True, False, "not finite"),
    ],
)
def test_the_first_loss_is_judged(loss: float, pretrained: bool, good: bool, said: str) -> None:
    line, found = first_batch.judge_loss(loss, 640, pretrained)
    assert found == good and line.startswith(f"loss of the first step: {loss:.3f}; guessing") and said in line


def test_memory_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(**stats: int) -> SimpleNamespace:
        return SimpleNamespace(memory_stats=lambda: stats or None)

    full = {"bytes_in_use": 3, "peak_bytes_in_use": 5, "bytes_limit": 9, "num_allocs": 1}
    monkeypatch.setattr(jax, "local_devices", lambda: [device(**full), device(**full | {"bytes_in_use": 4})])
    assert recorder.memory_in_use() == {"in_use_bytes": 4, "peak_bytes": 5, "limit_bytes": 9}
    monkeypatch.setattr(jax, "local_devices", lambda: [device()])
    assert recorder.memory_in_use() == {}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("cpu", None),
    ],
)
def test_peaks(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak


def test_losses_by_kind_leave_out_what_did_not_come_by_and_what_is_not_finite() -> None:
    kinds = [("a", "text"), ("a", "image"), ("b", "text"), ("b", "image")]

    def step(loss: float, tokens: int, nonfinite: int = 0) -> dict[str, Any]:
        losses, counts = np.array([0, loss, 0, 0], np.float32), np.array([0, tokens, 0, 0])
        return {"kind_losses": losses, "kind_tokens": counts, "nonfinite": nonfinite}

    window = [step(6, 2), step(np.nan, 5, nonfinite=1), step(3, 1)]
    assert recorder.losses_by_kind(window, kinds) == {"loss/source/a": 3.0, "loss/modality/image": 3.0}
    assert recorder.losses_by_kind([step(0, 0)], kinds) == {}
    assert recorder.losses_by_kind([step(np.nan, 5, nonfinite=1)], kinds) == {}
