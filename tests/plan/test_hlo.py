# ruff: noqa: E501 (lines as the compiler writes them)
"""Reading compiled programs: snippets as the TPU compiler writes them, layouts and all."""

import pytest

from sg4v_jax.plan import hlo
from sg4v_jax.plan.collectives import collectives
from sg4v_jax.plan.work import Work, work

LAYERS = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%slice_and_multiply (param_0: bf16[32,64,256], param_1: s32[], param_2: bf16[8,64]) -> bf16[8,256] {
  %param_0 = bf16[32,64,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %layer = bf16[1,64,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,64,256}
  %matrix = bf16[64,256]{1,0:T(8,128)(2,1)} bitcast(%layer)
  %param_2 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  ROOT %product = bf16[8,256]{1,0:T(8,128)(2,1)} convolution(%param_2, %matrix), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[8,64], bf16[32,64,256])) -> (s32[], bf16[8,64], bf16[32,64,256]) {
  %state = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[32,64,256]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %one = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %w = bf16[32,64,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %y = bf16[8,256]{1,0:T(8,128)(2,1)} fusion(%w, %i, %x), kind=kOutput, calls=%slice_and_multiply
  %reduced = f32[8,256]{1,0:T(8,128)S(1)} all-reduce(%y), channel_id=3, replica_groups=mesh['fsdp'=2,'tensor'=4] {'tensor'}, to_apply=%add, metadata={op_name="jit(step)/dot"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[32,64,256]{2,1,0}) tuple(%next, %x, %w)
}

%condition (state.1: (s32[], bf16[8,64], bf16[32,64,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  %state.1 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[32,64,256]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %more = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: (s32[], bf16[8,64], bf16[32,64,256])) -> (s32[], bf16[8,64], bf16[32,64,256]) {
  %p = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[32,64,256]{2,1,0}) parameter(0)
  %first = s32[]{:T(128)} constant(FIRST)
  %copy.1 = s32[]{:T(128)} copy(%first)
  %x.0 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w.0 = bf16[32,64,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %start = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[32,64,256]{2,1,0}) tuple(%copy.1, %x.0, %w.0)
  ROOT %loop = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[32,64,256]{2,1,0}) while(%start), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("first", "step", "trips"), [(0, 1, 32), (0, 2, 16), (0, 3, 11), (1, 1, 31)])
def test_loops_count_their_trips(first: int, step: int, trips: int) -> None:
    """An unrolled loop's counter grows by more than one, one with a step peeled off begins with one."""
    module = hlo.parse(LAYERS.replace("STEP", str(step)).replace("FIRST", str(first)))
    assert module.entry == "main"
    assert module.runs()["body"] == module.runs()["slice_and_multiply"] == trips
    assert module.unknown_loops() == []
    (found,) = collectives(module)
    assert (found.kind, found.runs, found.bytes, found.hidden) == ("all-reduce", trips, 8 * 256 * 4, False)
    assert found.members == (0, 1, 2, 3) and found.where == "jit(step)/dot"
    assert found.sent == trips * 8 * 256 * 4 * 2 * 3 / 4
    assert work(module).product_flops == trips * 2 * 8 * 64 * 256


def test_a_layer_of_a_stack_is_all_that_is_read() -> None:
    """64 x 256 of 32 x 64 x 256, and the product is written; what lies in VMEM costs nothing."""
    reduced = 2 * 0  # The all-reduce's result lies in VMEM.
    each = 64 * 256 * 2 + 8 * 256 * 2 + 4 + reduced
    moved = work(hlo.parse(LAYERS.replace("STEP", "1").replace("FIRST", "0"))).hbm_bytes
    # Scalars of the counter are a few bytes a trip.
    assert 32 * each <= moved <= 32 * (each + 64)


def test_a_loop_whose_length_is_data_is_named() -> None:
    text = LAYERS.replace("STEP", "1").replace("FIRST", "0").replace("constant(32)", "parameter(1)")
    assert hlo.parse(text).unknown_loops() == ["loop"]


def one(line: str, extra: str = "") -> str:
    return f"{extra}\nENTRY %main (x: bf16[64,128]) -> bf16[1024,128] {{\n  %x = bf16[64,128]{{1,0}} parameter(0)\n{line}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['data'=1,'fsdp'=4] {'fsdp'}", (0, 1, 2, 3)),
    ],
)
def test_groups_in_every_form(groups: str, members: tuple[int, ...]) -> None:
    line = f"  ROOT %g = bf16[1024,128]{{1,0}} all-gather(%x), channel_id=1, {groups}, dimensions={{0}}"
    (found,) = collectives(hlo.parse(one(line)))
    assert found.members == members
    assert found.sent == 1024 * 128 * 2 * (len(members) - 1) / len(members)


def test_an_asynchronous_collective_is_one_and_hidden() -> None:
    """Start, a step beside a product, and end each hold the all-gather."""
    inner = "\n".join(
        f"%async_collective_fusion.{i} (q.{i}: bf16[64,128]) -> bf16[1024,128] {{\n"
        f"  %q.{i} = bf16[64,128]{{1,0}} parameter(0)\n"
        f"  ROOT %g.{i} = bf16[1024,128]{{1,0}} all-gather(%q.{i}), channel_id=7, replica_groups=[1,16]<=[16], dimensions={{0}}\n}}\n"
        for i in range(3)
    )
    lines = "\n".join(
        f"  {'ROOT ' if i == 2 else ''}%f.{i} = bf16[1024,128]{{1,0}} fusion(%x), kind=kCustom, calls=%async_collective_fusion.{i}"
        for i in range(3)
    )
    (found,) = collectives(hlo.parse(one(lines, inner)))
    assert found.hidden and found.runs == 1 and len(found.members) == 16


def test_an_all_reduce_that_keeps_its_part_is_a_reduce_scatter() -> None:
    inner = (
        "%all-reduce-scatter.1 (q: bf16[64,128]) -> bf16[16,128] {\n  %q = bf16[64,128]{1,0} parameter(0)\n"
        "  %r = bf16[64,128]{1,0} all-reduce(%q), channel_id=7, replica_groups=[1,4]<=[4], to_apply=%add\n"
        "  ROOT %s = bf16[16,128]{1,0} dynamic-slice(%r), dynamic_slice_sizes={16,128}\n}\n"
    )
    line = "  ROOT %f = bf16[16,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    (found,) = collectives(hlo.parse(one(line, inner)))
    assert found.kind == "reduce-scatter" and found.sent == 64 * 128 * 2 * 3 / 4


def test_start_and_done_are_one_and_a_permutation_sends_all() -> None:
    lines = (
        "  %s = (bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2, "
        'source_target_pairs={{0,1},{1,0}}, metadata={op_name="x"}\n  ROOT %d = bf16[64,128]{1,0} collective-permute-done(%s)'
    )
    (found,) = collectives(hlo.parse(one(lines)))
    assert (found.kind, found.hidden, found.sent) == ("collective-permute", True, 64 * 128 * 2)
    assert found.pairs == ((0, 1), (1, 0))


def test_slices_reduce_by_transfers_to_their_hosts() -> None:
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = (
        f"  %t = token[] after-all()\n  %s = (bf16[64,128]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%x, %t), channel_id=3, {attributes}\n"
        f"  %r = (bf16[64,128]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%t), channel_id=2, {attributes}\n"
        "  %sd = token[] send-done(%s), channel_id=3\n  ROOT %rd = (bf16[64,128]{1,0}, token[]) recv-done(%r), channel_id=2"
    )
    module = hlo.parse(one(lines))
    (found,) = collectives(module)
    assert (found.kind, found.bytes, found.between_slices) == ("all-reduce", 64 * 128 * 2, True)
    assert found.sent_in(2) == 64 * 128 * 2 and found.sent_in(4) == 64 * 128 * 2 * 3 / 2
    assert work(module).hbm_bytes == 2 * 64 * 128 * 2


def test_a_sparse_core_s_collective_hides_beside_what_is_computed_meanwhile() -> None:
    """From the part of its start that has the operand; the product before that hides nothing."""
    inner = (
        "%called (q: bf16[64,128]) -> bf16[1024,128] {\n  %q = bf16[64,128]{1,0} parameter(0)\n"
        '  ROOT %g = bf16[1024,128]{1,0} all-gather(%q), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}\n}, execution_thread="sparsecore"\n\n'
        "%multiply (a: bf16[64,128]) -> bf16[64,64] {\n  %a = bf16[64,128]{1,0} parameter(0)\n"
        "  ROOT %p = bf16[64,64]{1,0} convolution(%a, %a), dim_labels=bf_oi->bf\n}\n"
    )
    product = "  %f.{i} = bf16[64,64]{{1,0}} fusion(%x), kind=kOutput, calls=%multiply\n"
    kernel = '  %flash_forward.1 = bf16[64,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"\n'
    lines = (
        '  %s = ((), (), (s32[8]{0})) custom-call-start(), async_execution_thread="sparsecore", called_computations={%called}\n'
        + product.format(i=1)
        + "  %u = ((bf16[64,128]{1,0}), bf16[1024,128]{1,0}, (s32[8]{0})) custom-call-update(%s, %x)\n"
        + "BESIDE  ROOT %d = bf16[1024,128]{1,0} custom-call-done(%u)"
    )
    (found,) = collectives(hlo.parse(one(lines.replace("BESIDE", product.format(i=2) + kernel), inner)))
    assert (found.kind, found.hidden, found.sent) == ("all-gather", True, 1024 * 128 * 2 * 15 / 16)
    assert found.beside == Work(2 * 64 * 64 * 128, 0.0, {"flash_forward": 1})
    # As libtpu 0.0.42 writes it, with its operand at once.
    older = "\n".join(line for line in lines.splitlines() if "call-update" not in line)
    older = older.replace("custom-call-start()", "call-start(%x)").replace(
        "called_computations={%called}", "to_apply=%called"
    )
    older = older.replace("BESIDE", "").replace("custom-call-done(%u)", "call-done(%s)")
    (found,) = collectives(hlo.parse(one(older, inner)))
    assert (found.hidden, found.sent) == (True, 1024 * 128 * 2 * 15 / 16)
    assert found.beside == Work(2 * 64 * 64 * 128, 0.0, {})
    alone = hlo.parse(one(lines.replace("BESIDE", ""), inner))
    (found,) = collectives(alone)
    assert not found.hidden and found.beside == Work(0.0, 0.0, {})
    # It is written to memory and read there; what the product moves is counted as ever.
    assert work(alone).hbm_bytes == 2 * 1024 * 128 * 2 + (64 * 128 + 64 * 64) * 2


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        # [8, 2048, 11008] x [4096, 11008]: the batch is a window of one.
        ("8,16,12", "20,12,1", "8,16,20", "window={size=1}, dim_labels=0bf_oi0->0bf", 2 * 8 * 16 * 12 * 20),
        # Gradient of the weights: the batch is summed as a window.
        ("8,16,12", "8,16,20", "12,20,1", "window={size=8}, dim_labels=0fb_0io->bf0", 2 * 8 * 16 * 12 * 20),
        # Heads as a window with padding: only pairs that meet count.
        ("16,12,1", "12,4,8", "16,4,8", "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f", 2 * 16 * 12 * 4 * 8),
        # A batch of products: dilated so that each meets its own.
        ("6,16,12", "6,12,20", "6,16,20", "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf", 2 * 6 * 16 * 12 * 20),
    ],
)  # fmt: skip
def test_products_as_the_compiler_writes_them(left, right, result, attributes, flops):
    text = (
        f"ENTRY %main (a: bf16[{left}], b: bf16[{right}]) -> bf16[{result}] {{\n"
        f"  %a = bf16[{left}]{{2,1,0}} parameter(0)\n  %b = bf16[{right}]{{2,1,0}} parameter(1)\n"
        f"  ROOT %c = bf16[{result}]{{2,1,0}} convolution(%a, %b), {attributes}\n}}\n"
    )
    assert work(hlo.parse(text)).product_flops == flops


def test_what_is_no_program_is_said() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")
