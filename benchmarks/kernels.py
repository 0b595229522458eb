"""Attention kernels against public ones, by counting the cycles of their schedules (no TPU needed).

    python benchmarks/kernels.py compare --generations v5e,v6e --output kernels.json
    python benchmarks/kernels.py tune --generations v5e

See benchmarks/README.md for what the numbers mean.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from sg4v_jax.kernels.cycles import Report, measure, target

target.prepare()  # Before anything loads libtpu.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from sg4v_jax.kernels.tpu import blocks, decode, flash_plan, vit  # noqa: E402
from sg4v_jax.kernels.tpu.flash_backward import backward  # noqa: E402
from sg4v_jax.kernels.tpu.flash_forward import forward  # noqa: E402
from sg4v_jax.kernels.tpu.machine import current_machine  # noqa: E402

# Lengths of real samples of the instruction mix, with an image each, as packing puts them together.
SAMPLES = (805, 771, 843, 760, 917)


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape to measure: `kind` is that of the first word of the name, llama, vision or decode."""

    name: str
    length: int
    heads: int
    head_dim: int
    batch: int = 1
    packed: bool = False
    cache: str = "bfloat16"

    @property
    def kind(self) -> str:
        return self.name.split("_")[0]

    def segments(self) -> np.ndarray:
        """int32[1, 1, length]."""
        ends = np.cumsum(SAMPLES)
        return np.searchsorted(ends, np.arange(self.length), side="right")[None, None].astype(np.int32) + 1

    def cache_bytes(self) -> int:
        """Keys and values, and the float32 scales of int8 ones."""
        width = 2 * self.head_dim if self.cache == "bfloat16" else self.head_dim + 4
        return 2 * self.batch * self.heads * self.length * width

    def flops(self, backward: bool) -> float:
        """Of the model: causal pairs only, all of the row for packed ones as the reference table does."""
        pairs = self.length**2 / (2 if self.kind == "llama" else 1)
        return 4 * self.batch * self.heads * pairs * self.head_dim * (3.5 if backward else 1)


CASES = (
    Case("llama_2048", 2048, 32, 128),
    Case("llama_4096", 4096, 32, 128),
    Case("llama_4096_packed", 4096, 32, 128, packed=True),
    Case("vision_577x64", 577, 16, 64, batch=8),  # CLIP ViT-L/14-336
    *(
        Case(f"vision_{length}x{head_dim}", length, 16, head_dim, batch=8)
        for length, head_dim in itertools.product((256, 729, 1025), (64, 72, 80))
    ),
    Case("decode_32x2048", 2048, 32, 128, batch=32),
    Case("decode_32x2048_int8", 2048, 32, 128, batch=32, cache="int8"),
)


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def machine(generation: str) -> Any:
    mesh = target.one_device_mesh(target.GENERATIONS[generation])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return current_machine()


def flash(case: Case, generation: str, cut: flash_plan.Blocks, back: bool) -> Report:
    """One direction of the decoder's kernel."""
    rows = bf16(case.batch, case.heads, case.length, case.head_dim)
    problem = flash_plan.Problem.of(
        machine(generation), cut, rows, rows, segmented=case.packed, backward=back
    )
    operands: dict[tuple[str, int], np.ndarray] = {}
    segments = []
    if case.packed:
        segments = [jax.ShapeDtypeStruct(case.segments().shape, jnp.int32)]
        visits = flash_plan.schedule(
            jnp.asarray(case.segments()[:, 0]), problem.blocks.queries, problem.blocks.keys
        )
        operands = {("flash", index): np.asarray(visit) for index, visit in enumerate(visits)}
    if back:
        lse = f32(case.batch, case.heads, 1, case.length)
        return measure(
            lambda q, k, v, o, lse, do, *s: backward(problem, q, k, v, s[0] if s else None, o, lse, do),
            (rows, rows, rows, rows, lse, rows, *segments),
            generation,
            operands=operands,
        )
    return measure(
        lambda q, k, v, *s: forward(problem, q, k, v, s[0] if s else None),
        (rows, rows, rows, *segments),
        generation,
        operands=operands,
    )


def tower(case: Case, generation: str, cut: tuple[int, int, int, int], back: bool) -> Report:
    """One direction of the vision tower's kernel."""
    settings = vit.Settings(*cut, machine(generation))
    width = case.head_dim
    if not vit.fits(settings, (case.batch, case.length, case.heads, width), 2):
        settings = dataclasses.replace(settings, head_dim=width)
        width += -width % 128
    x = bf16(case.batch, case.length, case.heads * width)
    if not back:
        return measure(lambda q, k, v: vit._forward(settings, case.heads, q, k, v)[0], (x, x, x), generation)
    layout = vit.Layout.of(x, case.heads, settings.heads)
    lse = f32(case.batch, case.heads // layout.heads, layout.heads, case.length)
    return measure(
        lambda q, k, v, o, do, lse: vit._backward(settings, case.heads, (q, k, v, o, lse), do),
        (x, x, x, x, x, lse),
        generation,
    )


def generate(case: Case, generation: str, rows: int, back: bool = False) -> Report:
    """The decode kernel, all slots full."""
    assert not back
    shape = (1, case.batch, 1, case.length * case.heads)
    cache = jax.ShapeDtypeStruct((*shape, case.head_dim), case.cache)
    scales = (f32(*shape),) * 2 if case.cache == "int8" else ()
    new = bf16(case.batch, case.heads, case.head_dim)
    lengths, layer = np.full(case.batch, case.length, np.int32), np.zeros(1, np.int32)
    scalars = [jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in (layer, lengths)]
    return measure(
        lambda *x: decode.attention(*x[:7], machine(generation), rows=rows, scales=x[7:] or None),
        (new, new, new, cache, cache, *scalars, *scales),
        generation,
        values={5: layer, 6: lengths},
    )


def chosen(case: Case, generation: str, back: bool) -> Any:
    """The blocks of the table."""
    table = blocks.choice(generation)
    if case.kind == "llama":
        return (table.packed if case.packed else table.causal)[back]
    if case.kind == "decode":
        return table.decode_int8 if case.cache == "int8" else table.decode
    return table.vit


def ours(case: Case, generation: str, back: bool, cut: Any = None) -> Report:
    """Our kernel with the blocks of the table, or with others."""
    run = {"llama": flash, "vision": tower, "decode": generate}[case.kind]
    return run(case, generation, cut or chosen(case, generation, back), back)


def peers(case: Case, back: bool) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Public kernels that ship with JAX, with blocks that suit them: (name, function, arguments)."""
    from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if case.kind == "decode":
        cache = bf16(case.batch, case.length, case.heads, case.head_dim)
        query = bf16(case.batch, 1, case.heads, case.head_dim)
        if case.cache == "bfloat16":
            yield "jax.nn", jax.nn.dot_product_attention, (query, cache, cache)
        return
    causal = case.kind == "llama"
    length = case.length + (0 if causal else -case.length % 128)
    rows = bf16(case.batch, case.heads, case.length, case.head_dim)
    block = 1024 if causal else length
    # Backward, jax.flash is best with whole rows only if they are short, and wants divisors.
    short = max(n for n in range(128, 641, 128) if length % n == 0)

    def run_flash(q: jax.Array, k: jax.Array, v: jax.Array, *s: jax.Array) -> jax.Array:
        names = [f.name for f in dataclasses.fields(jax_flash.BlockSizes)]
        if back:
            sizes = {**dict.fromkeys(names, block if causal else short), "block_b": 1}
        else:
            sizes = dict(block_q=block, block_k_major=block, block_k=512 if causal else block)
            sizes["block_b"] = 1 if causal else 8
        ids = jax_flash.SegmentIds(s[0], s[0]) if s else None
        return jax_flash.flash_attention(
            q,
            k,
            v,
            segment_ids=ids,
            causal=causal,
            sm_scale=case.head_dim**-0.5,
            block_sizes=jax_flash.BlockSizes(**sizes),
        )

    def run_splash(q: jax.Array, k: jax.Array, v: jax.Array, *s: jax.Array) -> jax.Array:
        mask = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
        compute = 512 if causal else length
        sizes = splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=compute,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        )
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * case.heads), block_sizes=sizes, head_shards=1, q_seq_shards=1
        )
        ids = splash.SegmentIds(s[0], s[0]) if s else None
        return jax.vmap(kernel, in_axes=(0, 0, 0, 0 if s else None))(q * case.head_dim**-0.5, k, v, ids)

    def whole(run: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, *s: jax.Array) -> Any:
        """Pads rows to what the kernels take, and hides the padding behind segments."""
        padding = length - case.length
        if not padding:
            return run(q, k, v, *s)
        ids = jnp.broadcast_to(jnp.arange(length) >= case.length, (case.batch, length)).astype(jnp.int32)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v))
        return run(q, k, v, ids)[:, :, : case.length]

    segments = (jax.ShapeDtypeStruct((case.batch, length), jnp.int32),) if case.packed else ()
    for name, run in (("jax.flash", run_flash), ("jax.splash", run_splash)):

        def step(q: Any, k: Any, v: Any, *rest: Any, run: Any = run) -> Any:
            s = rest[1:] if back else rest
            found, pull = jax.vjp(lambda q, k, v: whole(run, q, k, v, *s), q, k, v)
            return pull(rest[0]) if back else found

        yield name, step, (*(rows,) * (4 if back else 3), *segments)
    if not causal:
        flat = bf16(case.batch, case.length, case.heads, case.head_dim)

        def plain(q: jax.Array, k: jax.Array, v: jax.Array, *do: jax.Array) -> Any:
            found, pull = jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, implementation="xla"), q, k, v)
            return pull(do[0]) if back else found

        yield "xla", plain, (flat,) * (4 if back else 3)


def line(
    case: Case, generation: str, phase: str, name: str, reports: list[Report], floor: float
) -> dict[str, Any]:
    """One row of the table: the kernels of `reports` together."""
    kernels = [kernel for report in reports for kernel in report.kernels]
    main = max(kernels, key=lambda kernel: kernel.total)
    return {
        "case": case.name, "phase": phase, "generation": generation, "name": name,
        "us": round(sum(r.microseconds for r in reports), 1),
        "kernel_us": round(sum(r.kernels[0].total / r.generation.clock * 1e6 for r in reports), 1),
        "cycles": round(sum(r.total for r in reports)), "scheduled": sum(r.scheduled for r in reports),
        "roofline_us": round(floor, 1), "mxu": round(main.mxu, 3),
        "vpu": round(main.vpu, 3), "spills": round(main.spills, 3),
        "hbm_mb": round(sum(k.bytes for k in kernels) / 1e6),
        "compile_s": round(sum(r.seconds for r in reports), 1), "unknown": [r.unknown for r in reports],
    }  # fmt: skip


def compare(generations: list[str], names: list[str], with_peers: bool) -> Iterator[dict[str, Any]]:
    """Rows of ours and of the peers', case by case."""
    for case, generation in itertools.product(CASES, generations):
        if names and case.name not in names:
            continue
        try:
            there = ours(case, generation, back=False)
        except jax.errors.JaxRuntimeError as error:  # Too large for this generation's memory.
            print(f"# ours {case.name} {generation}: {str(error).splitlines()[0][:120]}")
            continue
        for phase in ("fwd",) if case.kind == "decode" else ("fwd", "fwdbwd"):
            back = phase == "fwdbwd"
            bytes_ = case.cache_bytes() if case.kind == "decode" else 0
            floor = there.roofline(0 if bytes_ else case.flops(back), bytes_)
            reports = [there, ours(case, generation, back=True)] if back else [there]
            yield line(case, generation, phase, "ours", reports, floor)
            for name, function, arguments in peers(case, back) if with_peers else ():
                try:
                    report = measure(function, arguments, generation)
                except Exception as error:
                    print(f"# {name} {case.name} {phase} {generation}: {str(error).splitlines()[0][:120]}")
                    continue
                yield line(case, generation, phase, name, [report], floor)


def tune(generations: list[str], names: list[str]) -> Iterator[dict[str, Any]]:
    """The best of every sensible choice of blocks beside that of `sg4v_jax/kernels/tpu/blocks.py`."""
    cases = [case for case in CASES if case.name in (names or TUNED)]
    for case, generation in itertools.product(cases, generations):
        for back in (False,) if case.kind == "decode" else (False, True):
            table = chosen(case, generation, back)
            found: dict[Any, float] = {}
            for cut in dict.fromkeys([table, *candidates(case, back)]):
                try:
                    report = ours(case, generation, back, cut)
                except Exception as error:  # Too large for the generation's memory.
                    print(f"# {cut}: {str(error).splitlines()[0][:120]}")
                    continue
                found[cut] = round(report.microseconds, 1)
                print(
                    f"# {case.name} {generation} {'backward' if back else 'forward'} {cut}: {found[cut]}",
                    flush=True,
                )
            best = min(found, key=lambda cut: found[cut])
            yield {
                "case": case.name, "generation": generation, "backward": back, "us": found[best],
                "best": str(best), "table": str(table), "table_us": found.get(table),
            }  # fmt: skip


# Those whose best blocks are in the table; other shapes use these.
TUNED = ("llama_4096", "llama_4096_packed", "vision_577x64", "decode_32x2048", "decode_32x2048_int8")


def candidates(case: Case, back: bool) -> list[Any]:
    """Choices worth trying."""
    if case.kind == "decode":
        return [2048, 4096, 8192, 16384]
    if case.kind == "vision":
        return [(n, n, size, size) for n in (2, 4, 8) for size in (384 if back else 304, 640)]
    sizes = [(512, 512), (512, 256), (1024, 512), (1024, 1024)]
    return [flash_plan.Blocks(q, k, 256, rows // q) for q, k in sizes for rows in (1024, 2048)]


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("compare", "tune"))
    parser.add_argument("--generations", default="v5e,v6e", help="of v4, v5e, v5p, v6e")
    parser.add_argument(
        "--cases", default="", help=f"of {', '.join(case.name for case in CASES)}; all by default"
    )
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--output", help="also write the rows to this JSON file")
    options = parser.parse_args()
    names = options.cases.split(",") if options.cases else []
    generations = options.generations.split(",")
    rows = []
    work = (
        tune(generations, names)
        if options.command == "tune"
        else compare(generations, names, not options.no_peers)
    )
    for row in work:
        rows.append(row)
        print(
            "  ".join(f"{key}={value}" for key, value in row.items() if value not in ([{}], [{}, {}])),
            flush=True,
        )
        if options.output:
            with open(options.output, "w") as file:
                json.dump({"jax": jax.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
