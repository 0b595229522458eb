"""The train step on eight virtual devices, on several meshes; prints what it found as JSON.

Run by `test_sharding.py` in a process of its own: the number of devices is fixed when JAX starts.
"""

import dataclasses
import functools
import json
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from sg4v_jax.data.batch import Batch, to_devices  # noqa: E402
from sg4v_jax.models.config import ModelConfig  # noqa: E402
from sg4v_jax.models.sharegpt4v import abstract_model  # noqa: E402
from sg4v_jax.parallel.mesh import make_mesh  # noqa: E402
from sg4v_jax.parallel.placement import param_shardings, place  # noqa: E402
from sg4v_jax.parallel.rules import constrain, ways  # noqa: E402
from sg4v_jax.train import groups  # noqa: E402
from sg4v_jax.train.optimizer import make_optimizer, state_shardings  # noqa: E402
from sg4v_jax.train.step import make_train_step  # noqa: E402
from tests import tiny  # noqa: E402
from tests.parallel import partitioned  # noqa: E402
from tests.parallel.cases import CASES, Case  # noqa: E402
from tests.tiny import GROUPS, jit, model_config, packed, random_batch, random_params  # noqa: E402

# No other size of the model is one of these: a shape tells what an array is.
LENGTH, SLOTS, ROWS, VOCAB = 44, 2, 40, 104
VISION_LAYERS = 6  # Of which five are used.
NOTHING_TUNED = (("vision/.*", None), (".*", 1.0))

compilations: list[str] = []


def model(case: Case) -> ModelConfig:
    config = model_config(case.tuned_from, case.kv_heads, frozen_layers=VISION_LAYERS)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=VOCAB))


@functools.cache
def batches() -> tuple[Batch, ...]:
    """Packed rows, some of text only; a sample a row, much of it padding; no image at all."""
    config, generator = model(CASES[0]), np.random.default_rng(7)
    samples = [tiny.random_sample(config, generator, row % 2, 6 + row % 30) for row in range(ROWS)]
    texts = [tiny.random_sample(config, generator, 0, 9 + row % 31) for row in range(ROWS)]
    return (
        random_batch(config, ROWS, length=LENGTH, slots=SLOTS, seed=1),
        packed(samples, length=LENGTH, slots=SLOTS, packing=False),
        packed(texts, length=LENGTH, slots=SLOTS, packing=False),
    )


def run(case: Case, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """A step with each batch as `train.loop` takes them: losses, weights, and what lies where."""
    config = model(case)
    regexes = GROUPS if case.tuned_from < VISION_LAYERS - 1 else NOTHING_TUNED
    with jax.set_mesh(mesh):
        graphdef, shapes, axes = abstract_model(config)
        shardings = param_shardings(shapes, axes, mesh)
        trainable, frozen = groups.split(place(jax.device_get(random_params(config)), shardings), regexes)
        before = jax.device_get(frozen)
        trainable_shardings, _ = groups.split(shardings, regexes)
        # A large epsilon: where a gradient is only rounding, Adam would turn it into a whole step.
        constants = {"b1": 0.9, "b2": 0.999, "eps": 1e-3, "weight_decay": 0.0, "clip_norm": 1.0}
        schedule = optax.constant_schedule(1e-2)
        optimizer = make_optimizer(trainable, regexes, schedule=schedule, **constants)
        opt_shardings = state_shardings(optimizer, trainable, trainable_shardings, mesh)
        opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(trainable)
        options = {"remat": case.remat, "accumulate": case.accumulate, "reduction": case.reduction}
        step_fn = make_train_step(
            graphdef, optimizer, compute_dtype=jnp.dtype("float32"), loss_chunk=16, **options
        )
        out = (trainable_shardings, opt_shardings, None)
        train_step = jit(step_fn, donate_argnums=(0, 1), out_shardings=out)
        hlo = ""
        if mesh.size > 1:
            arguments = (trainable, opt_state, frozen, to_devices(batches()[0], mesh))
            hlo = train_step.lower(*arguments).compile().as_text()
        losses, gradient, after_first = [], None, len(compilations)
        for i, batch in enumerate(batches()):
            trainable, opt_state, metrics = train_step(trainable, opt_state, frozen, to_devices(batch, mesh))
            losses.append(float(metrics["loss"]))
            if i == 0:
                # Adam's first moment is now a tenth of the (clipped) gradient.
                gradient = jax.device_get(optax.tree.get(opt_state, "mu"))
                after_first = len(compilations)
    first, second = (optax.tree.get(opt_state, name) for name in ("mu", "nu"))
    specs = specs_of(trainable)
    moments = dict(groups.flatten(first))
    same = [bool(np.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, (before, frozen)), strict=True)]
    return {
        "losses": losses,
        "params": jax.device_get(trainable),
        "gradient": gradient,
        "hlo": hlo,
        "specs": specs,
        "moments_lie_like_params": specs_of(first) == specs == specs_of(second),
        "split_moments": [path for path, x in moments.items() if x.addressable_shards[0].data.size < x.size],
        "trained": list(moments),
        "frozen_moved": not all(same),
        "compiled": train_step._cache_size(),
        "compiled_later": compilations[after_first:],
    }


def specs_of(tree: dict[str, Any]) -> dict[str, list[Any]]:
    """Mesh axes of each dimension of each leaf."""
    return {path: list(leaf.sharding.spec) for path, leaf in groups.flatten(tree)}


def largest_error(ours: Any, theirs: Any) -> float:
    expected = dict(groups.flatten(theirs))
    return float(max(np.abs(leaf - expected[path]).max() for path, leaf in groups.flatten(ours)))


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Errors against the run on one device, and the rest of what was found."""
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected["gradient"]))
    pairs = zip(found.pop("losses"), expected["losses"], strict=True)
    return {
        "weight_error": largest_error(found.pop("params"), expected["params"]),
        "gradient_error": largest_error(found.pop("gradient"), expected["gradient"]) / largest,
        "loss_error": max(abs(a / b - 1) for a, b in pairs),
        **found,
    }


def inspect(text: str, case: Case, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What the compiled step holds and sends."""
    size = mesh.size // mesh.shape["slices"]
    found = partitioned.collectives(text, mesh.size)
    crossing = [one for one in found if any(len({d // size for d in group}) > 1 for group in one.groups)]
    shapes = partitioned.float_shapes(text)
    frozen, tuned = case.tuned_from, VISION_LAYERS - 1 - case.tuned_from
    rows = ROWS // ways("batch", mesh) // case.accumulate  # Of one device, at a time.
    features = (rows * SLOTS, 5, 32)
    return {
        "whole_activations": sorted(partitioned.whole_activations(text, rows, LENGTH)),
        "whole_tables": [s for s in shapes if VOCAB in s and mesh.shape["tensor"] > 1],
        "gathered_activations": partitioned.gathered_activations(text, mesh.size, LENGTH),
        "kinds": sorted({one.kind for one in found}),
        "crossing_kinds": sorted({one.kind for one in crossing}),
        "crossing_activations": [s for one in crossing for s in one.shapes if LENGTH in s],
        "kept_of_tuned": (tuned, *features) in shapes,
        "kept_of_frozen": (frozen, *features) in shapes,
    }


def rematerialisation(mesh: jax.sharding.Mesh) -> str:
    """The program of what XLA can only do by gathering: an embedding table whose width is split like the
    batch."""

    def loss(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.square(constrain(jnp.take(table, tokens, axis=0), ("batch", None, None))).sum()

    table = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", "fsdp"))
    batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("slices", "data", "fsdp")))
    shapes = jax.ShapeDtypeStruct((VOCAB, 48), jnp.float32), jax.ShapeDtypeStruct((20, LENGTH), jnp.int32)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss), in_shardings=(table, batch), out_shardings=table)
        return gradient.lower(*shapes).compile().as_text()


def main() -> None:
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **about: (
            compilations.append(str(about.get("fun_name", event))) if "backend_compile" in event else None
        )
    )
    one = make_mesh(devices=jax.devices()[:1])
    reference = functools.cache(run)
    report: dict[str, Any] = {}
    for case in CASES:
        mesh = make_mesh(**case.mesh)
        found = compare(run(case, mesh), reference(case.on_one_device(), one))
        hlo = found.pop("hlo")
        report[case.name] = {**found, **inspect(hlo, case, mesh)}
    report["rest"] = dict(make_mesh(data=2, fsdp=-1, tensor=2).shape)
    control = rematerialisation(make_mesh(data=2, fsdp=2, tensor=2))
    report["control"] = partitioned.gathered_activations(control, 8, LENGTH)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
