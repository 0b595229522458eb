"""Model FLOPs against two that count what is really computed: the jaxpr's products, and XLA."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

from sg4v_jax import config as configs
from sg4v_jax.models.config import ModelConfig, TextConfig, VisionConfig
from sg4v_jax.models.flops import ModelFlops, model_flops
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.train import groups
from tests.tiny import GROUPS, model_config

ROWS, LENGTH, SLOTS = 2, 12, 1
RECIPES = {
    "all": ((("vision/(unused|post_norm)/.*", None), (".*", 1.0)), 0),
    "from block k": (GROUPS, 2),
    "projector": ((("projector/.*", 1.0), (".*", None)), 3),
    "decoder": ((("text/.*", 1.0), (".*", None)), 3),
    "head": ((("text/head/.*", 1.0), (".*", None)), 3),
    "nothing": (((".*", None),), 3),
}


def lower(config: ModelConfig, recipe: Any) -> tuple[Any, tuple[Any, ...], ModelFlops]:
    """The plain loss with its gradients, what it takes, and our count for it."""
    graphdef, shapes, _ = abstract_model(config)
    trainable, frozen = groups.split(shapes, recipe)
    size = config.vision.image_size
    whole = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    images = jax.ShapeDtypeStruct((ROWS, SLOTS, size, size, 3), jnp.uint8)

    def loss(trainable: Any, frozen: Any, text: Any, images: Any) -> jax.Array:
        model = nnx.merge(graphdef, groups.merge(trainable, frozen))
        # Every position sees every key here, as far as the count goes: the plain attention masks.
        hidden = model(text, text, text, images, text)
        return jax.nn.logsumexp(model.text.logits(hidden), axis=-1).sum()

    function = jax.value_and_grad(loss) if trainable else loss
    trained = {path for path, _ in groups.flatten(trainable)}
    return function, (trainable, frozen, whole, images), model_flops(config, shapes, trained)


def products(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all matrix products of a jaxpr; a scan's body counts as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2 * out * math.prod(shape[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                total += times * products(getattr(inner, "jaxpr", inner))
    return total


def is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_of_the_jaxpr(recipe: str) -> None:
    """Exactly: stacks of several blocks, grouped queries, and every way of freezing."""
    named, tuned_from = RECIPES[recipe]
    function, arguments, flops = lower(model_config(tuned_from=tuned_from), named)
    expected = products(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert flops.of(ROWS * SLOTS, ROWS * LENGTH, ROWS * LENGTH**2) == expected


@pytest.mark.slow
def test_xla_s_own_count() -> None:
    """Of one block each, for XLA counts a loop's body once; and wide, for it counts what is elementwise."""
    vision = VisionConfig(256, 512, 3, 2, image_size=28, patch_size=14, tuned_from=1)
    text = TextConfig(512, 256, 512, num_layers=1, num_heads=4, num_kv_heads=2)
    function, arguments, flops = lower(ModelConfig(vision, text), GROUPS)
    found = jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]
    expected = flops.of(ROWS * SLOTS, ROWS * LENGTH, ROWS * LENGTH**2)
    assert 0.95 < expected / found <= 1, (expected, found)


def test_the_paper_s_sizes() -> None:
    """Six per parameter and token, to which attention and the tower come; frozen parts cost a third."""
    config = ModelConfig.from_dict(configs.load("configs/pretrain.py:7b").model.to_dict())
    shapes = abstract_model(config)[1]
    everything = {path for path, _ in groups.flatten(shapes)}
    flops = model_flops(config, shapes, everything)
    # All of Vicuna's parameters but the embedding, which is looked up, and the norms.
    assert flops.per_token == 6 * (6_738_415_616 - 32000 * 4096 - 65 * 4096)
    assert flops.per_pair == 12 * 4096 * 32
    forward = model_flops(config, shapes, ())
    np.testing.assert_allclose(forward.per_token, flops.per_token / 3)
    # timm counts 191.1 G multiply-adds for CLIP's ViT-L/14-336; of its 24 blocks 23 are computed.
    projector = 2 * 576 * (1024 * 4096 + 4096 * 4096)
    np.testing.assert_allclose(forward.per_image - projector, 2 * 191.1e9 * 23 / 24, rtol=0.01)
    frozen_half = model_flops(config, shapes, {path for path in everything if "vision/frozen" not in path})
    assert forward.per_image < frozen_half.per_image <= flops.per_image
    assert dataclasses.asdict(forward)["per_pair"] * 3 == flops.per_pair
