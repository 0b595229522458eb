"""Training runs: what tuning changed and what it left, and the start of training on several devices."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import torch

from sg4v_jax.convert.compare import compare
from sg4v_jax.convert.huggingface import read_config
from sg4v_jax.convert.load import convert, open_checkpoint
from sg4v_jax.convert.orbax import read_meta
from sg4v_jax.convert.params import to_params
from sg4v_jax.models.sharegpt4v import resplit_vision
from tests.convert.writers import Source, as_arrays, peer, save_run, state_of, write_hf

REPOSITORY = pathlib.Path(__file__).parents[2]
TOWER = "vision_tower.vision_model."


@pytest.fixture(scope="module")
def origin(tokenizer_file: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """What training starts from, in bfloat16 like the published ones."""
    directory = tmp_path_factory.mktemp("origin")
    return write_hf(directory, state_of(peer(), torch.bfloat16), peer().config, tokenizer_file)


def trained(origin: Source, directory: pathlib.Path, tuned_from: int, *, step: int = 7) -> None:
    """A run that started from `origin`: frozen weights in bfloat16, float32 masters that moved."""
    config = read_config(origin.hf_config.to_dict()).with_tuned_from(tuned_from)
    params = resplit_vision(to_params(config.with_tuned_from(0), as_arrays(origin.state)), tuned_from)
    vision = {
        name: _moved(leaves) if name == "tuned" else leaves for name, leaves in params["vision"].items()
    }
    moved = {"vision": vision, "projector": _moved(params["projector"]), "text": _moved(params["text"])}
    tokenizer = origin.path / "tokenizer.model"
    save_run(directory, config, moved, tokenizer, step=step)


def _moved(leaves: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(np.float32) * 1.5 + 0.25, leaves)


@pytest.mark.parametrize(("target", "tuned_from"), [("hf", 2), ("share4v", 0), ("share4v", 2), ("run", 3)])
def test_exactly_the_tuned_blocks_differ(
    target: str, tuned_from: int, origin: Source, tmp_path: pathlib.Path
) -> None:
    """Block 3 lies above the features and is never trained; `tuned_from` 3 tunes no block."""
    trained(origin, tmp_path / "run", tuned_from)
    convert(open_checkpoint(tmp_path / "run"), tmp_path / "out", layout=target)
    exported = open_checkpoint(tmp_path / "out")
    assert {tensor.dtype.name for tensor in exported.tensors.values()} == {"bfloat16"}
    found = compare(open_checkpoint(origin.path), exported)
    differ = {difference.key for difference in found.differences}
    tuned = tuple(f"{TOWER}encoder.layers.{i}." for i in range(tuned_from, 3))
    expected = {key for key in exported.tensors if not key.startswith(TOWER) or key.startswith(tuned)}
    assert differ == expected
    assert found.compared == len(exported.tensors) == len(origin.state)


def test_dtypes_of_a_run(origin: Source, tmp_path: pathlib.Path) -> None:
    """Masters are rounded unless asked for; then they come out as they are, frozen weights too."""
    trained(origin, tmp_path / "run", 2)
    opened = open_checkpoint(tmp_path / "run")
    stored = {key: tensor.dtype.name for key, tensor in opened.tensors.items()}
    assert set(stored.values()) == {"bfloat16", "float32"}
    convert(opened, tmp_path / "exact", layout="hf", dtype="float32")
    convert(opened, tmp_path / "rounded", layout="hf")
    assert compare(opened, open_checkpoint(tmp_path / "exact")).max_abs == 0
    rounded = compare(opened, open_checkpoint(tmp_path / "rounded"))
    assert 0 < rounded.max_abs < 0.02
    assert {stored[difference.key] for difference in rounded.differences} == {"float32"}
    # Converted once more, a bfloat16 run stays what it is.
    convert(open_checkpoint(tmp_path / "rounded"), tmp_path / "again", layout="run")
    assert compare(open_checkpoint(tmp_path / "rounded"), open_checkpoint(tmp_path / "again")).max_abs == 0


def test_history_goes_along(origin: Source, tmp_path: pathlib.Path) -> None:
    """The newest checkpoint is taken, and later formats still say what was trained."""
    for step in (3, 9):
        trained(origin, tmp_path / "run", 2, step=step)
    expected = {
        "step": 9,
        "stage": "pretrain",
        "tuned": ["vision blocks 2-2", "projector", "text"],
    }
    path = tmp_path / "run"
    for i, target in enumerate(("hf", "run", "share4v", "hf")):
        convert(open_checkpoint(path), tmp_path / f"{i}", layout=target)
        path = tmp_path / f"{i}"
        history = open_checkpoint(path).usage.history
        assert {**history, "tuned": sorted(history["tuned"])} == {
            **expected,
            "tuned": sorted(expected["tuned"]),
        }


def test_a_converted_run_is_one_of_no_steps(origin: Source, tmp_path: pathlib.Path) -> None:
    convert(open_checkpoint(origin.path), tmp_path / "out", layout="run")
    meta = read_meta(tmp_path / "out")
    assert (meta["step"], meta["stage"]) == (0, "converted")
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["0"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoints", "tokenizer.model"]


DEVICES = """
import json, pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from sg4v_jax.convert.load import open_checkpoint
from sg4v_jax.convert.params import from_params
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.parallel.placement import param_shardings
from sg4v_jax.train.groups import flatten
from sg4v_jax.train.initial import initial_params

report = {}
for path in sys.argv[1:]:
    opened = open_checkpoint(path)
    config = opened.config.with_tuned_from(2)
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        _, shapes, axes = abstract_model(config)
        shardings = param_shardings(shapes, axes, mesh)
        sources = dict.fromkeys(("vision", "projector", "text"), path)
        params = initial_params(config, sources, shapes, shardings, seed=0)
    leaves, wanted = dict(flatten(params)), dict(flatten(shardings))
    tensors = from_params(config, params)
    report[path] = {
        "as wanted": all(
            leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim) for name, leaf in leaves.items()
        ),
        "split": sum(leaf.addressable_shards[0].data.size < leaf.size for leaf in leaves.values()),
        "differ": [
            key for key, tensor in opened.tensors.items()
            if not np.array_equal(tensor.read().astype(np.float32), tensors[key].read())
        ],
        "tensors": len(tensors),
    }
print(json.dumps(report))
"""


@pytest.mark.slow
def test_training_starts_from_what_was_converted(origin: Source, tmp_path: pathlib.Path) -> None:
    """On eight devices, each parameter in its shards, to the bit; from a run, from HF and from share4v."""
    paths = [str(origin.path)]
    for target in ("run", "share4v"):
        paths.append(str(tmp_path / target))
        convert(open_checkpoint(origin.path), paths[-1], layout=target)
    environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)}
    command = [sys.executable, "-c", DEVICES, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for path in paths:
        found = report[path]
        assert found["as wanted"] and found["split"] > 20, path
        assert (found["differ"], found["tensors"]) == ([], len(origin.state)), path
