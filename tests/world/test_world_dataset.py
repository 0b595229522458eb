"""The files that are written: formats of the release, no leak, same bytes each time."""

import hashlib
import io
import json

import pytest
from PIL import Image

from sg4v_jax.world import (
    CAPTION_QUESTIONS,
    SHORT_ANSWER,
    WorldFiles,
    attribute_f1,
    brief,
    dense,
    load_photos,
    questions,
    write_world,
)
from sg4v_jax.world.dataset import split_scenes

TRAIN, HELDOUT = 40, 10


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    seen = []

    def progress(pictures):
        assert len(pictures) == TRAIN + HELDOUT
        for picture in pictures:
            seen.append(picture)
            yield picture

    directory = tmp_path_factory.mktemp("world")
    files = write_world(
        directory,
        train_scenes=TRAIN,
        heldout_scenes=HELDOUT,
        seed=1,
        image_size=64,
        progress=progress,
    )
    assert len(seen) == TRAIN + HELDOUT
    return files


def _load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _check_record(record, root):
    assert set(record) <= {"id", "image", "conversations"}
    assert isinstance(record["id"], str)
    turns = record["conversations"]
    assert len(turns) >= 2 and len(turns) % 2 == 0
    for index, turn in enumerate(turns):
        assert set(turn) == {"from", "value"}
        assert turn["from"] == ("human", "gpt")[index % 2]
        assert turn["value"].strip() == turn["value"] != ""
    marks = [turn["value"].splitlines().count("<image>") for turn in turns]
    anywhere = [turn["value"].count("<image>") for turn in turns]
    assert marks == anywhere == [int("image" in record), *[0] * (len(turns) - 1)]
    if "image" in record:
        lines = turns[0]["value"].splitlines()
        assert "<image>" in (lines[0], lines[-1])
        assert (root / record["image"]).is_file()


def test_captions_have_the_released_format(written):
    records = _load(written.cap_dense)
    assert len(records) == TRAIN // 2 + 4
    for record in records:
        _check_record(record, written.image_root)
        assert len(record["conversations"]) == 2
        asked = record["conversations"][0]["value"].replace("<image>", "").strip()
        assert asked in CAPTION_QUESTIONS
    first = [record["conversations"][0]["value"] for record in records]
    assert any(value.startswith("<image>\n") for value in first)
    assert any(value.endswith("\n<image>") for value in first)
    assert len({record["id"] for record in records}) == len(records)


def test_the_captioner_sees_half_of_the_scenes_and_captions_the_others(written):
    images = _load(written.images_to_caption)
    assert len(images) == len(set(images)) == TRAIN - TRAIN // 2
    described = {record["image"] for record in _load(written.cap_dense)}
    photos = {f"photos/{photo.name}" for photo in load_photos()}
    assert photos < described and not described & set(images)
    scenes = (described - photos) | set(images)
    assert scenes == {name for name, _ in split_scenes(TRAIN, HELDOUT, seed=1)[0]}
    for image in scenes:
        with Image.open(written.image_root / image) as picture:
            assert picture.size == (64, 64) and picture.mode == "RGB"


@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
def test_dense_share_is_the_part_with_dense_captions(tmp_path, share):
    arguments = {"train_scenes": 10, "heldout_scenes": 1, "seed": 0, "image_size": 64}
    files = write_world(tmp_path, dense_share=share, **arguments)
    described = {record["image"] for record in _load(files.cap_dense)}
    described -= {f"photos/{photo.name}" for photo in load_photos()}
    images = _load(files.images_to_caption)
    assert (len(described), len(images)) == (10 * share, 10 - 10 * share)
    assert not described & set(images)
    assert len(_load(files.cap_brief)) == 10


def test_every_training_scene_has_a_brief_caption_and_it_is_true(written):
    train, _ = split_scenes(TRAIN, HELDOUT, seed=1)
    records = _load(written.cap_brief)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        _check_record(record, written.image_root)
    said = {record["image"]: record["conversations"][1]["value"] for record in records}
    assert said == {name: brief(scene) for name, scene in train} and len(records) == TRAIN


def test_dense_captions_are_true(written):
    scenes = dict(split_scenes(TRAIN, HELDOUT, seed=1)[0])
    for record in _load(written.cap_dense):
        if record["image"] in scenes:
            assert record["conversations"][1]["value"] == dense(scenes[record["image"]])
        else:
            assert record["image"].startswith("photos/")


def test_the_mix_has_every_kind_of_record(written):
    records = _load(written.sft_mix)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        _check_record(record, written.image_root)
    text = [record for record in records if "image" not in record]
    captions = [record for record in records if record["id"].startswith("caption_")]
    asked = [record for record in records if record["id"].startswith("qa_")]
    assert len(text) >= 10
    assert len(captions) >= TRAIN // 2 // 4
    assert len(asked) == TRAIN + 4
    assert len(text) + len(captions) + len(asked) == len(records)
    for record in (*text, *asked):
        for turn in record["conversations"][::2]:
            assert turn["value"].endswith(SHORT_ANSWER)
    assert all(len(record["conversations"]) >= 6 for record in asked)


def test_no_held_out_scene_is_trained_on():
    train, heldout = split_scenes(20_000, 200, seed=3)
    trained = {scene for _, scene in train}
    tested = {scene for _, scene in heldout}
    assert len(tested) == 200 and not trained & tested


def test_held_out_files_agree_with_each_other(written):
    scenes = dict(written.read_heldout())
    assert len(scenes) == HELDOUT
    captions = _lines(written.heldout_captions)
    assert [row["image"] for row in captions] == list(scenes)
    asked, answers = _lines(written.heldout_questions), _lines(written.heldout_answers)
    assert [row["question_id"] for row in asked] == list(range(len(asked)))
    assert [row["question_id"] for row in answers] == [row["question_id"] for row in asked]
    for row, answer in zip(asked, answers, strict=True):
        assert set(row) == {"question_id", "image", "text", "category"}
        assert set(answer) == {"question_id", "answer", "category"}
        assert row["category"] == answer["category"]
        assert (written.image_root / row["image"]).is_file()
    for row in captions:
        assert set(row) == {"question_id", "image", "text"}
        assert row["text"] in CAPTION_QUESTIONS
    per_image = {image: sum(row["image"] == image for row in asked) for image in scenes}
    assert all(per_image[image] == len(questions(scene, 0)) for image, scene in scenes.items())
    assert attribute_f1([dense(scene) for scene in scenes.values()], [*scenes.values()]).f1 == 1.0


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_behind(written, tmp_path):
    again = write_world(tmp_path, train_scenes=TRAIN, heldout_scenes=HELDOUT, seed=1, image_size=64)
    assert again == WorldFiles.below(tmp_path)

    def digests(root):
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*")
            if path.is_file()
        }

    first, second = digests(written.image_root.parent), digests(tmp_path)
    assert first == second
    assert not [name for name in second if name.endswith(".partial")]
    assert len(second) == TRAIN + HELDOUT + 4 + 8


def test_another_seed_is_another_world():
    assert split_scenes(20, 5, seed=1) == split_scenes(20, 5, seed=1)
    assert split_scenes(20, 5, seed=1) != split_scenes(20, 5, seed=2)


@pytest.mark.parametrize(("train", "heldout"), [(1, 5), (5, 0)])
def test_too_few_scenes_are_refused(tmp_path, train, heldout):
    with pytest.raises(ValueError, match="at least 2 and 1"):
        write_world(tmp_path, train_scenes=train, heldout_scenes=heldout, seed=0)
    assert not any(tmp_path.iterdir())


def test_photos_are_complete():
    photos = load_photos()
    sizes = {}
    for photo in photos:
        with Image.open(io.BytesIO(photo.encoded)) as picture:
            picture.load()
            assert picture.mode == "RGB"
            sizes[photo.name] = picture.size
        assert 60 <= len(photo.caption.split()) <= 90
        assert 4 <= len(photo.questions) <= 6
        assert all(turn.question.endswith(SHORT_ANSWER) for turn in photo.questions)
    assert sizes == {
        "astronaut.jpg": (512, 512),
        "chelsea.jpg": (451, 300),
        "coffee.jpg": (600, 400),
        "rocket.jpg": (640, 427),
    }
    assert sum(len(photo.encoded) for photo in photos) < 700_000


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    arguments = {"train_scenes": 2, "heldout_scenes": 1, "image_size": 64}
    files = write_world(tmp_path, seed=0, **arguments)
    before = files.sft_mix.read_bytes()

    def full(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("sg4v_jax.atomic.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_world(tmp_path, seed=1, **arguments)
    assert files.sft_mix.read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))
