"""What `run_on_devices.py` computes on several devices and on one: every choice meets most others."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh and a way to train.

    Attributes:
      sizes: of the mesh.
      kv_heads: of four heads; a single one can't be split over the tensor axis.
      tuned_from: block of the tower from which it is tuned; 5 is none.
      accumulate, remat, reduction: see `train.step.make_train_step`.
    """

    sizes: tuple[tuple[str, int], ...]
    kv_heads: int
    tuned_from: int
    accumulate: int
    remat: str
    reduction: str

    @property
    def mesh(self) -> dict[str, int]:
        return dict(self.sizes)

    @property
    def name(self) -> str:
        mesh = " ".join(f"{axis}={size}" for axis, size in self.sizes)
        return f"{mesh}, from {self.tuned_from}, {self.kv_heads} kv, {self.accumulate} x {self.reduction}"

    def on_one_device(self) -> "Case":
        """What must come out the same: nothing recomputed, and one batch where parts don't count."""
        accumulate = self.accumulate if self.reduction == "microbatch" else 1
        return dataclasses.replace(self, sizes=(), accumulate=accumulate, remat="none")


A = (("data", 2), ("fsdp", 2), ("tensor", 2))
B = (("slices", 2), ("fsdp", 2), ("tensor", 2))
C = (("fsdp", 4), ("tensor", 2))
D = (("slices", 2), ("data", 2), ("fsdp", 2))

CASES = (
    Case(A, 2, 3, 2, "full", "token"),
    Case(A, 2, 0, 1, "none", "token"),
    Case(B, 2, 3, 1, "dots", "token"),
    Case(B, 4, 5, 2, "full", "microbatch"),
    Case(C, 1, 3, 2, "dots", "microbatch"),
    Case(D, 2, 0, 1, "full", "token"),
)
