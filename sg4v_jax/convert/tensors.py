"""Tensors of a checkpoint that are not read yet, so that no more than one need be in memory."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_BLOCK = 2**18
# Of each float's bits, as an unsigned integer: those of the exponent, all set in NaN and infinity.
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


class ConversionError(ValueError):
    """A checkpoint that can't be converted.

    Attributes:
      problems: everything that is wrong with it, not just the first thing found.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = f"{len(problems)} problems:\n  " if len(problems) > 1 else ""
        super().__init__(count + "\n  ".join(problems))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, not read yet.

    Attributes:
      name: what its file calls it.
      shape: as in the file.
      dtype: one of `DTYPES`' values, or another that a file can hold.
      where: the file, for messages.
      read: gives a new array, read from the file each time. No memory map: mapped pages of a file
        that something cuts short kill the process, and count as its memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    where: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def renamed(self, name: str) -> "Tensor":
        """The same tensor under another name."""
        return dataclasses.replace(self, name=name)

    def cast(self, dtype: np.dtype) -> "Tensor":
        """The same values in another float type, rounded to nearest.

        Reading raises ConversionError if a finite value becomes infinite: float16 reaches 65504.
        """
        if dtype == self.dtype:
            return self

        def read() -> np.ndarray:
            array = self.read()
            with np.errstate(over="ignore", invalid="ignore"):
                narrow = array.astype(dtype)
            if is_finite(array) and not is_finite(narrow):
                raise ConversionError([f"{self.name} has values too large for {dtype}; use bfloat16"])
            return narrow

        return dataclasses.replace(self, dtype=dtype, read=read)

    def head(self, rows: int) -> "Tensor":
        """The first `rows` rows."""
        if rows == self.shape[0]:
            return self
        shape, read = (rows, *self.shape[1:]), self.read
        return dataclasses.replace(self, shape=shape, read=lambda: read()[:rows])

    def padded_with_mean(self, rows: int) -> "Tensor":
        """With as many rows more as make `rows`, each the mean of those that are there."""
        if rows == self.shape[0]:
            return self

        def read() -> np.ndarray:
            array = np.empty((rows, *self.shape[1:]), self.dtype)
            array[: self.shape[0]] = self.read()
            array[self.shape[0] :] = array[: self.shape[0]].mean(axis=0, dtype=np.float64)
            return array

        return dataclasses.replace(self, shape=(rows, *self.shape[1:]), read=read)


def in_memory(name: str, array: np.ndarray) -> Tensor:
    """An array as a tensor."""
    return Tensor(name, array.shape, array.dtype, "memory", lambda: array)


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite.

    Args:
      array: of one of `DTYPES`.
    """
    # On the bits: several times faster than arithmetic, which bfloat16 has none of on a CPU. In
    # blocks that stay in the cache: fresh memory for the whole would cost more than the test.
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    exponent = bits.dtype.type(_EXPONENT[array.dtype.name])
    scratch = np.empty(min(_BLOCK, bits.size), bits.dtype)
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        if np.bitwise_and(block, exponent, out=scratch[: block.size]).max() == exponent:
            return False
    return True


def count_not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(array.astype(np.float32))))


def contiguous(array: np.ndarray) -> np.ndarray:
    """An array in C order: itself if it is, or else a copy.

    Transposed matrices, which is what our kernels are to a file, are copied in narrow tiles. NumPy
    goes along whole columns, which have left the cache when the next one needs the same lines, and
    takes several times as long.
    """
    if array.flags.c_contiguous:
        return array
    if array.ndim < 2 or array.strides[-1] == array.itemsize:
        return array.copy(order="C")
    copy = np.empty(array.shape, array.dtype)
    for row in range(0, array.shape[0], 1024):
        for column in range(0, array.shape[-1], 8):
            tile = np.s_[row : row + 1024, ..., column : column + 8]
            copy[tile] = array[tile]
    return copy
