"""What a run writes, and that it is the same however the run was cut up."""

import json
import os
import pathlib
import shutil
import threading
import tracemalloc
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image
from sg4v_jax.configs import captioner

from sg4v_jax.caption.corpus.claims import Claim
from sg4v_jax.caption.corpus.guards import Guards
from sg4v_jax.caption.corpus.inputs import open_corpus
from sg4v_jax.caption.corpus.job import DEFAULT_PROMPT, Settings, prompt_for
from sg4v_jax.caption.corpus.outputs import Summary
from sg4v_jax.caption.corpus.run import Progress, caption_corpus
from sg4v_jax.data.image import ImageError
from sg4v_jax.infer.options import SamplingOptions
from tests.caption.corpus.fake import PROMPT, FakeEngine, caption, write_images

COUNT = 61
DOCS = pathlib.Path(__file__).parents[3] / "docs"


def files(output: pathlib.Path) -> dict[str, bytes]:
    """All that a finished job leaves, by path."""
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != "clock"
    }


def lines(output: pathlib.Path) -> list[dict[str, Any]]:
    shards = sorted((output / "shards").iterdir())
    return [json.loads(line) for path in shards for line in path.read_text().split("\n")[:-1]]


def test_one_line_for_each_image_in_order(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    engine = FakeEngine()
    summary = caption(root, tmp_path, engine)
    found = lines(tmp_path)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    assert [line["image"] for line in found] == names and len(names) == COUNT
    assert len(list((tmp_path / "shards").iterdir())) == 9
    broken = {name for name in names if int(name[2:6]) % 23 == 5}
    assert {line["image"] for line in found if "error" in line} == broken
    assert all(
        line["image"] in line["error"] and line["kind"] == "corrupt_image"
        for line in found
        if "error" in line
    )
    assert summary == Summary(
        tmp_path / "captions.json",
        COUNT,
        COUNT - len(broken),
        {"repetition": 4},
        {"corrupt_image": len(broken)},
        retried=0,
        tokens=sum(line.get("tokens", 0) for line in found),
    )
    records = json.loads((tmp_path / "captions.json").read_text())
    assert records == [
        {
            "id": line["image"][2:6],
            "image": line["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{PROMPT}"},
                {"from": "gpt", "value": line["caption"]},
            ],
        }
        for line in found
        if "caption" in line
    ]
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert errors == [line for line in found if "error" in line]
    assert len({request.options.seed for request in engine.asked}) == len(engine.asked)
    assert not [path for path in (tmp_path / "work").iterdir() if path.name != "clock"]


def test_a_finished_job_is_left_as_it_is(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    caption(root, tmp_path)
    before, engine = files(tmp_path), FakeEngine()
    caption(root, tmp_path, engine)
    assert files(tmp_path) == before and not engine.asked


def test_the_engine_stays_full_across_shards(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Requests of the next shard come while the last ones of the one before are under way."""

    class Counting(FakeEngine):
        calls = 0

        def complete(self, requests: Any) -> Any:
            self.calls += 1
            return super().complete(requests)

    engine = Counting(slots=5)
    caption(root, tmp_path, engine)
    assert engine.calls == 1


@pytest.mark.parametrize("size", [1, 8, 1000])
def test_shards_don_t_change_captions(size: int, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    caption(root, tmp_path / "a")
    caption(root, tmp_path / "b", FakeEngine(slots=3), shard_size=size, read_ahead=2)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    same = ("captions.json", "errors.jsonl", "summary.json")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in same)


init = Claim.__init__


class Crash(BaseException):
    """The machine goes down: nothing happens after it."""


def test_cut_off_at_any_change_of_a_file(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the n-th write, link, rename, removal and so on, for every n, and after half a write."""
    some, names = tmp_path / "images.json", open_corpus(root)
    some.write_text(json.dumps([names.name(index) for index in range(6)]))

    def start(output: pathlib.Path) -> None:
        caption(some, output, root=root, shard_size=3, lease_seconds=0.0, guards=Guards(retry=1))

    start(tmp_path / "whole")
    expected = files(tmp_path / "whole")
    left = [0]

    def failing(name: str) -> Any:
        real = getattr(os, name)

        def change(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return real(*args, **kwargs)  # A heartbeat.
            left[0] -= 1
            if left[0] < 0:
                if left[0] == -1 and name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise Crash
            return real(*args, **kwargs)

        return change

    crashes = 0
    while True:
        output = tmp_path / f"crash{crashes}"
        left[0] = crashes
        with monkeypatch.context() as patch:
            for name in ("write", "link", "replace", "unlink", "utime", "fsync", "ftruncate", "chmod"):
                patch.setattr(os, name, failing(name))
            try:
                start(output)
            except Crash:
                pass
            else:
                break
        start(output)
        assert files(output) == expected, f"stopped before change {crashes}"
        crashes += 1
    assert crashes > 30


# --- Failures, retries, refusals -------------------------------------------------------------------


def test_too_many_failures_stop_the_run(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Three of 61 images are cut off."""
    caption(root, tmp_path / "allowed", max_failed="5%")
    caption(root, tmp_path / "number", max_failed="3")
    message = r"3 of 61 images failed, more than --max-failed 4% allows \(3 corrupt_image\); the first: "
    with pytest.raises(ImageError, match=message):
        caption(root, tmp_path / "stopped", max_failed="4%")
    # Other processes' failures count as well.
    with pytest.raises(ImageError, match="2 of 61 images failed"):
        caption(root, tmp_path / "number", max_failed="1")
    with pytest.raises(ValueError, match="neither a number"):
        caption(root, tmp_path / "stopped", max_failed="few")
    # What was done before the stop counts when it goes on.
    engine = FakeEngine()
    caption(root, tmp_path / "stopped", engine)
    assert 0 < len(engine.asked) < COUNT - 3
    assert files(tmp_path / "stopped") == files(tmp_path / "allowed")


def test_failed_images_can_be_tried_again(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Half of the images are away in the first run; only they are captioned in the third."""
    images, away = tmp_path / "images", tmp_path / "away"
    shutil.copytree(root, images)
    (tmp_path / "list.json").write_text(
        json.dumps(sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png")))
    )
    source = {"source": tmp_path / "list.json", "root": images}
    (images / "b").rename(away)
    first = caption(output=tmp_path / "out", **source)
    assert first.failed == {"missing_image": 20, "corrupt_image": 2}
    away.rename(images / "b")
    engine = FakeEngine()
    assert caption(output=tmp_path / "out", engine=engine, **source) == first and not engine.asked
    again = caption(output=tmp_path / "out", engine=engine, retry_failed=True, **source)
    assert again.failed == {"corrupt_image": 3} and len(engine.asked) == 20 + 2
    caption(root, tmp_path / "whole")
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_an_image_that_is_exchanged_is_captioned_again(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In shards that were under way without being told to; in finished ones with `retry_changed`."""
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(root, images)
    names = sorted(path for path in images.rglob("*.png"))

    class Breaking(FakeEngine):
        def complete(self, requests: Any) -> Any:
            for number, result in enumerate(super().complete(requests)):
                if number == 30:
                    raise KeyboardInterrupt
                yield result

    with pytest.raises(KeyboardInterrupt):
        caption(images, out, Breaking(), shard_size=20)
    kept = [json.loads(line) for path in (out / "work").glob("*.jsonl") for line in path.open()]
    under_way = {images / line["image"] for line in kept if "caption" in line}
    exchanged = min(under_way)
    exchanged.write_bytes(names[0].read_bytes())
    engine = FakeEngine()
    caption(images, out, engine, shard_size=20)
    caption(images, tmp_path / "whole", shard_size=20)
    assert files(out) == files(tmp_path / "whole")
    assert len(under_way) > 3 and 0 < len(engine.asked) < COUNT - 20 - len(under_way) + 2

    names[1].write_bytes(names[2].read_bytes())
    caption(images, out, silent := FakeEngine(), shard_size=20)
    assert not silent.asked
    caption(images, out, engine := FakeEngine(), shard_size=20, retry_changed=True)
    # The three broken images are tried again, too.
    assert len(engine.asked) == 4 and names[1].read_bytes() in {r.prompt.images[0] for r in engine.asked}
    caption(images, tmp_path / "again", shard_size=20)
    assert files(out) == files(tmp_path / "again")


def test_engine_s_refusals_are_recorded(tmp_path: pathlib.Path) -> None:
    Image.new("RGB", (3, 3), (1, 1, 1)).save(tmp_path / "a.png")
    summary = caption(tmp_path, tmp_path / "out", max_failed="1")
    assert summary.failed == {"not_answered": 1} and summary.captioned == 0
    assert json.loads((tmp_path / "out/errors.jsonl").read_text())["error"] == "a.png: too long"
    assert json.loads((tmp_path / "out/captions.json").read_text()) == []


def test_flagged_captions_are_tried_again(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The fake loops on images of one colour, unless it is asked with a penalty and a temperature."""
    plain, engine = caption(root, tmp_path / "plain"), FakeEngine()
    summary = caption(root, tmp_path / "retried", engine, guards=Guards(retry=3))
    assert plain.flags == {"repetition": 4} and summary.flags == {} and summary.retried == 4
    changed = [
        (before, after)
        for before, after in zip(lines(tmp_path / "plain"), lines(tmp_path / "retried"), strict=True)
        if before != after
    ]
    assert len(changed) == 4 and all(after["attempts"] == 2 for _, after in changed)
    retried = [request.options for request in engine.asked if request.options.temperature]
    assert [(o.temperature, o.repetition_penalty) for o in retried] == [(0.5, 1.2)] * 4
    # Those that don't get better keep the first attempt.
    kept = caption(root, tmp_path / "kept", guards=Guards(retry=2, temperature=0.0), drop_flagged=True)
    assert kept.flags == {"repetition": 4} and kept.captioned == plain.captioned
    same = [line | {"attempts": 1} for line in lines(tmp_path / "kept")]
    assert [line for line in same if "error" not in line] == [
        line for line in lines(tmp_path / "plain") if "error" not in line
    ]
    assert len(json.loads((tmp_path / "kept/captions.json").read_text())) == plain.captioned - 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": SamplingOptions(top_k=3)}, "options.top_k was 0, now 3"),
        ({"shard_size": 9}, "shard_size was 7, now 9"),
        ({"guards": Guards(retry=2)}, "guards.retry was 0, now 2"),
    ],
)
def test_other_settings_are_refused(
    fields: dict[str, Any], message: str, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    caption(root, tmp_path, lease_seconds=3)
    before = files(tmp_path)
    with pytest.raises(
        ValueError, match=rf"begun with other settings: .*{message}.*another output directory"
    ):
        caption(root, tmp_path, **fields)
    assert files(tmp_path) == before
    caption(root, tmp_path, lease_seconds=4, max_failed="9", read_ahead=3)  # These change nothing.


def test_other_images_are_refused(tmp_path: pathlib.Path) -> None:
    images = tmp_path / "images"
    write_images(images, 4)
    caption(images, tmp_path / "out")
    Image.new("RGB", (3, 3)).save(images / "new.png")
    with pytest.raises(ValueError, match="images was 4, now 5"):
        caption(images, tmp_path / "out")
    (tmp_path / "out/job.json").write_text("{")
    with pytest.raises(ValueError, match=r"job\.json is damaged"):
        caption(images, tmp_path / "out")
    with pytest.raises(ValueError, match="mount one"):
        caption(images, "gs://bucket/out")


def test_damaged_shards_are_named(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    caption(root, tmp_path)
    whole, shard = files(tmp_path), tmp_path / "shards/captions-00002-of-00009.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"\n", b"", 1))
    with pytest.raises(ValueError, match=r"captions-00002-of-00009\.jsonl: damaged"):
        caption(root, tmp_path)
    shard.write_text("")
    with pytest.raises(ValueError, match="0 lines, 7 expected; remove it"):
        caption(root, tmp_path)
    shard.unlink()
    caption(root, tmp_path)
    assert files(tmp_path) == whole


def test_parquet_has_the_same_lines(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    caption(root, tmp_path, parquet=True)
    rows = pyarrow.parquet.read_table(tmp_path / "captions.parquet").to_pylist()
    given = [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert given == lines(tmp_path)


@pytest.mark.parametrize("heartbeat", [True, False])
def test_a_process_that_was_thought_dead(
    heartbeat: bool, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is stuck, another one takes all of its shards and finishes them; it may find out or not."""
    made: list[Claim] = []
    monkeypatch.setattr(Claim, "__init__", lambda self, *args: made.append(self) or init(self, *args))

    class Stuck(FakeEngine):
        def complete(self, requests: Any) -> Any:
            results = super().complete(requests)
            yield next(results)
            mine = list(made)
            for claim in mine:
                os.utime(claim.path, (0, 0))
            caption(root, tmp_path / "out", FakeEngine(slots=2))
            for claim in mine if heartbeat else ():
                claim.beat()
            yield from results

    stuck = Stuck()
    caption(root, tmp_path / "out", stuck, lease_seconds=1000)
    assert len(stuck.asked) < COUNT - 3
    caption(root, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_hundred_thousand_names(tmp_path: pathlib.Path) -> None:
    """Resuming looks at what there is to do, not at every image; names are all that is in memory."""
    (tmp_path / "list.json").write_text(json.dumps([f"{n:09d}.jpg" for n in range(100_000)]))
    tracemalloc.start()
    corpus = open_corpus(tmp_path / "list.json")
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 100_000 * 80 and peak < 3 * size
    shown: list[Progress] = []
    settings = Settings(max_failed="3", lease_seconds=0)
    for _ in range(3):
        with pytest.raises(ImageError, match="4 of 100000 images failed"):
            arguments = (FakeEngine(), corpus, tmp_path / "out", settings)
            caption_corpus(*arguments, prompt=PROMPT, model={}, show=shown.append)
    assert [progress.done for progress in shown] == [1, 2, 3] * 3
    assert str(shown[0]).startswith("1 of 100,000 images, ") and str(shown[0]).endswith(", 1 failed")


def test_progress_says_how_fast_and_how_long() -> None:
    progress = Progress(1_246_901, 12_034, 3, {"repetition": 12}, rate=45.2)
    said = "12,034 of 1,246,901 images, 45.2 images/s, 7 h 35 min left, 3 failed, 12 repetition"
    assert str(progress) == said
    assert f"`{said}`" in " ".join((DOCS / "captioning.md").read_text().split())
    assert str(Progress(10, 10, 0, {}, rate=2.0)) == "10 of 10 images, 2.0 images/s"
    assert str(Progress(10, 0, 0, {}, rate=0.0)) == "0 of 10 images, 0.0 images/s"


def test_prompt() -> None:
    assert prompt_for(Settings(), "Trained?") == ("Trained?", "the one the captioner was trained with")
    assert prompt_for(Settings(), "")[0] == DEFAULT_PROMPT == captioner.PROMPT
    said = prompt_for(Settings(prompt="Mine?"), "Trained?")
    assert said == ("Mine?", "as given; NOT the one the captioner was trained with, 'Trained?'")
