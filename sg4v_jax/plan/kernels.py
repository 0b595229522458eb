"""Seconds that the attention kernels take, by counting the cycles of their schedules.

Counting makes libtpu write out the schedule of everything that it compiles, which it decides when it is
loaded. So it happens in a process of its own: `python -m sg4v_jax.plan.kernels`.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

from sg4v_jax.models.config import ModelConfig
from sg4v_jax.plan.topology import CHIPS

_NAMES = ("flash_forward", "flash_backward", "vit_forward", "vit_backward", "decode")
# Of the chip's peak, or of its memory's bandwidth for `decode`: rows of two samples of 1024 positions,
# images of 577, caches of 2048. v5e was counted at these shapes; the others are scaled from it by the table
# of docs/kernels.md, and v4's decoding is a guess.
SHARES = {
    "v4": dict(zip(_NAMES, (0.36, 0.31, 0.28, 0.36, 0.90), strict=True)),
    "v5e": dict(zip(_NAMES, (0.48, 0.58, 0.38, 0.39, 0.98), strict=True)),
    "v5p": dict(zip(_NAMES, (0.48, 0.42, 0.40, 0.40, 0.99), strict=True)),
    "v6e": dict(zip(_NAMES, (0.18, 0.25, 0.13, 0.16, 0.99), strict=True)),
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a step's attention works on.

    Attributes:
      generation: of TPU.
      length: positions of a row; 0 without a decoder's kernel.
      samples: in a row, of equal length; they don't see each other.
      heads, kv_heads, head_dim: of the decoder, whole.
      tokens, tower_heads, tower_head_dim: of an image; 0 tokens without the tower's kernel.
      capacity: positions of a full cache; 0 without decoding.
    """

    generation: str
    length: int
    samples: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    tower_heads: int
    tower_head_dim: int
    capacity: int

    @classmethod
    def of(
        cls, model: ModelConfig, generation: str, *, length: int = 0, samples: int = 1, capacity: int = 0
    ) -> "Shapes":
        tower, text = model.vision, model.text
        return cls(
            generation=generation,
            length=length,
            samples=samples,
            heads=text.num_heads,
            kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            tokens=tower.num_patches + 1 if length else 0,
            tower_heads=tower.num_heads,
            tower_head_dim=tower.hidden_size // tower.num_heads,
            capacity=capacity,
        )


@functools.cache
def seconds(shapes: Shapes) -> dict[str, float]:
    """Seconds of one row, one image, or one full slot, by the kernel's name, all heads on one chip.

    Raises:
      RuntimeError: the count failed; the message holds the end of its output.
    """
    arguments = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(shapes))]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting the kernels' cycles failed: {done.stderr.strip()[-400:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def estimate(shapes: Shapes) -> dict[str, float]:
    """The same from shares of the peak, which were counted once at 7B's shapes; see docs/plan.md."""
    chip, share = CHIPS[shapes.generation], SHARES[shapes.generation]
    pairs = shapes.length**2 / shapes.samples / 2
    row = 4 * pairs * shapes.heads * shapes.head_dim / chip.flops
    image = 4 * shapes.tokens**2 * shapes.tower_heads * shapes.tower_head_dim / chip.flops
    cache = 4 * shapes.capacity * shapes.kv_heads * shapes.head_dim / chip.hbm_bandwidth
    # The backward kernels compute five products for the forward ones' two.
    work = {
        "flash_forward": row,
        "flash_backward": 2.5 * row,
        "vit_forward": image,
        "vit_backward": 2.5 * image,
        "decode": cache,
    }
    return {name: seconds / share[name] for name, seconds in work.items() if seconds}


def _count(shapes: Shapes) -> dict[str, float]:
    from sg4v_jax.kernels.cycles import target

    target.prepare()
    result: dict[str, float] = {}
    if shapes.length:
        result |= _decoder(shapes)
    if shapes.tokens:
        result |= _tower(shapes)
    if shapes.capacity:
        result |= _decode(shapes)
    return result


def _decoder(shapes: Shapes) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sg4v_jax.kernels.cycles import measure
    from sg4v_jax.kernels.tpu import blocks, flash_plan
    from sg4v_jax.kernels.tpu.flash_backward import backward
    from sg4v_jax.kernels.tpu.flash_forward import forward

    table = blocks.choice(shapes.generation).packed
    length = flash_plan.padded_length(shapes.length, table[0].queries)
    # Heads are alike: two programs' worth of them stand for all.
    heads = min(shapes.heads, 8)
    kv_heads = max(heads * shapes.kv_heads // shapes.heads, 1)
    query, key = (_bf16(1, count, length, shapes.head_dim) for count in (heads, kv_heads))
    ids = np.minimum(np.arange(length) * shapes.samples // shapes.length, shapes.samples - 1)
    segments = jax.ShapeDtypeStruct((1, 1, length), jnp.int32)
    found = {}
    for name, cut, back in (("flash_forward", table[0], False), ("flash_backward", table[1], True)):
        problem = flash_plan.Problem.of(_machine(shapes.generation), cut, query, key, backward=back)
        visits = flash_plan.schedule(jnp.asarray(ids[None]), problem.blocks.queries, problem.blocks.keys)
        operands = {("flash", index): np.asarray(visit) for index, visit in enumerate(visits)}
        if back:
            lse = jax.ShapeDtypeStruct((1, heads, 1, length), jnp.float32)
            report = measure(
                lambda q, k, v, o, lse, do, s, p=problem: backward(p, q, k, v, s, o, lse, do),
                (query, key, key, query, lse, query, segments), shapes.generation, operands=operands,
            )  # fmt: skip
        else:
            report = measure(
                lambda q, k, v, s, p=problem: forward(p, q, k, v, s),
                (query, key, key, segments), shapes.generation, operands=operands,
            )  # fmt: skip
        found[name] = report.time_of("flash") / 1e6 * shapes.heads / heads
    return found


def _tower(shapes: Shapes) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from sg4v_jax.kernels.cycles import measure
    from sg4v_jax.kernels.tpu import blocks, vit

    images, heads = 2, shapes.tower_heads
    settings = vit.Settings(*blocks.choice(shapes.generation).vit, _machine(shapes.generation))
    x = _bf16(images, shapes.tokens, heads * shapes.tower_head_dim)
    layout = vit.Layout.of(x, heads, settings.heads)
    lse = jax.ShapeDtypeStruct((images, heads // layout.heads, layout.heads, shapes.tokens), jnp.float32)
    forward = measure(lambda q, k, v: vit._forward(settings, heads, q, k, v)[0], (x,) * 3, shapes.generation)
    backward = measure(
        lambda q, k, v, o, do, lse: vit._backward(settings, heads, (q, k, v, o, lse), do),
        (x, x, x, x, x, lse),
        shapes.generation,
    )
    reports = {"vit_forward": forward, "vit_backward": backward}
    return {name: report.time_of("vit") / 1e6 / images for name, report in reports.items()}


def _decode(shapes: Shapes) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sg4v_jax.kernels.cycles import measure
    from sg4v_jax.kernels.tpu import blocks, decode

    slots = 4
    cache = _bf16(1, slots, shapes.capacity, shapes.kv_heads, shapes.head_dim)
    query, key = (_bf16(slots, heads, shapes.head_dim) for heads in (shapes.heads, shapes.kv_heads))
    number, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (slots,)))
    machine, rows = _machine(shapes.generation), blocks.choice(shapes.generation).decode
    report = measure(
        lambda *arrays: decode.attention(*arrays, machine, rows=rows),  # type: ignore[misc]
        (query, key, key, cache, cache, number, lengths),
        shapes.generation,
        values={6: np.full(slots, shapes.capacity, np.int32)},
    )
    return {"decode": report.time_of("decode") / 1e6 / slots}


def _bf16(*shape: int) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _machine(generation: str) -> Any:
    import jax

    from sg4v_jax.kernels.cycles import target
    from sg4v_jax.kernels.tpu.machine import current_machine

    mesh = target.one_device_mesh(target.GENERATIONS[generation])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return current_machine()


if __name__ == "__main__":
    print(json.dumps(_count(Shapes(**json.loads(sys.argv[1])))))
