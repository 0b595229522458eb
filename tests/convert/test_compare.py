"""`sg4v convert --check`, `sg4v info`, and what they are made of."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from sg4v_jax.__main__ import main
from sg4v_jax.convert.checkpoint import Checkpoint
from sg4v_jax.convert.compare import compare, logits
from sg4v_jax.convert.describe import as_text, describe
from sg4v_jax.convert.load import convert, open_checkpoint
from sg4v_jax.convert.tensors import in_memory
from tests.convert.writers import ROWS, Source

HEAD, GATE = "language_model.lm_head.weight", "language_model.model.layers.1.mlp.gate_proj.weight"
HUB, SHARE4V = "HF, names of the Hub", "share4v, tower by config.json"


def changed(checkpoint: Checkpoint, key: str, array: np.ndarray) -> Checkpoint:
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, key: in_memory(key, array)})


def test_equal_in_any_format(source: Any) -> None:
    """The same weights, once with added rows and HF's names, once in three pieces."""
    a, b = open_checkpoint(source(HUB).path), source("HF, grouped queries")
    found = compare(a, a)
    assert (found.compared, found.differences, found.max_abs) == (len(a.tensors), (), 0.0)
    other = compare(a, open_checkpoint(b.path))
    assert {difference.max_abs for difference in other.differences if "shape" in difference.what} == {np.inf}
    assert other.compared < len(a.tensors)


def test_what_differs(source: Any) -> None:
    a = open_checkpoint(source(HUB).path)
    head = a.tensors[HEAD].read()
    head[7, 3] += 0.5
    b = changed(changed(a, HEAD, head), GATE, np.zeros((3, 48), np.float32))
    del b.tensors["multi_modal_projector.linear_2.bias"]
    b = changed(b, "model.more", np.zeros(3, np.float32))
    found = {difference.key: difference for difference in compare(a, b).differences}
    assert found.keys() == {HEAD, GATE, "multi_modal_projector.linear_2.bias", "model.more"}
    assert found[HEAD].max_abs == pytest.approx(0.5)
    assert found[GATE].what == "shape (64, 48) in A, (3, 48) in B"
    assert found["multi_modal_projector.linear_2.bias"].what == "only in A"
    assert found["model.more"].what == "only in B"
    assert compare(a, b).max_abs == np.inf


@pytest.mark.parametrize(
    ("of_a", "of_b", "expected"),
    [(0.0, -0.0, 0.0), (np.nan, np.nan, 0.0), (np.nan, 1.0, np.inf), (np.inf, np.inf, 0.0), (1.0, 2.0, 1.0)],
)
def test_strange_values(of_a: float, of_b: float, expected: float, source: Any) -> None:
    a = open_checkpoint(source(HUB).path)
    key = "vision_tower.vision_model.post_layernorm.bias"
    first, second = (np.zeros(128, np.float32) for _ in range(2))
    first[5], second[5] = of_a, of_b
    assert compare(changed(a, key, first), changed(a, key, second)).max_abs == expected


def test_dtypes_are_reported(source: Any, tmp_path: pathlib.Path) -> None:
    a = open_checkpoint(source(HUB).path)
    found = compare(a, a.cast(np.dtype(np.float16)))
    assert found.dtypes == {("float32", "float16")}
    assert 0 < found.max_abs < 1e-2


def test_logits_are_those_of_transformers(source: Any) -> None:
    """The fixed prompt's: the image first, then text."""
    given: Source = source("HF, grouped queries")
    ours = logits(open_checkpoint(given.path))
    model, features = given.torch_model(), 4
    ids = [ROWS - 20] * features + list(1 + np.arange(24) * max(1, 298 // 24))
    size, gradient = 28, np.linspace(0, 255, 28, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(gradient[:, None], gradient[None], 255 - gradient[None]), axis=-1)
    assert image.shape == (size, size, 3)
    from sg4v_jax.data.image import normalize_reference

    pixels = torch.from_numpy(normalize_reference(image).transpose(2, 0, 1).astype(np.float32))[None]
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, features:, :300]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-3)


def check(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str]]:
    """(exit status, lines printed) of `sg4v convert --check`."""
    capsys.readouterr()
    try:
        main(["convert", "--check", *argv])
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    return status, capsys.readouterr().out.splitlines()


def test_command_check(source: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0 for equal ones, whatever their formats, and 1 with the names of what differs."""
    given = source(HUB)
    a, b = str(given.path), str(tmp_path / "share4v")
    convert(open_checkpoint(a), b, layout="share4v")
    status, lines = check(capsys, a, b)
    count = len(given.state)
    assert (status, lines) == (
        0,
        [
            f"{count} tensors compared, 0 differ, at most 0",
            "logits of a fixed prompt about a fixed image differ by at most 0",
        ],
    )
    convert(open_checkpoint(a), tmp_path / "half", layout="hf", dtype="bfloat16")
    status, lines = check(capsys, a, str(tmp_path / "half"), "--weights-only")
    assert status == 1
    assert any(line.startswith(f"{HEAD}: float32 and bfloat16, max abs difference") for line in lines)
    assert lines[-2] == "stored as float32 in A, as bfloat16 in B"
    assert lines[-1].startswith(f"{count} tensors compared, ") and "logits" not in lines[-1]
    assert check(capsys, a, str(tmp_path / "half"), "--weights-only", "--tolerance=0.01")[0] == 0


def test_info(source: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every kind of directory, without its weights being read."""
    run = source("training run")
    facts = describe(open_checkpoint(run.path))
    tokenizer = (run.path / "tokenizer.model").read_bytes()
    assert facts["tokenizer"] == hashlib.sha256(tokenizer).hexdigest()
    assert (facts["layout"], facts["step"], facts["stage"]) == ("run", 7, "pretrain")
    assert sorted(facts["tuned"]) == ["projector", "text", "vision blocks 2-2"]
    assert facts["parameters"] == sum(value.numel() for value in run.state.values())
    assert facts["parts"]["text"]["shape"]["num_layers"] == 3
    assert not facts["problems"]
    main(["info", str(run.path)])
    shown = capsys.readouterr().out
    assert shown.strip() == as_text(facts).strip()
    assert "trained      step 7 of pretrain\n" in shown
    assert f"parameters   {facts['parameters']:,}\n" in shown
    main(["info", "--json", str(run.path)])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("HF, a dtype for each part", "Hugging Face LLaVA"),
        (SHARE4V, "original share4v / LLaVA-1.5"),
        ("LoRA on share4v", "LoRA merged with its base"),
        ("Vicuna + CLIP + mm_projector.bin", "LLaMA, a decoder to start from"),
    ],
)
def test_info_names_the_layout(
    name: str, layout: str, source: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["info", str(source(name).path)])
    shown = capsys.readouterr().out
    assert f"layout       {layout}\n" in shown
    if "dtype" in name:
        assert all(dtype in shown for dtype in ("bfloat16 (", "float16 (", "float32 ("))
    # Vicuna alone is no model; what it lacks is said, and how to get it.
    assert ("problem" in shown) == ("Vicuna" in name)
    if "Vicuna" in name:
        assert "--vision-tower" in shown and "--projector" in shown


def test_info_of_parts(source: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root = source("Vicuna + CLIP + mm_projector.bin").path.parent
    for path, layout in (
        (root / "clip", "CLIP vision tower"),
        (root / "mm_projector.bin", "projector alone"),
    ):
        main(["info", str(path)])
        assert f"layout       {layout}\n" in capsys.readouterr().out
