"""Model FLOPs against the matrix products of the step itself, counted in its jaxpr."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from sg4v_jax import config as configs
from sg4v_jax.data.batch import Batch
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.plan.flops import infer_flops, train_flops
from sg4v_jax.train import groups
from sg4v_jax.train.step import make_loss


def products(jaxpr: core.Jaxpr, times: int = 1) -> int:
    """FLOPs of the products with weights: those without a batch, which only attention has."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            if not batch:
                shape = equation.invars[0].aval.shape
                total += 2 * times * equation.outvars[0].aval.size * _product(shape[i] for i in contracted)
        inner_times = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                total += products(getattr(inner, "jaxpr", inner), inner_times)
    return total


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def _product(sizes: Any) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


@pytest.mark.parametrize(
    ("spec", "trained"),
    [
        ("configs/pretrain.py:tiny", None),
        ("configs/finetune.py:tiny", None),
        ("configs/finetune.py:tiny", (("projector/.*", 1.0), (".*", None))),
    ],
)
def test_train_flops(spec: str, trained: Any) -> None:
    config = configs.load(spec, **{"data.seq_len": 512, "data.image_slots": 2, "train.loss_chunk": 512})
    if trained:
        config.optim.groups = trained
    model = ModelConfig.from_dict(config.model.to_dict())
    graphdef, shapes, _ = abstract_model(model)
    trainable, frozen = groups.split(shapes, config.optim.groups)
    rows, length, slots = config.data.batch_size, config.data.seq_len, config.data.image_slots
    size = model.vision.image_size
    text = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    images = jax.ShapeDtypeStruct((rows, slots, size, size, 3), jnp.uint8)
    batch = Batch(
        text, text, jax.ShapeDtypeStruct((rows, length), jnp.float32), text, text, images, text, text
    )
    loss = make_loss(graphdef, compute_dtype=jnp.dtype("float32"), remat="none", loss_chunk=length)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(trainable, frozen, batch)
    # The loss computes its logits again, to never have them whole.
    again = 2 * rows * length * model.text.hidden_size * model.text.vocab_size
    tower = model.vision
    tunes = any(path.startswith("vision/") for path, _ in groups.flatten(trainable))
    blocks = tower.tuned_from + (3 if tunes else 1) * (tower.num_used_layers - tower.tuned_from)
    attention = blocks * rows * slots * 4 * (tower.num_patches + 1) ** 2 * tower.hidden_size
    width = model.text.num_heads * model.text.head_dim
    attention += 3 * model.text.num_layers * 4 * rows * slots * (length / slots) ** 2 / 2 * width
    assert train_flops(config, model) - attention == pytest.approx(products(jaxpr.jaxpr) - again, rel=0.02)


def test_infer_flops_of_7b() -> None:
    """Two operations a parameter and position, and what attention adds."""
    model = ModelConfig()
    decode = infer_flops(model, rows=4, positions=1, context=1000, images=0)
    parameters = 6_738_415_616 - 32000 * 4096
    assert decode == pytest.approx(4 * (2 * parameters + 4 * 1000 * 32 * 4096), rel=1e-3)
