"""Eight devices compute what one does, each holding its part; and the rules that decide which part."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, PartitionSpec

from sg4v_jax.kernels.cycles import target
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel import rules
from sg4v_jax.parallel.mesh import make_mesh, row_shard
from sg4v_jax.train.groups import flatten
from tests.parallel.cases import CASES, Case
from tests.tiny import model_config

# Never to be relaxed: relative for the loss; for gradients against the largest of them all, which is of
# order 0.1 to 1; absolute for weights of order 0.2.
TOLERANCE = 1e-5
REPOSITORY = pathlib.Path(__file__).parents[2]
slow_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def on_devices() -> dict[str, Any]:
    """What `run_on_devices.py` reports."""
    environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)}
    script = REPOSITORY / "tests/parallel/run_on_devices.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@slow_cases
def test_devices_agree_with_one(case: Case, on_devices: Any, record_property: Any) -> None:
    """On packed rows, padded ones and rows without an image; one device recomputes and cuts up nothing."""
    found = on_devices[case.name]
    for what in ("loss_error", "gradient_error", "weight_error"):
        print(f"{case.name}: {what} {found[what]:.1e}")
        record_property(what, found[what])
        assert found[what] <= TOLERANCE, what


@pytest.mark.slow
@slow_cases
def test_moments_lie_like_their_parameters(case: Case, on_devices: Any) -> None:
    """Left to itself, jit replicates them: eight times the memory, and a second compilation."""
    found = on_devices[case.name]
    assert found["moments_lie_like_params"]
    assert "text/blocks/mlp/up/kernel" in found["split_moments"]
    if "tensor" in case.mesh:
        assert found["specs"]["text/blocks/mlp/up/kernel"] == [None, "fsdp", "tensor"]
        assert found["specs"]["text/embedding"] == [["tensor", "fsdp"], None]
    key = found["specs"]["text/blocks/attention/key/kernel"]
    # Two heads are split over two devices; a single one is on both.
    assert ("tensor" in key) == (case.kv_heads > 1)
    assert not any("slices" in spec or "data" in spec for spec in found["specs"].values())


@pytest.mark.slow
@slow_cases
def test_one_compilation(case: Case, on_devices: Any) -> None:
    """Nothing at all is compiled from the second step on, whatever is in the batch."""
    found = on_devices[case.name]
    assert (found["compiled"], found["compiled_later"]) == (1, [])


@pytest.mark.slow
@slow_cases
def test_frozen_blocks_are_only_read(case: Case, on_devices: Any) -> None:
    """They have no gradient, no moment, and what they compute is not kept for a backward pass."""
    found = on_devices[case.name]
    assert not any(path.startswith(("vision/frozen", "vision/unused")) for path in found["trained"])
    assert not found["frozen_moved"] and not found["kept_of_frozen"]
    # The same search does find what is kept of the others.
    assert found["kept_of_tuned"] == (case.tuned_from < 5)


@pytest.mark.slow
@slow_cases
def test_activations_stay_where_they_are(case: Case, on_devices: Any) -> None:
    """Nobody holds more rows than its own or a whole table of embeddings: XLA falls back to that, with or
    without a word, when it finds no way from one sharding to another ("involuntary rematerialization")."""
    found = on_devices[case.name]
    assert found["whole_activations"] == found["gathered_activations"] == found["whole_tables"] == []
    assert "all-gather" in found["kinds"]


@pytest.mark.slow
def test_a_table_split_like_the_batch_is_found(on_devices: Any) -> None:
    assert on_devices["control"]


@pytest.mark.slow
@slow_cases
def test_only_sums_cross_slices(case: Case, on_devices: Any) -> None:
    """Of gradients and of numbers; no weights and no activations."""
    found = on_devices[case.name]
    assert found["crossing_kinds"] == (["all-reduce"] if "slices" in case.mesh else [])
    assert found["crossing_activations"] == []


@pytest.mark.slow
def test_minus_one_takes_the_rest(on_devices: Any) -> None:
    assert on_devices["rest"] == {"slices": 1, "data": 2, "fsdp": 2, "tensor": 2}


MESH = AbstractMesh((2, 1, 4, 2), rules.MESH_AXES)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (48, 64), ("fsdp", "tensor")),
        # A leading axis without a name is the stack of layers.
        (("embed", "mlp"), (3, 48, 64), (None, "fsdp", "tensor")),
        # What doesn't divide is replicated, dimension by dimension.
        (("embed", "mlp"), (50, 64), (None, "tensor")),
        (("embed", "heads", "head_dim"), (48, 3, 16), ("fsdp", None, None)),
        (("embed", "kv_heads", "head_dim"), (48, 1, 16), ("fsdp", None, None)),
        (("batch", "length", None), (16, 40, 48), (("slices", "data", "fsdp"), None, None)),
        (("batch", "length", None), (4, 40, 48), (None, None, None)),
        (("vocab", None), (64, 48), ("tensor", None)),
        ((None,), (48,), (None,)),
    ],
)
def test_spec(axes: Any, shape: tuple[int, ...], expected: tuple[Any, ...]) -> None:
    assert rules.spec(axes, shape, MESH) == PartitionSpec(*expected)


def test_every_parameter_has_known_axes() -> None:
    _, shapes, axes = abstract_model(model_config())
    leaves = dict(flatten(shapes))
    for path, names in flatten(axes):
        assert len(names) in (len(leaves[path].shape), len(leaves[path].shape) - 1), path
        assert all(name is None or name in rules.RULES for name in names), path


def test_constrain_does_nothing_without_a_mesh() -> None:
    x = jax.numpy.ones((2, 3))
    assert rules.constrain(x, ("batch", None)) is x


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 3}, {"data": -1, "fsdp": -1}, {"tensor": 0}, {"data": -2}, {"data": 2, "fsdp": 2}]
)
def test_meshes_that_do_not_fit(sizes: dict[str, int]) -> None:
    devices = jax.devices()[:1] * 8
    default = {"slices": 1, "data": 1, "fsdp": -1, "tensor": 1}
    shown = " x ".join(f"{axis}={size}" for axis, size in (default | sizes).items())
    with pytest.raises(ValueError, match=f"mesh {shown} does not fit 8 devices"):
        make_mesh(**sizes, devices=devices)


def grid(mesh: jax.sharding.Mesh, what: str) -> Any:
    return np.vectorize(lambda device: getattr(device, what))(mesh.devices)


def test_slices_of_tpus() -> None:
    """Each along the first axis, in whatever order its devices come; as many as there are, or an error."""
    devices = topology("v5e:2x2", num_slices=2)
    for given in (devices, devices[::-1]):
        mesh = make_mesh(tensor=2, devices=given)
        assert dict(mesh.shape) == {"slices": 2, "data": 1, "fsdp": 2, "tensor": 2}
        assert [set(row.flat) for row in grid(mesh, "slice_index")] == [{0}, {1}]
    for slices in (1, 4):
        with pytest.raises(ValueError, match=f"slices={slices} .*are of 2 TPU slices; set slices=2, or -1"):
            make_mesh(slices=slices, devices=devices)
    with pytest.raises(ValueError, match="the devices are of 1 TPU slices"):
        make_mesh(slices=2, devices=devices[:4])


def test_axes_that_a_torus_does_not_have() -> None:
    """32 is no side of 4 x 4 x 4, nor a product of sides."""
    mesh = make_mesh(fsdp=32, tensor=2, devices=topology("v5p:4x4x4"))
    assert len(set(grid(mesh, "id").flat)) == 64


@pytest.mark.parametrize(
    ("sizes", "hosts", "readers"),
    [({}, 4, 4), ({"tensor": 2}, 4, 4), ({"tensor": 4}, 4, 2), ({"tensor": 16}, 4, 1), ({"data": 2}, 4, 4)],
)
def test_who_reads_what(
    sizes: dict[str, int], hosts: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts of 2 x 2 chips: with four ways of tensor two of them hold the same rows, and read the same."""
    mesh = make_mesh(**sizes, devices=topology("v5e:4x4"))
    shards = []
    for host in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shards.append(row_shard(mesh))
    assert {count for _, count in shards} == {readers}
    indices = sorted(index for index, _ in shards)
    assert indices == sorted(list(range(readers)) * (hosts // readers))


def test_rows_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(tensor=4, devices=topology("v5e:4x4"))
    # Host 0 keeps chips of rows 0 and 1, host 1 those of 1 and 2: neither the same nor apart.
    one = mesh.devices.reshape(4, 4)
    mixed = [[*one[0]], [*one[1, :2], *one[2, :2]], [*one[1, 2:], *one[2, 2:]], [*one[3]]]
    axis_types = mesh.axis_types
    mesh = jax.sharding.Mesh(np.array(mixed).reshape(1, 1, 4, 4), rules.MESH_AXES, axis_types=axis_types)
    with pytest.raises(ValueError, match="can't be divided among its 4 processes; make tensor divide"):
        row_shard(mesh)


def topology(name: str, **options: Any) -> list[Any]:
    """Devices of a TPU that isn't there."""
    target.prepare()
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
