"""What a save costs the loop, and what the manifest costs a save and a restart.

python benchmarks/checkpoint.py --megabytes=512
"""

import argparse
import json
import pathlib
import shutil
import tempfile
import time

import grain
import jax
import jax.numpy as jnp

from sg4v_jax.convert import manifest
from sg4v_jax.convert.orbax import CHECKPOINTS
from sg4v_jax.train.checkpoint import Checkpointer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    arguments = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 16)
    params = {
        f"{i:02d}": jax.random.normal(key, (arguments.megabytes // 16, 1 << 18)) for i, key in enumerate(keys)
    }
    jax.block_until_ready(params)
    data = iter(grain.MapDataset.source([0, 1]).to_iter_dataset(grain.ReadOptions(num_threads=0)))
    workdir = pathlib.Path(tempfile.mkdtemp(prefix="sg4v-checkpoint-"))
    listing: list[float] = []
    write = manifest.write

    def timed(*paths: pathlib.Path) -> None:
        start = time.perf_counter()
        write(*paths)
        listing.append(time.perf_counter() - start)

    manifest.write = timed
    rows = []
    try:
        for step in (1, 2, 3):
            checkpointer = Checkpointer(workdir, keep=1)
            start = time.perf_counter()
            checkpointer.save(step, params, {"count": jnp.zeros(())}, data, {"step": step})
            blocked = time.perf_counter() - start
            checkpointer.close()
            whole = time.perf_counter() - start
            start = time.perf_counter()
            assert not manifest.problems(workdir / CHECKPOINTS / str(step))
            check = time.perf_counter() - start
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
            again = Checkpointer(workdir, keep=1)
            start = time.perf_counter()
            count = {"count": jax.ShapeDtypeStruct((), jnp.float32)}
            jax.block_until_ready(again.restore(step, shapes, count, data, lambda states: states[0]))
            restore = time.perf_counter() - start
            row = {
                "save": whole,
                "loop held up": blocked,
                "manifest": listing[-1],
                "check": check,
                "restore": restore,
            }
            rows.append({name: round(seconds, 3) for name, seconds in row.items()})
    finally:
        shutil.rmtree(workdir)
    best = min(rows, key=lambda row: row["save"])
    ratios = {
        "loop held up / save": best["loop held up"] / best["save"],
        "manifest / save": best["manifest"] / best["save"],
        "check / restore": best["check"] / best["restore"],
    }
    rounded = {name: round(ratio, 3) for name, ratio in ratios.items()}
    print(json.dumps({"megabytes": arguments.megabytes, "seconds": rows, "ratios": rounded}, indent=1))


if __name__ == "__main__":
    main()
