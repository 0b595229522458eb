"""What the compiler says when a program doesn't fit."""

from sg4v_jax.plan.memory import GIB, largest_tensors, out_of_memory

BRIEF = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
    "HLO temporaries (17.42G) exceeds available HBM (15.75G). HLO module: jit_train_step."
)
LONG = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 24.05G of 15.48G hbm. Exceeded hbm capacity by 8.57G.

Total hbm usage >= 24.57G:
    reserved        530.00M
    program          12.28G
    arguments        11.77G

  Largest program allocations in hbm:

  1. Size: 512.00M
     Shape: f32[32000,4096]{1,0:T(8,128)}
     Unpadded size: 512.00M
     Allocation type: HLO temp
     ==========================

  2. Size: 4.00G
     Operator: op_name="jit(train_step)/while/body/dot_general" source_file="x.py" source_line=3
     Shape: bf16[32,8,2048,4096]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.00G
     Allocation type: HLO temp
     ==========================
"""  # noqa: E501


def test_both_forms_of_the_message() -> None:
    brief = out_of_memory(BRIEF)
    assert brief and (brief.used, brief.limit, brief.largest) == (int(17.42 * GIB), int(15.75 * GIB), [])
    long = out_of_memory(LONG)
    assert long and (long.used, long.limit) == (int(24.05 * GIB), int(15.48 * GIB))
    assert [a.bytes for a in long.largest] == [4 * GIB, GIB // 2]
    assert long.largest[0].where == "jit(train_step)/while/body/dot_general"
    assert long.largest[1].shape.startswith("f32[32000,4096]")


def test_other_errors_are_left_alone() -> None:
    assert out_of_memory("INVALID_ARGUMENT: no such option") is None


def test_largest_tensors_of_a_program() -> None:
    """The batch's 16 rows are cut into 4 parts; a weight counts whole."""
    text = """%1 = f(%0) : (tensor<4xf32>) -> tensor<16x128x256xbf16>
    %2 = g(%1) : (tensor<16x128x256xbf16>) -> tensor<1000x1000xf32>
    %3 = h(%2) : (tensor<f32>) -> tensor<i32>"""
    found = largest_tensors(text, rows=16, parts=4)
    assert [(a.bytes, a.shape) for a in found] == [
        (4_000_000, "f32[1000,1000]"),
        (16 * 128 * 256 * 2 // 4, "bf16[16,128,256]"),
    ]
