"""The train step on eight virtual devices, on several meshes; prints what it found as JSON.

Run by `test_sharding.py` in a process of its own: the number of devices is fixed when JAX starts.
"""

import json
import sys
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from sg4v_jax.data.batch import Batch, to_devices  # noqa: E402
from sg4v_jax.models.sharegpt4v import abstract_model  # noqa: E402
from sg4v_jax.parallel.mesh import make_mesh  # noqa: E402
from sg4v_jax.parallel.placement import param_shardings, place  # noqa: E402
from sg4v_jax.parallel.rules import constrain  # noqa: E402
from sg4v_jax.train import groups  # noqa: E402
from sg4v_jax.train.optimizer import make_optimizer, state_shardings  # noqa: E402
from sg4v_jax.train.step import make_train_step  # noqa: E402
from tests.tiny import GROUPS, jit, model_config, random_batch, random_params  # noqa: E402

# Sizes, and key/value heads: a single one cannot be split over two devices, and is replicated.
MESHES = {
    "fsdp=8": ({"fsdp": 8}, 1),
    "fsdp=4 tensor=2": ({"fsdp": 4, "tensor": 2}, 1),
    "data=2 fsdp=2 tensor=2": ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
}
STEPS = 3
CONTROL = "--- control ---"


def run(mesh: jax.sharding.Mesh, num_kv_heads: int, batches: list[Batch]) -> dict[str, Any]:
    """Three steps as `train.loop` takes them: losses, final weights and what lies where."""
    config = model_config(tuned_from=2, num_kv_heads=num_kv_heads)
    params = jax.device_get(random_params(config))
    with jax.set_mesh(mesh):
        graphdef, shapes, axes = abstract_model(config)
        shardings = param_shardings(shapes, axes, mesh)
        trainable, frozen = groups.split(place(params, shardings), GROUPS)
        trainable_shardings, _ = groups.split(shardings, GROUPS)
        # A large epsilon: where a gradient is only rounding, Adam would turn it into a whole step.
        constants = {"b1": 0.9, "b2": 0.999, "eps": 1e-3, "weight_decay": 0.0, "clip_norm": 1.0}
        schedule = optax.constant_schedule(1e-2)
        optimizer = make_optimizer(trainable, GROUPS, schedule=schedule, **constants)
        opt_shardings = state_shardings(optimizer, trainable, trainable_shardings, mesh)
        opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(trainable)
        step_fn = make_train_step(
            graphdef, optimizer, compute_dtype=jnp.dtype("float32"), remat="full", loss_chunk=16, accumulate=2
        )
        out = (trainable_shardings, opt_shardings, None)
        train_step = jit(step_fn, donate_argnums=(0, 1), out_shardings=out)
        losses = []
        for batch in batches:
            trainable, opt_state, metrics = train_step(trainable, opt_state, frozen, to_devices(batch, mesh))
            losses.append(float(metrics["loss"]))
    first, second = (optax.tree.get(opt_state, name) for name in ("mu", "nu"))
    specs = specs_of(trainable)
    moments = dict(groups.flatten(first))
    split = [path for path, leaf in moments.items() if leaf.addressable_shards[0].data.size < leaf.size]
    return {
        "losses": losses,
        "params": jax.device_get(trainable),
        "specs": specs,
        "moments_lie_like_params": specs_of(first) == specs == specs_of(second),
        "split_moments": split,
        "compiled": train_step._cache_size(),
    }


def specs_of(tree: dict[str, Any]) -> dict[str, list[Any]]:
    """Mesh axes of each dimension of each leaf."""
    return {path: list(leaf.sharding.spec) for path, leaf in groups.flatten(tree)}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Errors against the run on one device, and the rest of what was found."""
    reference = dict(groups.flatten(expected["params"]))
    errors = [np.abs(leaf - reference[path]).max() for path, leaf in groups.flatten(found.pop("params"))]
    pairs = zip(found.pop("losses"), expected["losses"], strict=True)
    return {**found, "weight_error": float(max(errors)), "loss_error": max(abs(a / b - 1) for a, b in pairs)}


def provoke_rematerialisation(mesh: jax.sharding.Mesh) -> None:
    """Compiles what makes XLA complain: an embedding table whose width is split like the batch."""

    def loss(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.square(constrain(jnp.take(table, tokens, axis=0), ("batch", None, None))).sum()

    table = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", "fsdp"))
    batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    shapes = jax.ShapeDtypeStruct((64, 48), jnp.float32), jax.ShapeDtypeStruct((16, 40), jnp.int32)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss), in_shardings=(table, batch), out_shardings=table)
        gradient.lower(*shapes).compile()


def main() -> None:
    batches = [random_batch(model_config(), 16, seed=seed) for seed in range(STEPS)]
    one = make_mesh(devices=jax.devices()[:1])
    single = {kv_heads: run(one, kv_heads, batches) for kv_heads in (1, 2)}
    report: dict[str, Any] = {"rest": dict(make_mesh(data=2, fsdp=-1, tensor=2).shape)}
    for name, (sizes, kv_heads) in MESHES.items():
        report[name] = compare(run(make_mesh(**sizes), kv_heads, batches), single[kv_heads])
    print(json.dumps(report))
    # From here on the complaint is wanted: it shows that a silent run has something to say.
    print(CONTROL, file=sys.stderr, flush=True)
    provoke_rematerialisation(make_mesh(data=2, fsdp=2, tensor=2))


if __name__ == "__main__":
    main()
