"""Rows, mesh and remat policy for each TPU slice: the second part of a config's argument, `7b,v5e-64`.

The batch stays the paper's on any slice. As far as there are rows, each chip has its own: `fsdp` goes over
32 chips at most (of 64, gradients take longer to reduce, and nothing runs beside it), `data` over the rest.
Where there are more chips than rows, rows are halved, with their image slots, as long as the longest sample
fits into one. Only what is left is `tensor`, which costs more. The remat policies keep what leaves some room
in the chip's memory. docs/plan.md has the figures; `sg4v plan --search` looks for other settings.
"""

import difflib

from ml_collections import ConfigDict

# Most ways of `fsdp`.
FSDP = 32

# Slice: chips (the number in the names of v4 and v5p counts cores), most ways of `fsdp`, remat policy of 7B
# and of 13B. The memory of v6e can't follow the program for 32 ways of a slice of 32 chips.
PODS = {
    "v4-32": (16, FSDP, "attention", "full"),
    "v4-64": (32, FSDP, "mlp", "attention"),
    "v5e-64": (64, FSDP, "projections", "attention"),
    "v5e-256": (256, FSDP, "projections", "projections"),
    "v5p-32": (16, FSDP, "projections", "projections"),
    "v5p-128": (64, FSDP, "projections", "projections"),
    "v6e-32": (32, 16, "mlp", "attention"),
    "v6e-256": (256, FSDP, "projections", "projections"),
}


def split(arg: str) -> tuple[str, str]:
    """(size, slice) of a config's argument; the slice is empty if there is none.

    Raises:
      ValueError: no such slice, or one for the tiny model, which needs none.
    """
    size, comma, pod = arg.partition(",")
    if comma and pod not in PODS:
        near = difflib.get_close_matches(pod, PODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PODS)}"
        raise ValueError(f"no settings for TPU slice {pod!r}; {hint}")
    if pod and size == "tiny":
        raise ValueError(f"the tiny model needs no TPU slice: leave out {pod!r}")
    return size, pod


def place(config: ConfigDict, size: str, pod: str) -> ConfigDict:
    """The config with the slice's rows, mesh and remat policy; as it was without a slice."""
    if pod:
        chips, ways, *policies = PODS[pod]
        data, mesh = config.data, config.mesh
        while data.batch_size < chips and data.seq_len > data.max_tokens:
            data.batch_size *= 2
            data.seq_len = max(data.seq_len // 2, data.max_tokens)
            data.image_slots //= 2
        parts = min(chips, data.batch_size)
        mesh.fsdp = min(parts, ways)
        mesh.data = parts // mesh.fsdp
        mesh.tensor = chips // parts
        config.train.remat = policies[size == "13b"]
    return config
