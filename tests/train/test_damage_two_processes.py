"""Damage that only one of two processes can see: both fall back to the same step."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import grain
import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from sg4v_jax.convert import manifest
from sg4v_jax.convert.orbax import CHECKPOINTS
from sg4v_jax.parallel import distributed
from sg4v_jax.train.checkpoint import DAMAGED, Checkpointer
from tests.parallel.test_distributed import free_port

REPOSITORY = pathlib.Path(__file__).parents[2]
STEPS = (1, 2, 3)


def process(workdir: pathlib.Path, output: pathlib.Path) -> None:
    """One of the two: saves, spoils the newest checkpoint, and asks where to go on."""
    distributed.initialize()
    index, count = jax.process_index(), jax.process_count()
    mesh = jax.make_mesh((count,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))

    def array(step: int) -> jax.Array:
        values = np.arange(6000.0, dtype=np.float32) + step
        return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])

    def data() -> grain.DatasetIterator:
        return iter(grain.MapDataset.source([0, 1]).to_iter_dataset(grain.ReadOptions(num_threads=0)))

    def save(checkpointer: Checkpointer, step: int) -> None:
        checkpointer.save(step, {"w": array(step)}, {"mu": array(-step)}, data(), {"step": step}, needed=True)

    said: dict[str, Any] = {}
    checkpointer = Checkpointer(workdir, keep=9)
    for step in STEPS:
        save(checkpointer, step)
    checkpointer.close()
    newest = workdir / CHECKPOINTS / str(STEPS[-1])
    if index == 1:
        listed = json.loads((newest / manifest.ITEM / manifest.FILE).read_text())["files"]
        path = newest / sorted(listed, key=lambda name: (-listed[name][0], name))[1]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")
    said["problems"] = manifest.problems(newest, share=(index, count))
    multihost_utils.sync_global_devices("looked")

    checkpointer = Checkpointer(workdir, keep=9)
    latest = checkpointer.latest_step()
    assert latest is not None
    shape = jax.ShapeDtypeStruct((6000,), np.float32, sharding=sharding)
    params, opt_state = checkpointer.restore(
        latest, {"w": shape}, {"mu": shape}, data(), lambda states: states[index]
    )
    said["latest"] = latest
    for name, leaf in (("w", params["w"]), ("mu", opt_state["mu"])):
        said[name] = [float(shard.data[0]) for shard in leaf.addressable_shards]
    # Its step can be saved again.
    save(checkpointer, STEPS[-1])
    checkpointer.close()
    said["again"] = Checkpointer(workdir, keep=9).latest_step()
    (output / f"{index}.json").write_text(json.dumps(said))


@pytest.mark.slow
def test_both_go_back_to_the_same_step(tmp_path: pathlib.Path) -> None:
    workdir, output = tmp_path / "run", tmp_path
    base = {name: value for name, value in os.environ.items() if not name.startswith("SG4V_")}
    base |= {"PYTHONPATH": os.fspath(REPOSITORY), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    base |= {"SG4V_JOIN_TIMEOUT": "600", "SG4V_NUM_PROCESSES": "2"}
    base["SG4V_COORDINATOR"] = f"localhost:{free_port()}"
    module = "tests.train.test_damage_two_processes"
    script = (
        f"import pathlib\nfrom {module} import process\n"
        f"process(pathlib.Path({os.fspath(workdir)!r}), pathlib.Path({os.fspath(output)!r}))"
    )
    with contextlib.ExitStack() as stack:
        running, logs = [], []
        for index in range(2):
            logs.append(stack.enter_context((tmp_path / f"{index}.log").open("w+")))
            own = base | {"SG4V_PROCESS_ID": str(index)}
            child = subprocess.Popen(
                [sys.executable, "-c", script], env=own, cwd=REPOSITORY, stdout=logs[-1], stderr=logs[-1]
            )
            stack.callback(child.kill)
            running.append(child)
        codes = [child.wait() for child in running]
    texts = [(tmp_path / f"{index}.log").read_text() for index in range(2)]
    assert codes == [0, 0], "\n".join(text[-2000:] for text in texts)
    first, second = (json.loads((output / f"{index}.json").read_text()) for index in range(2))
    assert first["problems"] == [] and "its checksum is another one" in second["problems"][0]
    assert (first["latest"], second["latest"]) == (2, 2)
    assert (first["w"], second["w"]) == ([2.0], [3002.0])
    assert (first["mu"], second["mu"]) == ([-2.0], [2998.0])
    # The first one does not see it, and is told; the second says which file.
    assert "another process says where" in texts[0] and second["problems"][0] in texts[1]
    assert (first["again"], second["again"]) == (3, 3)
    assert [path.name for path in (workdir / DAMAGED).iterdir()] == ["3"]
