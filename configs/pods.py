"""Mesh and remat policy for each TPU slice: the second part of a config's argument, `7b,v5e-64`.

As many ways of `fsdp` as there are rows in the batch, and `tensor` for the rest: a chip has a whole row, so
that the batch stays the paper's on any slice. The remat policies keep what leaves some room in the chip's
memory; docs/plan.md has the table that they come from, and `sg4v plan --search` looks for others.
"""

import difflib

from ml_collections import ConfigDict

# Slice: chips (the number in the names of v4 and v5p counts cores), remat policy of 7B and of 13B.
PODS = {
    "v4-32": (16, "attention", "full"),
    "v4-64": (32, "mlp", "attention"),
    "v5e-64": (64, "projections", "attention"),
    "v5e-256": (256, "projections", "projections"),
    "v5p-32": (16, "projections", "projections"),
    "v5p-128": (64, "projections", "projections"),
    "v6e-32": (32, "mlp", "attention"),
    "v6e-256": (256, "projections", "projections"),
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
    """The config with the slice's mesh and remat policy; as it was without a slice."""
    if pod:
        chips, *policies = PODS[pod]
        config.mesh.fsdp = min(chips, config.data.batch_size)
        config.mesh.tensor = chips // config.mesh.fsdp
        config.train.remat = policies[size == "13b"]
    return config
