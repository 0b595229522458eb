"""Request files out, output and error files in: the same results as from the endpoint."""

import hashlib
import json
import pathlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sg4v_jax.caption.collect.batch import forget_batch, read_batch, write_batch
from sg4v_jax.caption.collect.collection import Collection, open_collection
from tests.caption.collect.collecting import captions, collect, settings
from tests.caption.collect.endpoint import (
    MODEL,
    REFUSAL,
    FaultyEndpoint,
    caption_for,
    completion,
    image_of,
)

Images = dict[str, str]


@pytest.fixture
def output(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "out"


@contextmanager
def opened(images: Images, root: pathlib.Path, output: pathlib.Path, **changes: Any) -> Iterator[Collection]:
    with open_collection(list(images), root, output, settings(**changes)) as collection:
        yield collection


def run_batch(files: list[pathlib.Path], folder: pathlib.Path, special: dict[str, str]) -> list[pathlib.Path]:
    """What a provider makes of request files; `special` says what to do with some images."""
    good, bad = [], []
    for file in files:
        for line in file.read_text().splitlines():
            request = json.loads(line)
            assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
            assert request["body"]["model"] == MODEL and len(request["custom_id"]) <= 64
            sha256 = hashlib.sha256(image_of(request["body"])).hexdigest()
            answer = {"id": "batch_req_1", "custom_id": request["custom_id"], "error": None}
            kind = special.get(sha256, "good")
            body = completion(REFUSAL if kind == "refusal" else caption_for(sha256))
            if kind in ("good", "refusal"):
                good.append(answer | {"response": {"status_code": 200, "body": body}})
            elif kind == "expired":
                error = {"code": "batch_expired", "message": "This request could not be executed."}
                bad.append(answer | {"response": None, "error": error})
            else:
                body = {"error": {"message": "no", "code": kind}}
                bad.append(answer | {"response": {"status_code": int(kind), "body": body}})
    written = []
    rng = random.Random(1)
    rng.shuffle(good)
    for name, found in (("out1", good[::2]), ("err", bad), ("out2", good[1::2])):
        written.append(folder / f"{name}-{len(list(folder.iterdir()))}.jsonl")
        written[-1].write_text("".join(json.dumps(line) + "\n" for line in found))
    return written[::-1]


def test_round_trip(images: Images, root: pathlib.Path, output: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shas = list(images.values())
    special = {shas[2]: "refusal", shas[7]: "400", shas[9]: "expired", shas[11]: "500"}
    with opened(images, root, output) as collection:
        files = write_batch(collection, max_requests=10)
        assert [len(file.read_text().splitlines()) for file in files] == [10, 10, 4]
        assert not collection.todo() and collection.write_outputs().waiting == len(images)
        assert not write_batch(collection), "nothing is written twice"
    answers = run_batch(files, tmp_path, special)
    with opened(images, root, output) as collection:
        assert read_batch(collection, answers) == {"answers": 21, "errors": 3}
        assert read_batch(collection, answers[::-1]) == {"read before": 24}
        summary = collection.write_outputs()
        assert (summary.captioned, summary.failed, summary.pending) == (20, 1, 3)
        again = write_batch(collection)
        first = json.loads(again[0].read_text().splitlines()[0])["body"]
        assert (first["seed"], first["temperature"]) == (1, 0.5), "it was refused before"
    answers += run_batch(again, tmp_path, {})
    with opened(images, root, output) as collection:
        counts = read_batch(collection, answers)
        assert (counts["answers"], counts["read before"]) == (3, 24)
        summary = collection.write_outputs()
        assert (summary.captioned, summary.failed) == (23, 1)
        assert collection.ledger.open_cost == pytest.approx(0)
        assert collection.ledger.verdicts == {"accepted": 23, "refusal": 1}
    expected = {path: caption_for(sha) for path, sha in images.items() if special.get(sha) != "400"}
    assert captions(output) == expected


def test_files_keep_to_their_size(images: Images, root: pathlib.Path, output: pathlib.Path) -> None:
    with opened(images, root, output) as collection:
        files = write_batch(collection, max_bytes=9000)
        sizes = [file.stat().st_size for file in files]
        assert max(sizes) <= 9000 and len(files) > 2
        largest = max(len(line) + 1 for file in files for line in file.read_text().splitlines())
        assert all(size + largest > 9000 for size in sizes[:-1]), "and don't waste it"
        ids = [json.loads(line)["custom_id"] for file in files for line in file.read_text().splitlines()]
        assert len(set(ids)) == len(images)
    with (
        opened(images, root, output.with_name("other")) as collection,
        pytest.raises(ValueError, match="more than a file of 500 may hold"),
    ):
        write_batch(collection, max_bytes=500)


def test_killed_while_writing(images: Images, root: pathlib.Path, output: pathlib.Path) -> None:
    """Half a file, or a whole one that the ledger doesn't know, is written again as it was."""
    with opened(images, root, output) as collection:
        files = write_batch(collection, max_requests=10)
        ids = [json.loads(line)["custom_id"] for file in files for line in file.read_text().splitlines()]
    results = (output / "results.jsonl").read_bytes().split(b"\n")
    (output / "results.jsonl").write_bytes(b"\n".join(results[:1]) + b"\n" + results[1][:99])
    files[2].rename(files[2].with_suffix(".tmp"))
    with opened(images, root, output) as collection:
        assert len(collection.todo()) == 14
        assert write_batch(collection, max_requests=10) == files[1:]
        assert not collection.todo()
    found = [json.loads(line)["custom_id"] for file in files for line in file.read_text().splitlines()]
    assert found == ids and len(list((output / "batch").iterdir())) == 3


def test_what_is_in_a_batch_is_not_asked_meanwhile(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, output: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    some = dict(list(images.items())[:10])
    with opened(some, root, output) as collection:
        files = write_batch(collection)
    summary, _, _ = collect(images, root, output, endpoint.url)
    assert (summary.captioned, summary.waiting) == (14, 10) and len(endpoint.asked) == 14
    with opened(images, root, output) as collection:
        assert forget_batch(collection, files) == 10
        assert forget_batch(collection, files) == 0
    summary, _, _ = collect(images, root, output, endpoint.url)
    assert summary.captioned == len(images) == len(endpoint.asked)
    # It ran after all: the answers are paid for, so they are kept and counted, once.
    with opened(images, root, output) as collection:
        answers = run_batch(files, tmp_path, {})
        spent = collection.ledger.spent
        assert read_batch(collection, answers) == {"answers": 10}
        assert read_batch(collection, answers) == {"read before": 10}
        assert collection.ledger.spent == pytest.approx(spent * 34 / 24)


def test_an_answer_that_comes_late_does_not_end_the_wait_for_a_new_batch(
    images: Images, root: pathlib.Path, output: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    some = dict(list(images.items())[:1])
    with opened(some, root, output) as collection:
        files = write_batch(collection)
        forget_batch(collection, files)
        again = write_batch(collection)
        may_cost = collection.ledger.open_cost
        assert read_batch(collection, run_batch(files, tmp_path, {})) == {"answers": 1}
        assert collection.ledger.open_cost == may_cost > 0
        assert read_batch(collection, run_batch(again, tmp_path, {})) == {"answers": 1}
        assert collection.ledger.open_cost == 0 and collection.ledger.spent > 0
        assert collection.write_outputs().captioned == 1


def test_an_old_error_file_does_not_end_the_wait_for_a_new_batch(
    images: Images, root: pathlib.Path, output: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    some = dict(list(images.items())[:1])
    with opened(some, root, output) as collection:
        old = run_batch(write_batch(collection), tmp_path, {sha: "expired" for sha in some.values()})
        assert read_batch(collection, old) == {"errors": 1}
        new = run_batch(write_batch(collection), tmp_path, {})
        assert read_batch(collection, old) == {"read before": 1}
        assert collection.write_outputs().waiting == 1
        assert read_batch(collection, new) == {"answers": 1}
        assert collection.write_outputs().captioned == 1


def test_damaged_and_foreign_lines(
    images: Images, root: pathlib.Path, output: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with opened(images, root, output) as collection:
        _, _, answers = run_batch(write_batch(collection), tmp_path, {})
        whole = answers.read_text()
        foreign = json.dumps({"custom_id": "somebody-else", "response": {"status_code": 200}})
        answers.write_text(foreign + "\n\n" + whole[:-40])
        with pytest.raises(ValueError, match=rf"{answers.name}: line 14: cut off"):
            read_batch(collection, [answers])
        assert collection.write_outputs().captioned == 11
        answers.write_text(foreign + "\n" + whole)
        assert read_batch(collection, [answers]) == {"unknown": 1, "read before": 11, "answers": 1}


def test_the_budget_holds_for_batches(images: Images, root: pathlib.Path, output: pathlib.Path) -> None:
    with opened(images, root, output) as collection:
        cost = collection.ledger.max_cost(collection.todo()[0], collection.settings.request)
    with opened(images, root, output, budget=10.5 * cost) as collection:
        (file,) = write_batch(collection)
        assert len(file.read_text().splitlines()) == 10 and len(collection.todo()) == 14
        assert not write_batch(collection)
