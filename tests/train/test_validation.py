"""Held-out losses against plain ones, sample by sample."""

import dataclasses
import os
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sg4v_jax.data.batch import from_rows
from sg4v_jax.data.build import decode_example, open_dataset
from sg4v_jax.data.sample import make_sample
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.train import groups
from sg4v_jax.train.initial import initial_params
from sg4v_jax.train.setup import loader_config, model_config, set_up
from sg4v_jax.train.validation import Validation
from tests.conftest import TinyWorld
from tests.train.test_resume import run_config


@pytest.mark.slow
def test_loss_is_the_mean_over_held_out_tokens(tiny_world: TinyWorld) -> None:
    """Packed rows, a last batch with empty ones, half as many rows as the train step's, another template."""
    config = run_config("packed, by a worker", tiny_world)
    config.train.accumulate = 2
    assert config.data.template != "v1"
    chosen = {"directory": os.fspath(tiny_world.mix), "num_records": 0, "template": "v1"}
    config.validation.update({"every": 3, **chosen})
    tokenizer, mesh = Tokenizer(tiny_world.tokenizer), make_mesh(**config.mesh)
    model = model_config(config, tokenizer)
    with jax.set_mesh(mesh):
        setup = set_up(config, model, mesh, 7)
        validation = Validation(config, setup, tokenizer, mesh, 7)
        params = initial_params(model, config.init.to_dict(), setup.shapes, setup.shardings, 0)
        # Larger weights, so that samples' losses differ.
        params = jax.tree.map(lambda x: 3 * x, params)
        found = validation(*groups.split(params, config.optim.groups))
    assert [step for step in range(1, 8) if validation.due(step)] == [3, 6, 7]

    form = dataclasses.replace(loader_config(config, model).form, template="v1")
    records = open_dataset(os.fspath(tiny_world.mix))

    @jax.jit
    def plain(batch: Any) -> tuple[jax.Array, jax.Array]:
        bound = nnx.merge(setup.graphdef, params)
        hidden = bound(batch.tokens, batch.positions, batch.segment_ids, batch.images, batch.image_index)
        log_probs = jax.nn.log_softmax(bound.text.logits(hidden))
        chosen = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
        right = (log_probs.argmax(-1) == batch.targets) * batch.loss_weights
        return (-chosen * batch.loss_weights).sum(), right.sum()

    sums = {"text": np.zeros(3), "image": np.zeros(3)}
    for index in range(len(records)):
        record, images = decode_example(records[index], source="mix", index=index)
        sample = make_sample(record, images, form, tokenizer)
        batch = from_rows([[sample]], form.length, form.image_slots, form.image_size)
        loss, right = plain(batch)
        sums["image" if images else "text"] += [loss, right, batch.loss_weights.sum()]
    loss, right, tokens = sums["text"] + sums["image"]
    expected = {"loss": loss / tokens, "accuracy": right / tokens, "supervised_tokens": tokens}
    expected |= {f"loss/modality/{name}": part[0] / part[2] for name, part in sums.items()}
    assert found.keys() == {f"validation/{name}" for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(found[f"validation/{name}"], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 2}, r"config\.validation\.directory is not set; give --config\.validation\.directory="),
        ({"directory": "held_out"}, r"config\.validation\.directory is set, and config\.validation\.every"),
    ],
)
def test_half_a_setting_is_an_error(tiny_world: TinyWorld, options: dict[str, Any], message: str) -> None:
    config = run_config("one sample a row", tiny_world)
    config.validation.update(options)
    tokenizer, mesh = Tokenizer(tiny_world.tokenizer), make_mesh(**config.mesh)
    setup = set_up(config, model_config(config, tokenizer), mesh, 1)
    with pytest.raises(ValueError, match=message):
        Validation(config, setup, tokenizer, mesh, 1)
