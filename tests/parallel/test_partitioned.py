"""The reading of compiled programs, on the three ways in which XLA writes who talks to whom."""

import pytest

from tests.parallel.partitioned import collectives, whole_activations


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}", ((0, 1, 2, 3),)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups(written: str, groups: tuple[tuple[int, ...], ...]) -> None:
    kind = "collective-permute" if "pairs" in written else "all-gather"
    line = (
        f"  %x.1 = (f32[5,44]{{1,0}}, s32[3]{{0}}) {kind}(%p.2, %p.3), channel_id=4, {written}, to_apply=%add"
    )
    (found,) = collectives(line, 4)
    assert (found.kind, found.shapes, found.groups) == (kind, ((5, 44),), groups)


def test_unknown_groups_are_an_error() -> None:
    with pytest.raises(ValueError, match="no groups in"):
        collectives("%x = f32[2]{0} all-reduce(%y), replica_groups=<new>", 4)


def test_whole_activations() -> None:
    text = "f32[2,5,44,48] bf16[10,44,48]{2,1,0} f32[4,44,44] f32[10,44] s32[10,44,3]"
    assert whole_activations(text, 5, 44) == {(10, 44, 48)}
