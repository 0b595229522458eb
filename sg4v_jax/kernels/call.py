"""One call of attention, as the implementations get it."""

import dataclasses

from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of `kernels.attention.attention`, checked."""

    query: Array
    key: Array
    value: Array
    causal: bool
    segment_ids: Array | None
