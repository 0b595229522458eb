"""Options of the TPU compiler: which generation gets which, and how a config changes them."""

import types

import pytest

from sg4v_jax.parallel.compiler import OPTIONS, compiler_options

V6E = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")


def test_a_generation_has_its_own_and_others_none() -> None:
    assert compiler_options(V6E) == OPTIONS["TPU v6"]
    assert compiler_options(types.SimpleNamespace(platform="tpu", device_kind="TPU v4")) == {}
    cpu = types.SimpleNamespace(platform="cpu", device_kind="cpu")
    assert compiler_options(cpu, "xla_a=1") == {}, "only TPUs know them"


def test_a_config_adds_changes_and_takes_away() -> None:
    first, second, *_ = known = OPTIONS["TPU v6"]
    found = compiler_options(V6E, f"xla_a=1, {first}=other,{second}=")
    assert found == {name: known[name] for name in known if name != second} | {first: "other", "xla_a": "1"}
    with pytest.raises(ValueError, match="compiler_options: 'xla_a' is not of the form name=value"):
        compiler_options(V6E, "xla_a")
