"""The schedule, the groups and AdamW, against `torch` and `transformers`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from sg4v_jax.convert.huggingface import read_config
from sg4v_jax.convert.params import to_params
from sg4v_jax.data.batch import Batch
from sg4v_jax.data.image import normalize_reference
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.train import groups
from sg4v_jax.train.optimizer import make_optimizer, warmup_cosine
from sg4v_jax.train.step import make_train_step
from tests.tiny import GROUPS, jit, random_sample
from tests.torch_llava import arrays, llava_config, llava_model

# Absolute limits, never to be relaxed.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4

PARAMS = {
    "vision": {"frozen": {"kernel": 1.0}, "tuned": {"kernel": 2.0, "bias": 3.0}},
    "text": {"norm": {"scale": 4.0}, "embedding": 5.0},
}


@pytest.mark.parametrize(
    ("num_steps", "ratio"), [(1, 0.03), (2, 0.5), (7, 0.0), (10, 0.03), (100, 0.03), (5, 1.0), (4871, 0.03)]
)
def test_schedule_is_that_of_transformers(num_steps: int, ratio: float) -> None:
    """At every step, from the first, whose rate is 0, to the last."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(ratio * num_steps), num_steps)
    expected = [2e-5 * scheduler.lr_lambdas[0](step) for step in range(num_steps)]
    found = jax.vmap(warmup_cosine(2e-5, ratio, num_steps))(jnp.arange(num_steps))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * 1e-6)
    assert warmup_cosine(2e-5, ratio, num_steps)(num_steps + 3) == 0, "the rate must not rise again"


def test_first_matching_group_counts() -> None:
    rules = (("vision/frozen/.*", None), ("vision/.*/bias", 0.1), (".*", 1.0))
    assert groups.assign(PARAMS, rules) == {
        "vision/frozen/kernel": None,
        "vision/tuned/kernel": 1.0,
        "vision/tuned/bias": 0.1,
        "text/norm/scale": 1.0,
        "text/embedding": 1.0,
    }
    trainable, _ = groups.split(PARAMS, rules)
    assert groups.multiplier_tree(trainable, rules)["vision"] == {"tuned": {"kernel": 1.0, "bias": 0.1}}


def test_split_and_merge_are_inverse() -> None:
    trainable, frozen = groups.split(PARAMS, (("vision/frozen/.*", None), (".*", 1.0)))
    assert frozen == {"vision": {"frozen": {"kernel": 1.0}}}
    assert "frozen" not in trainable["vision"]
    assert groups.merge(trainable, frozen) == PARAMS
    assert groups.unflatten(dict(groups.flatten(PARAMS))) == PARAMS
    assert groups.split(PARAMS, ((".*", None),)) == ({}, PARAMS)


def test_uncovered_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"covers: text/norm/scale, text/embedding$"):
        groups.assign(PARAMS, (("vision/.*", 1.0),))
    # A regex has to match the whole path.
    with pytest.raises(ValueError, match="vision/tuned/bias"):
        groups.assign(PARAMS, (("vision/.*/kernel", 1.0), ("vision/tuned/b", 1.0), ("text/.*", 1.0)))


def test_idle_groups_are_named() -> None:
    with pytest.raises(ValueError, match=r"'visoin/\.\*'"):
        groups.assign(PARAMS, (("visoin/.*", None), (".*", 1.0)))
    with pytest.raises(ValueError, match=r"'text/\.\*'"):
        groups.assign(PARAMS, ((".*", 1.0), ("text/.*", None)))


def optimizer_for(params: Any, rules: groups.Groups, **changes: Any) -> optax.GradientTransformation:
    constants = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0}
    return make_optimizer(params, rules, **{"schedule": optax.constant_schedule(0.1), **constants, **changes})


def test_decay_spares_biases_and_norms_and_follows_the_multiplier() -> None:
    params = jax.tree.map(jnp.float32, PARAMS)
    optimizer = optimizer_for(params, (("text/.*", 0.5), (".*", 1.0)), weight_decay=0.2)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    found = dict(groups.flatten(updates))
    assert found["vision/tuned/bias"] == found["text/norm/scale"] == 0
    np.testing.assert_allclose(found["vision/tuned/kernel"], -0.1 * 0.2 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(found["text/embedding"], -0.1 * 0.2 * 5.0 * 0.5, rtol=1e-6)


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, 50.0), (10.0, 10.0), (100.0, 50.0)])
def test_gradients_are_clipped_to_their_global_norm(clip_norm: float, expected: float) -> None:
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    optimizer = optimizer_for(params, ((".*", 1.0),), clip_norm=clip_norm)
    gradients = {"a": jnp.array([30.0, 0.0]), "b": jnp.array([40.0])}
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    # After one step the first moment is 0.1 times what passed the clip.
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moment) / 0.1, expected, rtol=1e-5)
    np.testing.assert_allclose(moment["a"][0] / moment["b"][0], 0.75, rtol=1e-6)


# --- The same ten steps in both worlds -----------------------------------------------------------

IMAGE_TOKEN, VOCAB, STEPS = 1, 96, 10
# A shift of all keys is invisible to softmax: the true gradient of this bias is 0. Adam would turn
# its rounding errors, which differ, into steps of full size.
KEY_BIAS = ("vision/tuned/attention/key/bias", None)

RECIPES: dict[str, dict[str, Any]] = {
    # As the original pre-trains (spec 4.1), and everything that it could have switched on.
    "pretrain": {"tuned_from": 2, "multipliers": (1.0, 1.0, 1.0), "weight_decay": 0.0, "clip_norm": 0.0},
    "groups": {"tuned_from": 1, "multipliers": (0.2, 5.0, 1.0), "weight_decay": 0.1, "clip_norm": 0.5},
}


def batch_pair(config: ModelConfig, seed: int) -> tuple[dict[str, torch.Tensor], Batch]:
    """Rows with 0, 1, 2 and 1 images as `transformers` wants them, and as a `Batch`."""
    generator = np.random.default_rng(seed)
    rows, length, slots, size = (0, 1, 2, 1), 24, 2, config.vision.image_size
    shape = (len(rows), length)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    weights, image_index = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
    images = np.zeros((len(rows), slots, size, size, 3), np.uint8)
    for i, count in enumerate(rows):
        sample = random_sample(config, generator, count, int(generator.integers(6, 12)))
        n = len(sample["tokens"])
        tokens[i, :n], targets[i, :n], segments[i, :n] = sample["tokens"], sample["targets"], 1
        weights[i, :n], is_image = sample["loss_weights"], sample["is_image"] > 0
        image_index[i, :n] = np.where(is_image, np.cumsum(is_image) - 1, -1)
        images[i, :count] = sample["images"]
    ours = Batch(
        tokens=tokens,
        targets=targets,
        loss_weights=weights,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        segment_ids=segments,
        images=images,
        image_index=image_index,
        kinds=np.zeros(shape, np.int32),
    )
    labels = np.full(shape, -100)
    labels[:, 1:] = np.where(weights[:, :-1] > 0, targets[:, :-1], -100)
    used = np.concatenate([images[i, :count] for i, count in enumerate(rows)])
    theirs = {
        "input_ids": np.where(image_index >= 0, IMAGE_TOKEN, tokens).astype(np.int64),
        "attention_mask": segments.astype(np.int64),
        "labels": labels,
        "pixel_values": np.ascontiguousarray(normalize_reference(used).transpose(0, 3, 1, 2)),
    }
    return {name: torch.from_numpy(array) for name, array in theirs.items()}, ours


def torch_run(model: Any, recipe: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """Losses of torch.optim.AdamW with transformers' schedule."""
    fixed = ["embeddings.", "pre_layrnorm.", *(f"encoder.layers.{i}." for i in range(recipe["tuned_from"]))]
    fixed_parts = tuple(f"model.vision_tower.{part}" for part in fixed)
    prefixes = ("model.vision_tower.", "model.multi_modal_projector.", "")
    torch_groups = []
    taken: set[str] = set()
    for prefix, multiplier in zip(prefixes, recipe["multipliers"], strict=True):
        for decays in (True, False):
            members = []
            for name, parameter in model.named_parameters():
                spared = name.endswith("bias") or "norm" in name
                if name in taken or not name.startswith(prefix) or spared == decays:
                    continue
                taken.add(name)
                if name.startswith(fixed_parts) or ("vision_tower" in name and "k_proj.bias" in name):
                    parameter.requires_grad_(False)
                else:
                    members.append(parameter)
            rate = {"lr": 1e-3 * multiplier, "weight_decay": recipe["weight_decay"] if decays else 0.0}
            torch_groups.append({"params": members, **rate})
    assert len(taken) == len(list(model.named_parameters()))
    # Threads that wait for each other cost more than such a small model.
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(torch_groups, betas=(0.9, 0.999), eps=1e-8)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.3 * STEPS), STEPS)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        if recipe["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_ten_steps_are_those_of_torch(name: str, record_property: Any) -> None:
    recipe = RECIPES[name]
    text = {"vocab_size": VOCAB, "num_key_value_heads": 2, "num_hidden_layers": 2}
    hf_config = llava_config(text=text, image_token_index=IMAGE_TOKEN, pad_token_id=0)
    theirs = llava_model(hf_config, std=0.1)
    config = read_config(hf_config.to_dict()).with_tuned_from(recipe["tuned_from"])
    params = jax.tree.map(jnp.array, to_params(config, arrays(theirs)))
    pairs = [batch_pair(config, seed) for seed in range(STEPS)]

    vision, projector, rest = recipe["multipliers"]
    rules = (*GROUPS[:2], KEY_BIAS, ("vision/.*", vision), ("projector/.*", projector), (".*", rest))
    trainable, frozen = groups.split(params, rules)
    schedule = warmup_cosine(1e-3, 0.3, STEPS)
    changes = {key: recipe[key] for key in ("weight_decay", "clip_norm")}
    optimizer = optimizer_for(trainable, rules, schedule=schedule, **changes)
    step = jit(make_train_step(abstract_model(config)[0], optimizer, compute_dtype=jnp.dtype("float32")))
    state, losses = jax.jit(optimizer.init)(trainable), []
    for _, batch in pairs:
        trainable, state, metrics = step(trainable, state, frozen, batch)
        losses.append(float(metrics["loss"]))

    expected = torch_run(theirs, recipe, [batch for batch, _ in pairs])
    loss_error = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    found = dict(groups.flatten(groups.merge(trainable, frozen)))
    final = dict(groups.flatten(to_params(config, arrays(theirs))))
    errors = {path: float(np.abs(np.asarray(found[path]) - final[path]).max()) for path in final}
    moved = max(float(np.abs(found[path] - leaf).max()) for path, leaf in groups.flatten(params))
    worst = max(errors, key=lambda path: errors[path])
    print(f"{name}: loss {loss_error:.1e}, weights {errors[worst]:.1e} ({worst}), moved {moved:.1e}")
    record_property("loss_error", loss_error)
    record_property("weight_error", errors[worst])
    assert loss_error <= LOSS_TOLERANCE
    assert errors[worst] <= WEIGHT_TOLERANCE, errors
    assert moved > 10 * WEIGHT_TOLERANCE, "too small a change to show an error"
