"""From images inside other files to a dataset with their captions."""

import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from sg4v_jax.__main__ import main
from sg4v_jax.caption.corpus.inputs import open_corpus
from sg4v_jax.caption.corpus.unpack import unpack
from sg4v_jax.data.build import build, decode_example, open_dataset
from sg4v_jax.data.image import ImageError
from tests.caption.corpus.fake import caption, write_images
from tests.caption.corpus.test_inputs import write_tar


def write_parquet(root: pathlib.Path, names: list[str], file: pathlib.Path) -> None:
    rows = [{"image": (root / name).read_bytes(), "path": name} for name in names]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_captions_of_archives_are_trained_on(
    form: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, shards, photos = tmp_path / "images", tmp_path / "shards", tmp_path / "photos"
    names = write_images(root, 8)  # One of them is cut off: `unpack` takes it, for its header is whole.
    shards.mkdir()
    for number, some in enumerate((names[:5], names[5:])):
        if form == "tar":
            write_tar(shards / f"{number}.tar", {name: (root / name).read_bytes() for name in some})
        else:
            write_parquet(root, some, shards / f"{number}.parquet")
    caption(shards, tmp_path / "captions")
    argv = ["data", "unpack", f"--images={shards}", f"--output={photos}"]
    main(argv)
    (photos / names[0] if form == "parquet" else photos / "0" / names[0]).unlink()
    main(argv)
    assert "8 written\n" in (shown := capsys.readouterr().out) and "1 written, 7 there already" in shown
    file = tmp_path / "captions/captions.json"
    directory, _ = build("pt", file, photos, tmp_path / "datasets")
    dataset, expected = open_dataset(directory), json.loads(file.read_text())
    assert len(dataset) == len(expected) == 7
    for index, record in enumerate(expected):
        found, (data,) = decode_example(dataset[index], "pt", index)
        assert found.turns[1].text == record["conversations"][1]["value"]
        assert data == (root / record["image"][2 * (form == "tar") :]).read_bytes()
    assert not list(photos.rglob(".*.partial"))


def test_what_is_not_unpacked(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "images"
    names = write_images(root, 4)
    members = {name: (root / name).read_bytes() for name in names}
    write_tar(tmp_path / "a.tar", members | {"../evil.png": b"x", "text.png": b"no image"})
    corpus = open_corpus(tmp_path / "a.tar")
    with pytest.raises(ImageError, match="1 of 6 images are bad, more than --max-failed 0 allows"):
        unpack(corpus, tmp_path / "out", max_failed="0")
    counts = unpack(corpus, tmp_path / "out", max_failed="2")
    assert counts == {"there already": 4, "path_outside": 1, "corrupt_image": 1}
    assert not list(tmp_path.rglob("evil.png"))
    (tmp_path / "out/a" / names[1]).write_bytes(members[names[0]])
    with pytest.raises(ValueError, match=r"is another image than .*a\.tar has of this name"):
        unpack(corpus, tmp_path / "out", max_failed="2")
