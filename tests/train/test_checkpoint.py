"""A checkpoint's place in the data, when another number of processes goes on."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sg4v_jax.convert.orbax import CHECKPOINTS
from sg4v_jax.data.loader import Loader, LoaderConfig
from sg4v_jax.data.mixture import Source
from sg4v_jax.data.sample import SampleFormat
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.train.checkpoint import Checkpointer
from tests.conftest import TinyWorld

FORM = SampleFormat(
    template="v1", aspect="pad", prompt="", image_size=12, image_tokens=4, length=512, image_slots=2
)


def loader(world: TinyWorld, shard: tuple[int, int]) -> Loader:
    config = LoaderConfig({"mix": Source(str(world.mix))}, FORM, 2, True, 8, seed=1, num_threads=1)
    return Loader(config, Tokenizer(world.tokenizer), shard)


@pytest.mark.parametrize("stopped", [1, 2])
def test_the_data_goes_on_where_it_stopped(
    stopped: int, tiny_world: TinyWorld, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With as many processes each takes its own state, with another number they are dealt out anew."""
    before = [iter(loader(tiny_world, (i, stopped))) for i in range(stopped)]
    for batches in before:
        next(batches)
    params, state = {"w": jnp.arange(3.0)}, {"mu": jnp.ones(3)}
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(7, params, state, before[0], {"step": 7})
    checkpointer.close()
    # This is one process; what the others would have written is put beside it.
    directory = tmp_path / CHECKPOINTS / "7" / "data"
    (written,) = directory.glob("*.json")
    written.unlink()
    for i, batches in enumerate(before):
        (directory / f"process_{i}-of-{stopped}.json").write_text(json.dumps(batches.get_state()))

    now = loader(tiny_world, (0, 1))
    after = iter(now)
    shapes: tuple[Any, Any] = jax.eval_shape(lambda: (params, state))
    found, found_state = Checkpointer(tmp_path, keep=1).restore(7, *shapes, after, now.resharded)
    np.testing.assert_array_equal(found["w"], params["w"])
    np.testing.assert_array_equal(found_state["mu"], state["mu"])
    if stopped == 1:
        assert after.get_state() == before[0].get_state()
        assert "no record is read twice" not in caplog.text
    else:
        assert after.get_state() == now.resharded([batches.get_state() for batches in before])
        assert "goes on where 2 readers stopped: no record is read twice and none left out" in caplog.text
    next(after)
