"""Every kind of corpus: the same images in the same order each time, and no harm from hostile ones."""

import io
import json
import os
import pathlib
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from sg4v_jax.caption.corpus.inputs import Corpus, list_images, open_corpus
from sg4v_jax.data.build import build
from sg4v_jax.data.json_stream import RecordError

COUNT = 12


def names(corpus: Corpus) -> list[str]:
    return [corpus.read(index).name for index in range(len(corpus))]


def kinds(corpus: Corpus) -> dict[str, str]:
    """What is wrong, by image."""
    images = (corpus.read(index) for index in range(len(corpus)))
    return {image.name: image.kind for image in images if image.error}


def write_tar(path: pathlib.Path, members: dict[str, bytes], *others: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in others:
            tar.addfile(info)


def files_of(root: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_folder(root: pathlib.Path) -> None:
    corpus = open_corpus(root)
    assert names(corpus) == list(files_of(root)) == list_images(root)
    image = corpus.read(3)
    assert image.data == (root / image.name).read_bytes() and not image.error


@pytest.mark.parametrize("form", ["paths", "records", "lines"])
def test_list(form: str, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    listed = ["b/0001.png", "a/0000.png", "b/0001.png", "none.png", "../out.png", "/etc/passwd", "a"]
    file = tmp_path / "images.json"
    if form == "paths":
        file.write_text(json.dumps(listed))
    else:
        records = [{"id": "x", "image": name, "conversations": []} for name in listed]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        file.write_text(json.dumps(records) if form == "records" else lines)
    corpus = open_corpus(file, root)
    assert names(corpus) == list(dict.fromkeys(listed)), "in order, and each once"
    assert kinds(corpus) == {
        "none.png": "missing_image",
        "../out.png": "path_outside",
        "/etc/passwd": "path_outside",
        "a": "unreadable_image",
    }


def test_paths_of_a_list_are_relative_to_it(root: pathlib.Path) -> None:
    file = root / "list.json"
    file.write_text('["a/0000.png"]')
    try:
        assert not kinds(open_corpus(file))
    finally:
        file.unlink()


def test_links_and_pipes(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(root / "a/0000.png")
    (tmp_path / "inside.png").symlink_to("real.png")
    (tmp_path / "real.png").write_bytes((root / "a/0000.png").read_bytes())
    corpus = open_corpus(tmp_path)
    assert kinds(corpus) == {"link.png": "path_outside", "pipe.png": "unreadable_image"}


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels by its header."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_limits(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "large.png").write_bytes((root / "a/0000.png").read_bytes() + bytes(1000))
    (tmp_path / "text.png").write_bytes(b"not an image")
    corpus = open_corpus(tmp_path)
    found = {image.name: image for image in (corpus.read(index, max_bytes=800) for index in range(4))}
    assert {name: image.kind for name, image in found.items()} == {
        "bomb.png": "huge_image",
        "empty.png": "zero_byte_image",
        "large.png": "huge_image",
        "text.png": "corrupt_image",
    }
    assert all(name in image.error and not image.data for name, image in found.items())
    assert "--max-image-bytes 800" in found["large.png"].error


def test_tars(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Webdataset's: images between other members, the same member names in each tar."""
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    images = list(files_of(root).values())
    for number in range(2):
        members = {f"{i:04d}.png": images[4 * number + i] for i in range(4)}
        members = {k: v for i, (k, v) in enumerate(members.items())} | {"0000.txt": b"a caption", "x/": b""}
        write_tar(tmp_path / f"shard-{number}.tar", members | {"../evil.png": images[0]}, link)
    corpus = open_corpus(tmp_path)
    assert names(corpus)[:6] == [
        *(f"shard-0/000{i}.png" for i in range(4)),
        "shard-0/../evil.png",
        "shard-0/link.jpg",
    ]
    assert [corpus.read(index).data for index in range(4)] == images[:4]
    assert kinds(corpus) == {
        f"shard-{number}/{name}": kind
        for number in range(2)
        for name, kind in (("../evil.png", "path_outside"), ("link.jpg", "unreadable_image"))
    }
    assert not list(tmp_path.rglob("*.png")), "nothing is unpacked"
    assert len(open_corpus(tmp_path / "shard-1.tar")) == 6


@pytest.mark.parametrize("damage", ["cut", "compressed", "text"])
def test_damaged_tar(damage: str, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.tar"
    if damage == "text":
        file.write_text("no tar at all, " * 100)
    else:
        write_tar(file, files_of(root))
        data = file.read_bytes()
        import gzip

        file.write_bytes(
            data[: len(data) // 3 // 512 * 512 + 100] if damage == "cut" else gzip.compress(data)
        )
    with pytest.raises(ValueError, match=r"a\.tar: no tar, or damaged or cut off"):
        open_corpus(file)


@pytest.mark.parametrize("layout", ["bytes", "struct", "unnamed"])
def test_parquet(layout: str, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Two files of two row groups each, in the layouts that Hugging Face datasets have."""
    files = list(files_of(root).items())
    for number in range(2):
        part = files[6 * number : 6 * number + 6]
        data, given = [data for _, data in part], [name for name, _ in part]
        if layout == "struct":
            rows = {"image": [{"bytes": d, "path": n} for d, n in zip(data, given, strict=True)]}
        else:
            rows = {"jpg": data, "text": ["x"] * 6} | ({"path": given} if layout == "bytes" else {})
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"{number}.parquet", row_group_size=4)
    corpus = open_corpus(tmp_path)
    expected = (
        [f"{n}/{i}" for n in range(2) for i in range(6)] if layout == "unnamed" else [n for n, _ in files]
    )
    assert names(corpus) == expected
    assert [corpus.read(i).data for i in (0, 3, 4, 7, 11)] == [files[i][1] for i in (0, 3, 4, 7, 11)]


def test_hostile_parquet(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.parquet").write_text("PAR1 or not")
    with pytest.raises(ValueError, match=r"a\.parquet: no Parquet file, or damaged"):
        open_corpus(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"url": ["https://"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column image or jpg.*it has url"):
        open_corpus(tmp_path)
    data = (root / "a/0000.png").read_bytes()
    rows = {"image": [data, None, data], "path": ["../up.png", "none.png", "ok.png"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    corpus = open_corpus(tmp_path)
    bad = {image.error.split(" ")[0]: image.kind for image in map(corpus.read, range(3)) if image.error}
    assert set(bad.values()) == {"path_outside", "unreadable_image"} and not corpus.read(2).error


def test_dataset(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What `sg4v data build` makes of a folder without captions, and of records without an image."""
    for path in root.rglob("*.png"):
        if path.name not in ("0005.png",):
            (tmp_path / "images" / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / path.relative_to(root)).write_bytes(path.read_bytes())
    directory, _ = build("photos", None, tmp_path / "images", tmp_path)
    corpus = open_corpus(directory)
    files = files_of(tmp_path / "images")
    assert names(corpus) == list(files)
    assert [corpus.read(index).data for index in range(len(corpus))] == list(files.values())
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "mix.json").write_text(json.dumps([{"id": "t", "conversations": talk}]))
    directory, _ = build("mix", tmp_path / "mix.json", tmp_path / "images", tmp_path)
    image = open_corpus(directory).read(0)
    assert "record 0 (id 't'): 0 images" in image.error


def test_identity(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Other names or another order are another corpus, in every format."""
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text('["a/0000.png", "b/0001.png"]')
    second.write_text('["b/0001.png", "a/0000.png"]')
    assert open_corpus(first, root).sha256 != open_corpus(second, root).sha256
    write_tar(tmp_path / "a.tar", {"1.png": b"1"})
    write_tar(tmp_path / "b.tar", {"1.png": b"1", "2.png": b""})
    assert open_corpus(tmp_path / "a.tar").sha256 != open_corpus(tmp_path / "b.tar").sha256
    assert open_corpus(root).sha256 == open_corpus(root).sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no images in this list"),
        ('["a.png", 7]', "expected an image path"),
        ('{"a": 1}', "expected an image path"),
        ('["a.png"', "cut off"),
        ('[{"id": 1, "image": ["a.png", "b.png"]}]', "one image"),
    ],
)
def test_bad_lists(content: str, message: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "list.json"
    file.write_text(content)
    with pytest.raises((ValueError, RecordError), match=message):
        open_corpus(file)


def test_what_can_t_be_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no images in this folder"):
        open_corpus(tmp_path)
    with pytest.raises(FileNotFoundError, match="none: no such file or folder"):
        open_corpus(tmp_path / "none")
    for name in ("a.tar", "a.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="--input-format"):
        open_corpus(tmp_path)
    with pytest.raises(ValueError, match="'zip' is not one of"):
        open_corpus(tmp_path, form="zip")
    with pytest.raises(ValueError, match="goes with a list"):
        open_corpus(tmp_path, tmp_path, form="tar")
