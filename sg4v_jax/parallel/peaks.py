"""How fast a device could be: the denominator of MFU."""

# Dense bfloat16 FLOP/s of what JAX calls a device (a chip from TPU v4 on), by the start of its
# `device_kind`; the longest that fits counts. From the vendors' pages (cloud.google.com/tpu/docs) and data
# sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a kind of device; None if it isn't known, as for every CPU."""
    known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None
