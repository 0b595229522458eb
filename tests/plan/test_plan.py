"""The command, the compiler and what is read off its programs, at a small model's size.

In a process of its own: libtpu is told when it is loaded what to write out, and other tests tell it more.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from sg4v_jax.plan import hlo
from sg4v_jax.plan.collectives import collectives

CONFIG = (
    "--config=configs/pretrain.py:tiny",
    "--config.model.vision.num_layers=6",
    "--config.model.vision.tuned_from=3",
    "--config.model.text.num_layers=5",
    "--config.data.batch_size=16",
    "--config.train.compute_dtype=bfloat16",
    "--config.train.remat=attention",
    "--config.train.loss_chunk=64",
)
SCRIPT = """
import sys
from sg4v_jax.__main__ import main
main(["plan", *sys.argv[2:], "--topology=2xv5e:2x2", "--output", sys.argv[1] + "/train.json",
      "--hlo", sys.argv[1]])
main(["plan", *sys.argv[2:], "--topology=v5e:2x2", "--steps=caption", "--slots=32", "--prompt=128",
      "--answer=64", "--capacity=256", "--weights=int8", "--kv=int8", "--config.mesh.fsdp=1",
      "--config.mesh.tensor=4", "--output", sys.argv[1] + "/caption.json"])
try:
    main(["plan", *sys.argv[2:], "--topology=v6e-4", "--config.train.compiler_options=xla_no_such=1"])
except SystemExit as end:
    assert end.code == 2
try:
    main(["plan", *sys.argv[2:], "--topology=v5e-4", "--config.data.batch_size=24000",
          "--config.train.remat=none"])
except SystemExit as end:
    sys.exit(0 if end.code == 2 else 1)
sys.exit("it fits?")
"""


@dataclasses.dataclass(frozen=True)
class Ran:
    train: dict
    prefill: dict
    insert: dict
    decode: dict
    program: hlo.Module
    text: str
    errors: str


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("plan")
    # The tests' flags are for compiling quickly on CPUs, and its cache holds other programs.
    unset = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *CONFIG], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    plans = [
        plan for name in ("train", "caption") for plan in json.loads((folder / f"{name}.json").read_text())
    ]
    program = hlo.parse(pathlib.Path(folder / "train.txt").read_text())
    return Ran(*plans, program, done.stdout, done.stderr)


def results(module: hlo.Module) -> list[hlo.Array]:
    return [array for lines in module.computations.values() for line in lines for array in line.result]


@pytest.mark.slow
def test_state_is_sharded_and_memory_adds_up(ran: Ran) -> None:
    parts, memory = ran.train["argument_parts"], ran.train["hbm"]
    assert parts["optimizer"] == pytest.approx(2 * parts["trained weights"], rel=1e-3)
    # 1.58 M trained float32 parameters on four chips of a slice: shards, and little that can't be cut.
    assert parts["trained weights"] == pytest.approx(1_580_000, rel=0.02)
    # The compiler pads widths of less than 128.
    assert sum(parts.values()) < memory["arguments"] < 3 * sum(parts.values())
    assert (
        memory["peak"]
        == sum(memory[k] for k in ("arguments", "outputs", "temporaries", "program")) - (memory["aliased"])
    )
    assert ran.train["fits"] and memory["headroom"] == memory["limit"] - memory["peak"] > 0


@pytest.mark.slow
def test_weights_are_gathered_in_bfloat16(ran: Ran) -> None:
    gathered = [c for c in collectives(ran.program) if c.kind == "all-gather" and c.bytes > 4096]
    assert gathered
    lines = [line for lines in ran.program.computations.values() for line in lines]
    for line in lines:
        if line.opcode.startswith("all-gather"):
            assert all(a.bytes <= 4096 for a in line.result if a.dtype == "f32")


@pytest.mark.slow
def test_nothing_is_kept_of_frozen_blocks_and_no_logits_whole(ran: Ran) -> None:
    """16 rows of 256 on 8 chips, 640 pieces, 4 images a row of 17 positions and width 128."""
    sizes = {array.dims for array in results(ran.program)}
    # Inputs of the blocks that train are kept, in the decoder ...
    assert any(dims[0] == 5 and _size(dims) == 2 * 256 * 128 * 5 for dims in sizes if dims)
    # ... but nothing like an activation of the three frozen blocks together.
    assert not any(dims[0] == 3 and _size(dims) >= 3 * 8 * 17 * 128 for dims in sizes if dims)
    assert not any(640 in dims and _size(dims) >= 2 * 256 * 640 for dims in sizes)


def _size(dims: tuple[int, ...]) -> int:
    size = 1
    for dim in dims:
        size *= dim
    return size


@pytest.mark.slow
def test_kernels_run_as_often_as_the_remat_policy_says(ran: Ran) -> None:
    """`attention` keeps the decoder's; the tower's three frozen blocks run once, two others twice."""
    expected = {"flash_forward": 5, "flash_backward": 5, "vit_forward": 3 + 2 * 2, "vit_backward": 2}
    assert ran.train["kernels"] == expected
    assert ran.decode["kernels"] == {"decode": 5}


@pytest.mark.slow
def test_work_and_times(ran: Ran) -> None:
    """Products lie between the model's FLOPs without attention and those with everything again."""
    train, seconds = ran.train, ran.train["seconds"]
    assert 0.8 < train["product_flops_per_chip"] / train["model_flops_per_chip"] < 1.4
    assert seconds["expected"] >= seconds["bound"] >= seconds["products"] > 0
    assert train["mfu_expected"] <= train["mfu_bound"] < 1
    assert train["hbm_traffic"] > sum(train["argument_parts"].values())
    assert train["host_bytes"] == 16 * 256 * 4 * 7 + 16 * 4 * 48 * 48 * 3
    assert train["unknown_loops"] == []
    # Every layer gathers its weights, forward and backward.
    assert train["collectives"]["all-gather"]["count"] >= 2 * 5 * 7


@pytest.mark.slow
def test_gradients_cross_between_slices_in_parts(ran: Ran) -> None:
    """Each chip sends its quarter in bfloat16; of such small kernels, the compiler sends some whole."""
    quarter = ran.train["argument_parts"]["trained weights"] / 2
    assert quarter <= ran.train["sent_between_slices"] < 3 * quarter
    assert ran.train["seconds"]["slices"] == pytest.approx(ran.train["sent_between_slices"] / 3.125e9)


@pytest.mark.slow
def test_captioning_is_the_engine_s_programs(ran: Ran) -> None:
    """Four prompts are prefilled, 32 slots decode; int8 weights and caches lie over four chips."""
    assert [plan["step"] for plan in (ran.prefill, ran.insert, ran.decode)] == ["prefill", "insert", "decode"]
    assert (ran.prefill["rows"], ran.prefill["tokens"], ran.decode["rows"]) == (4, 4 * 128, 32)
    # The engine's loop over steps ends when no slot has more to say; planned is one step.
    assert ran.decode["unknown_loops"]
    assert ran.decode["tokens"] == ran.decode["rows"] == 32
    # Five layers of keys and values of one head of 32 bytes and its scale, and little else, on a chip.
    cache = 5 * 2 * 32 * 256 * (32 + 4)
    assert cache < ran.decode["argument_parts"]["cache"] < 1.1 * cache
    assert ran.decode["argument_parts"]["weights"] == ran.prefill["argument_parts"]["weights"]
    assert "captions of 64 tokens: at most" in ran.text


@pytest.mark.slow
def test_the_table_and_the_failure_say_what_matters(ran: Ran) -> None:
    for part in ("HBM peak", "fits", "all-gather", "MFU at most", "between slices", "decode, 32 rows"):
        assert part in ran.text
    assert "does not fit v5e:2x2" in ran.errors and "of 15.75 GiB per chip" in ran.errors
    assert "config.train.remat=full" in ran.errors and "GiB  " in ran.errors


@pytest.mark.slow
def test_options_reach_the_compiler(ran: Ran) -> None:
    """Those of v6e are all known to it: it names the one that was added."""
    assert "config.train.compiler_options: the TPU compiler knows no 'xla_no_such'" in ran.errors
