"""An endpoint that fails in every way: nothing lost, nothing asked more often than it failed."""

import asyncio
import json
import pathlib
import random
from collections import Counter
from typing import Any

import pytest

from sg4v_jax.caption.collect.collection import open_collection
from sg4v_jax.caption.collect.collector import Pace
from sg4v_jax.caption.collect.endpoint import EndpointError
from sg4v_jax.caption.collect.ledger import Prices
from sg4v_jax.caption.collect.prompts import QUESTIONS, Prompts
from sg4v_jax.caption.collect.request import Completion, parse_completion
from sg4v_jax.data.build import build, decode_example, open_dataset
from sg4v_jax.data.image import ImageError
from tests.caption.collect.collecting import captions, collect, lines, settings
from tests.caption.collect.endpoint import (
    KEY,
    MAYBE_PAID,
    MODEL,
    UNPAID,
    FaultyEndpoint,
    caption_for,
    completion,
)
from tests.caption.collect.virtual_time import run as run_in_virtual_time

Images = dict[str, str]
COST = (400 * 10 + 50 * 30) / 1e6  # Of every answer of the endpoint.


def expected(images: Images) -> dict[str, str]:
    return {path: caption_for(sha256) for path, sha256 in images.items()}


def test_every_fault_is_survived_and_nothing_is_asked_without_need(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rng = random.Random(7)
    filtered = ("refusal", "marked", "empty", "length", "list", "filter", "brief")
    once = [fault for fault in MAYBE_PAID if fault != "timeout"]
    for number, sha256 in enumerate(images.values()):
        faults = rng.choices([*UNPAID, *once, "error-in-200"], k=rng.randrange(4))
        faults += [filtered[number % len(filtered)]] * (number % 3)
        endpoint.faults[sha256] = rng.sample(faults, len(faults))
    all_faults = [fault for faults in endpoint.faults.values() for fault in faults]
    needed = {sha256: len(faults) + 1 for sha256, faults in endpoint.faults.items()}
    assert len(set(all_faults)) > 15
    output = tmp_path / "out"
    summary, stop, ledger = collect(images, root, output, endpoint.url)
    assert not stop.reason and summary.captioned == len(images)
    assert captions(output) == expected(images)
    assert endpoint.count() == needed
    assert endpoint.most_at_once <= 4
    assert ledger.verdicts.total() == len(images) + sum(fault in filtered for fault in all_faults)
    assert ledger.verdicts["refusal"] == sum(fault in ("refusal", "marked") for fault in all_faults)
    assert ledger.unconfirmed == sum(fault in once for fault in all_faults)
    assert ledger.spent == pytest.approx(ledger.verdicts.total() * COST)
    assert ledger.open_cost == pytest.approx(0)
    # An attempt after a filtered answer asks with another seed; a repeat asks the same.
    seeds = {asked.body["seed"] for asked in endpoint.asked}
    assert seeds == {0, 1, 2}

    before = (output / "results.jsonl").read_bytes()
    again, _, ledger_again = collect(images, root, output, endpoint.url)
    assert again == summary and endpoint.count() == needed, "there was nothing left to ask"
    assert (output / "results.jsonl").read_bytes() == before
    assert ledger_again.spent == pytest.approx(ledger.spent) and not ledger_again.cut_off


def test_what_a_result_says(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "out"
    collect(images, root, output, endpoint.url)
    path, sha256 = next(iter(images.items()))
    (answer,) = [
        line
        for line in lines(output / "results.jsonl")
        if line["event"] == "answer" and line["image_sha256"] == sha256
    ]
    assert answer["image"] == path and answer["model"] == MODEL and answer["source"] == "sam"
    assert answer["prompt"] == Prompts().text("sam") and answer["caption"] == caption_for(sha256)
    assert answer["verdict"] == "accepted" and answer["answered_by"] == f"{MODEL}-2026"
    assert answer["usage"]["prompt_tokens"] == 400 and answer["cost"] == pytest.approx(COST)
    assert answer["request"]["detail"] == "high" and answer["request"]["seed"] == 0
    (asked,) = [asked for asked in endpoint.asked if asked.sha256 == sha256]
    assert asked.body["messages"][0]["content"][0]["text"] == answer["prompt"]
    assert asked.image == (root / path).read_bytes()


def test_the_output_is_what_data_build_reads(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    collect(images, root, tmp_path / "out", endpoint.url)
    directory, report = build("caps", tmp_path / "out/captions.json", root, tmp_path / "datasets")
    assert report.written == len(images) and not report.dropped
    dataset = open_dataset(directory)
    found = {}
    for index in range(len(dataset)):
        record, (data,) = decode_example(dataset[index], "caps", index)
        (path,) = record.images
        assert data == (root / path).read_bytes() and record.id == pathlib.Path(path).stem
        assert record.turns[0].text.removeprefix("<image>\n") in QUESTIONS
        found[path] = record.turns[1].text
    assert found == expected(images)


def test_copies_are_asked_about_once_unless_their_prompts_differ(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    some = dict(list(images.items())[:4])
    for path in some:
        for copy in (root / path).with_suffix(".copy.png"), root / "wikiart" / pathlib.Path(path).name:
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes((root / path).read_bytes())
    paths = [
        path.relative_to(root).as_posix()
        for name in some
        for path in root.rglob(pathlib.Path(name).stem + "*")
    ]
    assert len(paths) == 12
    summary, _, _ = collect([*paths, *paths], root, tmp_path / "out", endpoint.url)
    assert summary.captioned == 12 and len(captions(tmp_path / "out")) == 12
    # coco and sam ask the same, wikiart something else.
    assert endpoint.count() == {sha256: 2 for sha256 in some.values()}


def test_timeouts_are_asked_again_and_may_be_billed(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    some = dict(list(images.items())[:2])
    endpoint.faults = {sha256: ["timeout"] for sha256 in some.values()}
    summary, _, ledger = collect(some, root, tmp_path / "out", endpoint.url, timeout=1.0)
    assert summary.captioned == 2 and captions(tmp_path / "out") == expected(some)
    assert ledger.unconfirmed >= 2 and ledger.unconfirmed_cost >= 2 * 1024 * 30 / 1e6


def test_permanent_errors_are_recorded_and_not_repeated(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path, sha256 = list(images.items())[3]
    endpoint.faults[sha256] = ["400-content_policy_violation"]
    output = tmp_path / "out"
    for _ in range(2):
        summary, stop, _ = collect(images, root, output, endpoint.url)
        assert not stop.reason and (summary.captioned, summary.failed) == (len(images) - 1, 1)
        assert endpoint.count()[sha256] == 1
    (line,) = lines(output / "rejected.jsonl")
    assert line["image"] == path and "HTTP 400: fault 400-content_policy_violation" in line["message"]
    summary, _, _ = collect(images, root, output, endpoint.url, retry_failed=True)
    assert summary.captioned == len(images) and endpoint.count()[sha256] == 2
    assert not lines(output / "rejected.jsonl")


def test_what_is_filtered_every_time_is_rejected_with_its_reason(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path, sha256 = list(images.items())[5]
    endpoint.faults[sha256] = ["empty", "list", "refusal"]
    output = tmp_path / "out"
    for _ in range(2):
        summary, _, ledger = collect(images, root, output, endpoint.url)
        assert (summary.captioned, summary.rejected) == (len(images) - 1, 1)
        assert endpoint.count()[sha256] == 3
        assert ledger.verdicts == {"accepted": len(images) - 1, "empty": 1, "itemised": 1, "refusal": 1}
    (line,) = lines(output / "rejected.jsonl")
    assert (line["image"], line["reason"], line["answers"]) == (path, "refusal", 3)
    summary, _, _ = collect(images, root, output, endpoint.url, attempts=4)
    assert summary.captioned == len(images) and endpoint.count()[sha256] == 4


@pytest.mark.parametrize("fault", ["401", "403", "429-insufficient_quota", "redirect", "429-7200"])
def test_what_concerns_everybody_stops_the_run(
    fault: str, endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    endpoint.faults["*"] = [fault] * 100
    summary, stop, _ = collect(images, root, tmp_path / "out", endpoint.url)
    assert stop.is_error and len(endpoint.asked) <= 4
    assert summary.pending == len(images), "nobody is at fault but the run"
    endpoint.faults.clear()
    summary, stop, _ = collect(images, root, tmp_path / "out", endpoint.url)
    assert summary.captioned == len(images) and not stop.reason


def test_an_endpoint_that_only_fails_is_left_alone(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    endpoint.faults["*"] = ["500"] * 10_000
    pace = Pace(workers=4, backoff=0.001, retries=3, stop_after=5)
    summary, stop, _ = collect(images, root, tmp_path / "out", endpoint.url, pace=pace)
    assert stop.is_error and "20 errors in a row, the last: 127.0.0.1" in stop.reason
    assert 20 <= len(endpoint.asked) <= 24 and summary.pending == len(images)
    endpoint.faults.clear()
    assert collect(images, root, tmp_path / "out", endpoint.url)[0].captioned == len(images)


def test_errors_between_answers_stop_nothing(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    endpoint.faults = {sha256: ["500"] for sha256 in images.values()}
    pace = Pace(workers=1, backoff=0.001, stop_after=2)
    summary, stop, ledger = collect(images, root, tmp_path / "out", endpoint.url, pace=pace)
    assert summary.captioned == len(images) and not stop.reason
    assert ledger.errors == {"HTTP 500": len(images)}


def test_servers_that_count_no_tokens(images: Images, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    class Uncounted:
        async def complete(self, body: bytes) -> Completion:
            return parse_completion(completion(caption_for("ab" * 32)) | {"usage": None})

    _, _, ledger = collect(images, root, tmp_path / "out", Uncounted())
    assert ledger.prompt_tokens > 24 * 255 and 24 * 30 < ledger.completion_tokens < 24 * 80


# --- Money -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
def test_the_budget_is_never_exceeded_and_holds_over_runs(
    workers: int, endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    largest = (600 * 10 + 1024 * 30) / 1e6
    budget = 9 * COST + largest
    pace = Pace(workers=workers, backoff=0.01)
    for _ in range(2):
        summary, stop, ledger = collect(
            images, root, tmp_path / "out", endpoint.url, pace=pace, budget=budget
        )
        assert "budget" in stop.reason and not stop.is_error
        assert budget - largest < ledger.spent <= budget
        assert 0 < summary.pending == len(images) - summary.captioned
    assert len(endpoint.asked) == summary.captioned
    summary, stop, _ = collect(images, root, tmp_path / "out", endpoint.url, pace=pace, budget=1.0)
    assert summary.captioned == len(images) == len(endpoint.asked) and not stop.reason


def test_a_budget_needs_prices(images: Images, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="--price-in"):
        collect(images, root, tmp_path / "out", None, budget=1.0, prices=Prices())


def test_the_estimate_learns_from_answers(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    some = list(images)[:12]
    with open_collection(list(images), root, tmp_path / "out", settings()) as collection:
        before = collection.estimate()
    assert "24 requests for 24 images (sam 12, coco 12)" in before and "GPT-4's published rules" in before
    assert "6,000 answer tokens" in before
    collect(some, root, tmp_path / "out", endpoint.url)
    with open_collection(list(images), root, tmp_path / "out", settings()) as collection:
        after = collection.estimate()
    assert "12 requests for 24 images" in after and "12 answers so far" in after
    assert "4,800 prompt and 600 answer tokens" in after
    assert f"about ${12 * COST:.2f}" in after and f"spent ${12 * COST:.2f}" in after


# --- Images ----------------------------------------------------------------------------------------


def test_bad_images_are_listed_and_capped(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    outside = tmp_path / "secret.png"
    outside.write_bytes((root / next(iter(images))).read_bytes())
    (root / "link.png").symlink_to(outside)
    (root / "broken.png").write_bytes(outside.read_bytes()[:40])
    (root / "huge.png").write_bytes(outside.read_bytes() + bytes(5000))
    bad = ["link.png", "../secret.png", str(outside), "broken.png", "gone.png", "huge.png"]
    limits = {"max_image_bytes": 5000, "max_bad_images": 6}
    output = tmp_path / "out"
    summary, _, _ = collect([*images, *bad], root, output, endpoint.url, **limits)
    assert (summary.captioned, summary.bad) == (len(images), 6)
    assert endpoint.count().keys() == set(images.values())
    listed = {line["image"]: line["message"] for line in lines(output / "rejected.jsonl")}
    assert list(listed) == bad
    assert "more than --max-image-bytes 5000" in listed["huge.png"]
    with pytest.raises(ImageError, match="6 images can't be used, more than --max-bad-images 5"):
        collect([*images, *bad], root, tmp_path / "other", endpoint.url, **(limits | {"max_bad_images": 5}))
    assert len(endpoint.asked) == len(images)


def test_an_image_that_changes_meanwhile_is_not_asked_under_its_old_name(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    first, second = list(images)[:2]

    class Changing:
        async def complete(self, body: bytes) -> Completion:
            (root / second).write_bytes((root / first).read_bytes() + b"more")
            return parse_completion(completion(caption_for("ab" * 32)))

    pace = Pace(workers=1, retries=1, backoff=0.001)
    summary, _, _ = collect([first, second], root, tmp_path / "out", Changing(), pace=pace)
    assert (summary.captioned, summary.pending) == (1, 1)
    assert "changed while it was used" in lines(tmp_path / "out/results.jsonl")[-1]["message"]
    summary, _, _ = collect([first, second], root, tmp_path / "out", endpoint.url)
    assert summary.captioned == 2 and len(endpoint.asked) == 1


# --- Limits, on a clock of their own ------------------------------------------------------------------


class Clocked:
    """Answers after a while of virtual time, and notes when it was asked and by how many at once."""

    def __init__(self, pauses: dict[int, float] | None = None) -> None:
        self.pauses, self.asked, self.tokens, self.at_once, self.most = pauses or {}, [], [], 0, 0

    async def complete(self, body: bytes) -> Completion:
        self.asked.append(asyncio.get_running_loop().time())
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(7.0)
        self.at_once -= 1
        if pause := self.pauses.pop(len(self.asked), 0):
            raise EndpointError("transient", "HTTP 429", status=429, retry_after=pause)
        text = json.loads(body)["messages"][0]["content"][0]["text"]
        return parse_completion(completion(caption_for("ab" * 32) + text[:0]))


def busiest_minute(times: list[float]) -> int:
    return max(sum(start <= time < start + 59.999 for time in times) for start in times)


def test_requests_per_minute(images: Images, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    clocked = Clocked()
    pace = Pace(workers=8, rpm=6)
    summary, _, _ = collect(images, root, tmp_path / "out", clocked, pace=pace, run=run_in_virtual_time)
    assert summary.captioned == len(images) == len(clocked.asked)
    assert busiest_minute(clocked.asked) == 6
    assert clocked.asked[-1] == pytest.approx(230), "24 requests, one every ten seconds"


def test_tokens_per_minute(images: Images, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    clocked = Clocked()
    pace = Pace(workers=4, tpm=4500)
    collect(images, root, tmp_path / "out", clocked, pace=pace, run=run_in_virtual_time)
    # An answer takes 450 tokens; before it is there, a request counts with all that it may take.
    assert busiest_minute(clocked.asked) <= 11
    assert 120 <= clocked.asked[-1] <= 400
    assert clocked.most <= 4


def test_all_wait_when_one_is_told_to(images: Images, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    clocked = Clocked({8: 500.0})
    pace = Pace(workers=4, backoff=1.0)
    summary, _, _ = collect(images, root, tmp_path / "out", clocked, pace=pace, run=run_in_virtual_time)
    assert summary.captioned == len(images) and len(clocked.asked) == len(images) + 1
    told = clocked.asked[7] + 7.0
    # Those who were under way or told in the same moment come before; nobody in between.
    assert not [time for time in clocked.asked if told + 0.1 < time < told + 500.0]
    assert Counter(time < told + 0.1 for time in clocked.asked)[False] >= 14


def test_the_servers_own_log_agrees(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Real time: 16 requests at 20 a second take 0.75 s, and more on a busy machine."""
    pace = Pace(workers=8, rpm=1200)
    collect(list(images)[:16], root, tmp_path / "out", endpoint.url, pace=pace)
    times = [asked.time for asked in endpoint.asked]
    assert max(times) - min(times) > 0.3 * 15 / 20


def test_the_key_is_nowhere(
    endpoint: FaultyEndpoint,
    images: Images,
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shas = list(images.values())
    endpoint.faults = {shas[0]: ["400"], shas[1]: ["500"], shas[2]: ["429"], shas[3]: ["echo"]}
    with caplog.at_level("DEBUG"):
        collect(images, root, tmp_path / "out", endpoint.url)
    assert all(asked.headers["authorization"] == f"Bearer {KEY}" for asked in endpoint.asked)
    files = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert b"[key]" in b"".join(files) and KEY.encode() not in b"".join(files)
    assert KEY not in caplog.text


def test_settings_are_checked() -> None:
    checks: list[tuple[dict[str, Any], str]] = [({"model": ""}, "--model"), ({"attempts": 0}, "attempts=0")]
    for changes, message in checks:
        with pytest.raises(ValueError, match=message):
            settings(**changes)
    for pace in ({"workers": 0}, {"rpm": -1}, {"stop_after": 0}):
        with pytest.raises(ValueError, match="out of range"):
            Pace(**pace)
