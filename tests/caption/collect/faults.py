"""`sg4v collect` against an endpoint that fails in every way, killed in between; writes a log of it.

python -m tests.caption.collect.faults --images 400 --kills 5
"""

import argparse
import collections
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.caption.collect.collecting import captions, lines
from tests.caption.collect.endpoint import (
    KEY,
    MAYBE_PAID,
    MODEL,
    UNPAID,
    FaultyEndpoint,
    caption_for,
    draw_images,
    serve,
)

WORKERS, ATTEMPTS = 8, 3
FILTERED = ("refusal", "marked", "empty", "length", "list", "filter", "brief")
SECONDS = 6.0  # of the span in which limits are looked at
Lines = list[dict[str, Any]]


def draw_faults(shas: list[str], rng: random.Random) -> dict[str, list[str]]:
    """What happens to each image's requests before one goes well."""
    faults = {}
    # These two hold up everybody, or their worker, for a second.
    quick = [
        fault for fault in (*UNPAID, *MAYBE_PAID, "error-in-200") if fault not in ("429-date", "timeout")
    ]
    for number, sha256 in enumerate(shas):
        found = rng.choices(quick, k=rng.randrange(4)) + rng.choices(FILTERED, k=rng.choice((0, 0, 1, 2)))
        rng.shuffle(found)
        if number % 50 == 7:
            found.append("400-content_policy_violation")
        elif number % 50 == 13:
            found += ["refusal"] * ATTEMPTS
        elif number % 20 == 3:
            found.insert(0, "timeout")
        elif number % 50 == 29:
            found.insert(0, "429-date")
        faults[sha256] = found
    return faults


def start(
    root: pathlib.Path, output: pathlib.Path, url: str, rpm: int = 0, tpm: int = 0
) -> subprocess.Popen[str]:
    argv = ["--images", root, "--output", output, "--endpoint", url, "--model", MODEL]
    argv += [f"--workers={WORKERS}", f"--attempts={ATTEMPTS}", f"--rpm={rpm}", f"--tpm={tpm}", "--timeout=2"]
    argv += ["--backoff=0.02", "--retries=12", "--price-in=10", "--price-out=30", "--debug"]
    return subprocess.Popen(
        [sys.executable, "-m", "sg4v_jax", "collect", *map(str, argv)],
        env=os.environ | {"OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(directory: pathlib.Path, images: int, kills: int, rpm: int = 0, tpm: int = 0, seed: int = 0) -> str:
    """Collects with faults and kills, makes sure of what came of it, and returns the log."""
    rng, root, output = random.Random(seed), directory / "data", directory / "out"
    drawn = draw_images(root, images)
    with serve() as endpoint:
        faults = draw_faults(list(drawn.values()), rng)
        endpoint.faults = {sha256: [*found] for sha256, found in faults.items()}
        endpoint.delay = 0.01
        needed = images + sum(map(len, faults.values()))
        for requests in sorted(rng.sample(range(1, needed * 4 // 5), kills)):
            process = start(root, output, endpoint.url, rpm, tpm)
            while len(endpoint.asked) < requests:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        process = start(root, output, endpoint.url, rpm, tpm)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        kept = lines(output / "results.jsonl")
        log = [check_nothing_lost(drawn, faults, output), check_nothing_twice(kept, kills, said)]
    for path in output.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    given = ", ".join(f"{count} {name}" for name, count in endpoint.given.most_common())
    log.insert(0, f"endpoint: {endpoint.given.total()} requests in {kills + 1} runs: {given}")
    if rpm:
        log.append(busiest(endpoint, rpm, tpm))
    return "\n".join(log)


def check_nothing_lost(images: dict[str, str], faults: dict[str, list[str]], output: pathlib.Path) -> str:
    """Each image has its own caption, or there was a reason not to have one."""
    found, rejected = captions(output), {line["image"]: line for line in lines(output / "rejected.jsonl")}
    assert found.keys() | rejected.keys() == images.keys() and not found.keys() & rejected.keys()
    assert all(text == caption_for(images[path]) for path, text in found.items())
    for path, line in rejected.items():
        asked = faults[images[path]]
        if line["reason"] == "error":
            assert any(fault.startswith("400") for fault in asked)
        else:
            assert line["answers"] == ATTEMPTS <= sum(fault in FILTERED for fault in asked)
    reasons = collections.Counter(line["reason"] for line in rejected.values())
    return f"images:   {len(images)}: {len(found)} with their captions; without: {dict(reasons)}"


def check_nothing_twice(kept: Lines, kills: int, said: str) -> str:
    """After a caption nobody asks; what was asked has an outcome on disk, or was under way at a kill."""
    captioned: set[str] = set()
    counts = collections.Counter(entry["event"] for entry in kept)
    for entry in kept:
        assert entry["id"] not in captioned, "asked, or answered, after there was a caption"
        if entry.get("verdict") == "accepted":
            captioned.add(entry["id"])
    cut_off = counts["ask"] - counts["answer"] - counts["error"]
    assert 0 <= cut_off <= kills * WORKERS
    unconfirmed = cut_off + sum(entry.get("may_be_paid", False) for entry in kept)
    assert f"not in it: {unconfirmed} requests without an answer that may be billed" in said, said
    assert KEY not in said
    return (
        f"results:  {counts['ask']} asked, {counts['answer']} answers, {counts['error']} errors, {cut_off} "
        f"cut off by {kills} kills (at most {kills * WORKERS}); none after its caption"
    )


def busiest(endpoint: FaultyEndpoint, rpm: int, tpm: int) -> str:
    """The endpoint's own count, which what a busy machine sends late is in, too."""
    times = [asked.time for asked in endpoint.asked]
    tokens = 450 * max(
        sum(start <= asked.time < start + SECONDS and asked.answered for asked in endpoint.asked)
        for start in times
    )
    requests = max(sum(start <= time < start + SECONDS for time in times) for start in times)
    limits = [limit * SECONDS / 60 for limit in (rpm, tpm)]
    return (
        f"limits:   the busiest {SECONDS:.0f} s of {max(times) - min(times):.0f} had {requests} requests of "
        f"{limits[0]:,.0f} allowed, {tokens:,} tokens of {limits[1]:,.0f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rpm", type=int, default=720)
    parser.add_argument("--tpm", type=int, default=220_000)
    parser.add_argument("--seed", type=int, default=0)
    with tempfile.TemporaryDirectory() as directory:
        print(run(pathlib.Path(directory), **vars(parser.parse_args())))
