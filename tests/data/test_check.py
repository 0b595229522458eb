"""`sg4v data check`: every planted defect is found as often as it was planted, and a build agrees."""

import collections
import dataclasses
import html.parser
import io
import itertools
import json
import pathlib
import re
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import Image

from sg4v_jax.__main__ import main
from sg4v_jax.data.build import build, decode_example, open_dataset
from sg4v_jax.data.check import CheckOptions, CheckReport, check, quantile, record_length
from sg4v_jax.data.check_report import render_page, summary, to_json, write_report
from sg4v_jax.data.defects import KINDS, allowed_bad, inspect_entry, inspect_image
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.json_stream import Entry, Position
from sg4v_jax.data.records import RecordError, parse_record
from sg4v_jax.data.sample import SampleFormat, make_sample
from sg4v_jax.data.sources import RELEASES, SOURCES, source_of
from sg4v_jax.data.tokenizer import Tokenizer
from tests.conftest import TinyWorld
from tests.data import planted as planting
from tests.data.planted import Planted, plant


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"), 3000)


@pytest.fixture(scope="module")
def report(planted: Planted) -> CheckReport:
    return check([planted.file], planted.image_root)


def test_every_planted_defect_is_found(planted: Planted, report: CheckReport) -> None:
    """Exactly as often, and by source."""
    assert set(planted.defects) == set(KINDS) - {"wrong_template"}  # That one has its own test.
    (file,) = report.files
    assert (file.records, file.bad) == (3000, planted.bad)
    assert +file.defects == planted.defects
    found = {source: collections.Counter(counts) for source, counts in file.sources.items()}
    for counts in found.values():
        del counts["length"]
    assert found == {source: +counts for source, counts in planted.sources.items()}
    assert {kind for kind in KINDS if KINDS[kind].bad} == planting.BAD


def test_every_defect_has_examples(planted: Planted, report: CheckReport) -> None:
    (file,) = report.files
    entries = planted.file.read_bytes().split(b"\n")
    for kind, count in planted.defects.items():
        examples = file.examples[kind]
        assert len(examples) == min(5, count)
        for example in examples:
            assert example.message.startswith(f"{planted.file}: record {example.index}, line ")
            assert example.image.encode() in entries[example.index]
    (first, *_) = file.examples["missing_image"]
    assert "no such file below" in first.message and first.image


def test_a_build_agrees(planted: Planted, report: CheckReport, tmp_path: pathlib.Path) -> None:
    """The same records are bad, and what the build keeps is all the rest, in order."""
    directory, built = build("p", planted.file, planted.image_root, tmp_path, bad_records="drop")
    assert (built.written, sum(built.dropped.values())) == (len(planted.good), report.bad)
    assert built.dropped == {kind: n for kind, n in planted.defects.items() if KINDS[kind].bad}
    dataset = open_dataset(directory)
    assert [decode_example(dataset[i], "p", i)[0].id for i in range(len(dataset))] == planted.good
    with pytest.raises(RecordError, match="more than max_bad"):
        build(
            "q",
            planted.file,
            planted.image_root,
            tmp_path,
            bad_records="drop",
            max_bad=str(planted.bad - 1),
        )


def test_workers_change_nothing(planted: Planted, report: CheckReport) -> None:
    assert check([planted.file], planted.image_root, workers=2) == report


def test_headers_only_misses_nothing_but_damage(planted: Planted, report: CheckReport) -> None:
    quick = check([planted.file], planted.image_root, CheckOptions(decode=False)).files[0].defects
    full = report.files[0].defects
    assert 0 < quick["corrupt_image"] < full["corrupt_image"]  # No image at all shows at once.
    assert {**quick, "corrupt_image": 0} == {**full, "corrupt_image": 0}


@pytest.mark.parametrize(("more", "passed"), [(0, True), (-1, False)])
def test_the_command(
    planted: Planted, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], more: int, passed: bool
) -> None:
    """Exit 1 above the cap; the report and its JSON are written in both cases."""
    argv = ["data", "check", "--json", str(planted.file), "--images", str(planted.image_root)]
    argv += ["--output", str(tmp_path / "report.html"), "--workers=1", "--headers-only"]
    quick = check([planted.file], planted.image_root, CheckOptions(decode=False)).bad
    assert quick < planted.bad
    argv += [f"--max-bad={quick + more}"]
    if passed:
        main(argv)
    else:
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 1
    shown = capsys.readouterr().out
    assert f"{'passed' if passed else 'failed'}: {quick} of 3000 records are bad" in shown
    assert f"{planted.defects['missing_image']}  missing_image: no such image file" in shown
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert (numbers["passed"], numbers["bad"], numbers["records"]) == (passed, quick, 3000)


# --- The report ----------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page that must be well formed."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: collections.Counter[str] = collections.Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page(planted: Planted, report: CheckReport) -> None:
    page = Page(render_page(report))
    assert not page.tags["script"] and not page.tags["link"]
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value and value.startswith("data:image/jpeg;base64,")
    shown = len({source for source in report.files[0].samples if source != "(text only)"})
    assert shown == 11 and page.tags["img"] == sum(
        len(samples) for source, samples in report.files[0].samples.items() if source != "(text only)"
    )
    for kind, count in planted.defects.items():
        assert f"{count} {kind}" in page.text
    for source in planted.sources:
        assert source in page.text
    assert "<small>" in page.text  # It is among the words: text, not an element.
    assert not page.tags["small"]


def test_text_from_the_data_is_only_text(tmp_path: pathlib.Path) -> None:
    """Ids, paths, answers: none of them becomes part of the page or of the terminal's commands."""
    evil = "<script>alert(1)</script>\x1b[31m'\" onerror=x"
    turns = [{"from": "human", "value": f"<image>{evil}"}, {"from": "gpt", "value": evil}]
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.jpg").write_bytes(Image.new("RGB", (9, 9)).tobytes())
    (tmp_path / f"x/{evil.replace('/', '')}.png").write_bytes(a_picture("PNG"))
    names = ["x/a.jpg", f"x/{evil.replace('/', '')}.png", f"{evil}/none.jpg"]
    records = [{"id": evil, "image": name, "conversations": turns} for name in names]
    file = tmp_path / "evil.json"
    file.write_text(json.dumps([*records, {"id": "\ud83d", "conversations": turns}, {"id": [evil]}]))
    report = check([file], tmp_path)
    assert report.bad == 4
    page = Page(render_page(report))
    assert not page.tags["script"] and all(not name.startswith("on") for name, _ in page.attributes)
    assert page.text.count("<script>alert(1)</script>") > 3
    assert "\x1b" not in summary(report)
    write_report(report, tmp_path / "out/report.html")
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(to_json(report)))


def a_picture(form: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (1, 2, 3)).save(data, form)
    return data.getvalue()


def test_counts_and_folders_of_a_release(tmp_path: pathlib.Path) -> None:
    """By its name: what should be there beside what is, and which folder comes from where."""
    (tmp_path / "data/coco/train2017").mkdir(parents=True)
    file = tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json"
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    file.write_text(json.dumps([{"id": "1", "image": "sam/images/sa_1.jpg", "conversations": turns}]))
    report = check([file], tmp_path / "data")
    (found,) = report.files
    folders = {"coco/train2017": True, "llava/llava_pretrain/images": False, "sam/images": False}
    assert found.folders == folders
    shown = summary(report)
    assert "(the released file has 1246901)" in shown
    assert "no folder sam/images below" in shown and "SA-1B" in shown
    assert re.search(r"sam +1 +570486 +1 +1 +1", shown)
    assert re.search(r"llava +0 +558128 +0 +0 +0", shown)
    assert to_json(report)["files"][0]["expected_sources"]["coco"] == 118_287
    assert "SA-1B" in Page(render_page(report)).text


def test_what_is_known_of_the_releases() -> None:
    """The parts of a file add up, where all of them are known."""
    for name, release in RELEASES.items():
        total = sum(release.counts.values())
        complete = "cap100k" not in name and "cap23k" not in name
        assert total == release.records if complete else total < release.records
        assert set(release.counts) <= {*SOURCES, "(text only)"}
    assert RELEASES["sharegpt4v_instruct_gpt4-vision_cap100k.json"].records - 80_045 == sum(
        RELEASES["sharegpt4v_instruct_gpt4-vision_cap100k.json"].counts.values()
    )
    flat = RELEASES["blip_laion_cc_sbu_558k.json"]
    assert source_of("00453/004539375.jpg", flat) == "llava"
    for source, about in SOURCES.items():
        assert {source_of(f"{folder}/x.jpg") for folder in about.folders} == {source}
    assert [source_of(name) for name in ("x.jpg", "/etc/x", "../x", "a\\x", "./a/x")] == [
        "(no folder)",
        "(outside)",
        "(outside)",
        "a",
        "a",
    ]


# --- Lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["v1", "llama_2"])
def test_lengths_are_those_of_training(
    tiny_world: TinyWorld, small_tokenizer: Tokenizer, template: str
) -> None:
    """Every record of the mix, against the sample that the loader makes."""
    options = CheckOptions(str(small_tokenizer.path), template, image_tokens=9)
    form = SampleFormat(template, "pad", "", 24, 9, 1 << 20, 4)
    dataset = open_dataset(tiny_world.mix)
    lengths: collections.Counter[int] = collections.Counter()
    for i in range(len(dataset)):
        record, images = decode_example(dataset[i], "mix", i)
        length = len(make_sample(record, images, form, small_tokenizer)["tokens"])
        assert record_length(record, options) == length
        lengths[length] += 1
    median = quantile(lengths, 0.5)
    options = dataclasses.replace(options, max_length=median)
    (file,) = check([tiny_world.directory / "sft_mix.json"], tiny_world.image_root, options).files
    assert file.lengths == lengths
    longer = sum(n for length, n in lengths.items() if length > median)
    assert 0 < longer == file.defects["too_long"] < len(dataset)


def test_words_without_a_tokenizer() -> None:
    turns = [{"from": "human", "value": "<image>\nWhat now?"}, {"from": "gpt", "value": "An <image> tag."}]
    record = parse_record({"image": "a", "conversations": turns}, source="s", index=0)
    assert record_length(record, CheckOptions(image_tokens=10)) == 10 + 2 + 3


def test_records_that_the_template_cannot_write(tiny_world: TinyWorld, small_tokenizer: Tokenizer) -> None:
    """`plain` takes one question with an image and its caption."""
    objects = json.loads((tiny_world.directory / "sft_mix.json").read_text())
    wrong = sum(len(o["conversations"]) > 2 or "image" not in o for o in objects)
    for tokenizer in ("", str(small_tokenizer.path)):
        options = CheckOptions(tokenizer, "plain")
        report = check([tiny_world.directory / "sft_mix.json"], tiny_world.image_root, options)
        assert 0 < wrong == report.files[0].defects["wrong_template"] < len(objects)
        assert report.files[0].lengths.total() == len(objects) - wrong
        assert report.bad == 0


@hypothesis.given(st.lists(st.integers(0, 50), min_size=1), st.floats(0.01, 1))
def test_quantile(lengths: list[int], share: float) -> None:
    value = quantile(collections.Counter(lengths), share)
    below = sum(length <= value for length in lengths)
    assert below >= share * len(lengths) > sum(length < value for length in lengths)


def test_histogram_counts_everything(report: CheckReport) -> None:
    numbers = to_json(report)["files"][0]["lengths"]
    assert sum(count for *_, count in numbers["histogram"]) == report.files[0].lengths.total()
    edges = [(first, last) for first, last, _ in numbers["histogram"]]
    assert all(last + 1 == first for (_, last), (first, _) in itertools.pairwise(edges))
    assert edges[-1][1] >= numbers["max"]


# --- Errors --------------------------------------------------------------------------------------


def test_files_that_can_not_be_checked(planted: Planted, tmp_path: pathlib.Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_bytes(planted.file.read_bytes()[:100_000])
    with pytest.raises(RecordError, match=r"cut\.json: record \d+, line \d+, byte \d+: .*cut off"):
        check([cut], planted.image_root)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        check([tmp_path / "none.json"], planted.image_root)
    with pytest.raises(FileNotFoundError, match="no-such: no such image folder"):
        check([planted.file], tmp_path / "no-such")
    with pytest.raises(ValueError, match="given twice"):
        check([planted.file, planted.file], planted.image_root)
    with pytest.raises(ValueError, match="unknown template 'v2'"):
        check([planted.file], planted.image_root, CheckOptions(template="v2"))
    with pytest.raises(FileNotFoundError, match=r"none\.model"):
        check([planted.file], planted.image_root, CheckOptions(tokenizer="none.model"))
    with pytest.raises(ValueError, match="write 100 or 1%"):
        check([planted.file], planted.image_root, max_bad="some")


def test_several_files_and_none_of_records(tmp_path: pathlib.Path, planted: Planted) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    report = check([empty, planted.file], planted.image_root, CheckOptions(decode=False), max_bad="50%")
    assert [file.records for file in report.files] == [0, 3000]
    assert report.passed
    Page(render_page(report))


@pytest.mark.parametrize(
    ("cap", "records", "allowed"),
    [("0", 10, 0), ("7", 10, 7), ("1%", 250, 2), ("100%", 3, 3), ("0.5%", 199, 0), (" 50 % ", 4, 2)],
)
def test_caps(cap: str, records: int, allowed: int) -> None:
    assert allowed_bad(cap, records) == allowed


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "image", "conversations", "from", "value", "human"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@hypothesis.given(json_values)
def test_any_value_is_told_good_from_bad(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    """Whatever the JSON holds: a record, or a bad defect and an error; never a crash."""
    entry = Entry(Position(0, 0, 1), value)
    found = inspect_entry(entry, source="s", image_root=tmp_path_factory.getbasetemp())
    bad = [defect for defect in found.defects if defect.bad]
    assert (found.record is None) == bool(bad) == (found.error is not None)
    if found.error:
        assert str(found.error) == bad[0].message


@hypothesis.given(st.data(), st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"]))
def test_any_damage_to_an_image_is_survived(data: st.DataObject, form: str) -> None:
    """What a check takes for usable can be loaded, and what it refuses is an ImageError."""
    image = bytearray(a_picture(form))
    for _ in range(data.draw(st.integers(0, 8))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    image = image[: data.draw(st.integers(0, len(image)))]
    try:
        kinds = {defect.kind for defect in inspect_image(bytes(image), "x.jpg")}
    except ImageError:
        return
    assert kinds <= {"mistyped_image", "animated_image"}


def test_the_planted_file_is_the_same_every_time(tmp_path: pathlib.Path) -> None:
    one, two = plant(tmp_path / "1", 400), plant(tmp_path / "2", 400)
    assert one.file.read_bytes() == two.file.read_bytes()
    assert (one.defects, one.sources, one.good) == (two.defects, two.sources, two.good)
