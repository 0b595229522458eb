"""Decoding of every kind of file, and pixels equal to the CLIP image processor's."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sg4v_jax.data.image import (
    CLIP_MEAN,
    CLIP_STD,
    ImageError,
    load_image,
    normalize_reference,
    preprocess,
)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture with gradients, edges and noise: what resampling can get wrong."""
    rng = np.random.default_rng(width * 10007 + height)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1).astype(np.uint8)
    pixels[rng.random((height, width)) < 0.1] = 255
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def load(data: bytes, **options: Any) -> Image.Image:
    return load_image(data, name="a/b.jpg", **options)


# Decoding.

_ROTATED = Image.Exif()
_ROTATED[274] = 6
JPEGS: list[dict[str, Any]] = [
    *({"subsampling": n, "progressive": progressive} for n in (0, 1, 2) for progressive in (False, True)),
    {"mode": "L"},
    {"mode": "CMYK"},
    {"keep_rgb": True},
    {"restart_marker_blocks": 2},
    {"exif": _ROTATED.tobytes()},
]


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("L", "PNG"),
        ("L", "JPEG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("PA", "TIFF"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"),
        ("1", "PNG"),
        ("F", "TIFF"),
    ],
)
def test_every_mode_as_pillow_converts(mode: str, form: str) -> None:
    image = photo(40, 30, "RGB" if mode == "PA" else mode)
    if mode == "PA":
        image = image.convert("P").convert("PA")
    data = encode(image, form)
    expected = Image.open(io.BytesIO(data))
    assert expected.mode in (mode, "RGBA", "RGB")
    loaded = load(data)
    assert loaded.mode == "RGB"
    assert loaded.size == (40, 30)
    assert loaded.tobytes() == expected.convert("RGB").tobytes()


@pytest.mark.parametrize("options", JPEGS, ids=str)
def test_every_jpeg_as_pillow_decodes(options: dict[str, Any]) -> None:
    """To the bit, whichever decoder is installed; whole and damaged, and with EXIF rotation ignored."""
    rng = np.random.default_rng(0)
    for width, height in [(1, 1), (7, 5), (16, 16), (33, 50), (130, 97)]:
        image = photo(width, height, options.get("mode", "RGB"))
        saved = {name: value for name, value in options.items() if name != "mode"}
        data = encode(image, "JPEG", quality=int(rng.integers(30, 96)), **saved)
        damaged = bytearray(data)
        damaged[int(rng.integers(2, len(data)))] ^= 1 << int(rng.integers(8))
        for file in (data, data + b"more", bytes(damaged), data[: len(data) * 2 // 3]):
            try:
                expected = Image.open(io.BytesIO(file)).convert("RGB").tobytes()
            except Exception:
                with pytest.raises(ImageError):
                    load(file)
            else:
                assert load(file).tobytes() == expected


def test_transparency_is_dropped() -> None:
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert load(encode(image)).getpixel((0, 0)) == (10, 20, 30)
    palette = photo(20, 20, "P")
    data = encode(palette, transparency=3)
    assert load(data).tobytes() == palette.convert("RGB").tobytes()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_byte(form: str) -> None:
    values = np.array([[0, 255, 256, 257], [4660, 32768, 65279, 65535]], np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    grey = np.asarray(load(encode(image, form)))
    assert (grey == (values >> 8)[..., None]).all()


def test_16_bit_pgm_and_32_bit() -> None:
    header = b"P5 2 2 65535\n"
    grey = np.asarray(load(header + struct.pack(">4H", 0, 4660, 32768, 65535)))
    assert grey[..., 0].tolist() == [[0, 18], [128, 255]]
    wide = Image.fromarray(np.array([[-5, 300], [65535, 70000]], np.int32))
    assert np.asarray(load(encode(wide, "TIFF")))[..., 0].tolist() == [[0, 1], [255, 255]]
    eight = Image.fromarray(np.array([[0, 128], [200, 255]], np.int32))
    assert np.asarray(load(encode(eight, "TIFF")))[..., 0].tolist() == [[0, 128], [200, 255]]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert load(data).getpixel((4, 4)) == (255, 0, 0)


def test_exif_rotation_only_when_asked() -> None:
    image = photo(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(image, "PNG", exif=exif)
    assert load(data).tobytes() == image.tobytes()
    turned = load(data, apply_exif_rotation=True)
    assert turned.size == (30, 40)
    assert turned.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert load(encode(image), apply_exif_rotation=True).tobytes() == image.tobytes()


# Damage.


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files(form: str) -> None:
    data = encode(photo(64, 48), form)
    for keep in (0.05, 0.3, 0.6, 0.9):
        part = data[: int(len(data) * keep)]
        with pytest.raises(ImageError, match=rf"^a/b.jpg: can't be decoded \({len(part)} bytes\): "):
            load(part)


@pytest.mark.parametrize("data", [b"", b"\0", b"<html>404</html>", b"\xff\xd8\xff", b"GIF89a"])
def test_files_that_are_no_images(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^a/b.jpg: can't be decoded"):
        load(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_any_damage_gives_an_image_or_an_image_error(form: str) -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(photo(24, 16), form), np.uint8)
    for _ in range(150):
        damaged = data.copy()
        at = rng.integers(len(data), size=3)
        damaged[at] = rng.integers(256, size=3)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(damaged.tobytes(), max_pixels=10_000_000)
        except ImageError:
            pass


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_bombs_are_refused_by_their_header() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=r"a/b.jpg: 10001 x 10000 is more than 100000000 pix"):
            load(bomb(10001, 10000))
    with pytest.raises(ImageError, match=r"a/b.jpg: .*decompression bomb"):
        load(bomb(60000, 60000))
    image = photo(100, 10)
    assert load(encode(image), max_pixels=1000).size == (100, 10)
    with pytest.raises(ImageError, match="100 x 10 is more than 999 pixels; make it smaller"):
        load(encode(image), max_pixels=999)


# Pixels. LLaVA's expand2square and the processor, written apart from the library.


def oracle(image: Image.Image, size: int, aspect: str) -> np.ndarray:
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    assert tuple(processor.image_mean) == CLIP_MEAN
    assert tuple(processor.image_std) == CLIP_STD
    if aspect == "pad" and image.width != image.height:
        background = tuple(int(255 * mean) for mean in processor.image_mean)
        side = max(image.size)
        square = Image.new(image.mode, (side, side), background)
        if image.width > image.height:
            square.paste(image, (0, (side - image.height) // 2))
        else:
            square.paste(image, ((side - image.width) // 2, 0))
        image = square
    pixels = np.asarray(processor.preprocess(image)["pixel_values"][0])
    return pixels.transpose(1, 2, 0)


SIZES = [
    (640, 480),
    (480, 640),
    (336, 336),
    (337, 336),
    (335, 336),
    (500, 333),
    (333, 500),
    (341, 1023),
    (1, 1),
    (2, 3),
    (1, 50),
    (50, 1),
    (3000, 7),
    (7, 3000),
    (1000, 999),
]


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_equal_the_reference(width: int, height: int, aspect: str) -> None:
    image = photo(width, height)
    pixels = preprocess(image, size=336, aspect=aspect)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (336, 336, 3)
    normal = normalize_reference(pixels)
    assert normal.dtype == np.float32
    np.testing.assert_array_equal(normal, oracle(image, 336, aspect))


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_odd_offsets_and_sizes_equal_the_reference(aspect: str) -> None:
    """Every remainder of (long edge - size) and odd target sizes."""
    for size in (14, 15, 28):
        for width in range(20, 40, 3):
            for height in range(17, 60, 4):
                image = photo(width, height)
                normal = normalize_reference(preprocess(image, size=size, aspect=aspect))
                np.testing.assert_array_equal(normal, oracle(image, size, aspect))


def test_padding_is_the_mean_colour() -> None:
    image = Image.new("RGB", (100, 51), (255, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.line((0, 25, 99, 25), (0, 0, 255))
    pixels = preprocess(image, size=100, aspect="pad")
    assert pixels[0, 0].tolist() == [122, 116, 104]
    assert pixels[23, 0].tolist() == [122, 116, 104]
    assert pixels[24, 0].tolist() == [255, 0, 0]
    assert pixels[24 + 25, 50].tolist() == [0, 0, 255]
    assert pixels[75, 0].tolist() == [122, 116, 104]


def test_normalize_by_hand() -> None:
    value = normalize_reference(np.array([[0, 128, 255]], np.uint8))
    expected = [(v / 255 - m) / s for v, m, s in zip((0, 128, 255), CLIP_MEAN, CLIP_STD, strict=True)]
    np.testing.assert_allclose(value[0], expected, rtol=1e-6)


def test_wrong_requests() -> None:
    with pytest.raises(ValueError, match="unknown aspect 'crop'; use one of 'square', 'pad'"):
        preprocess(photo(4, 4), size=14, aspect="crop")
    with pytest.raises(ImageError, match="expected RGB pixels, got mode 'L', 4 x 4"):
        preprocess(photo(4, 4, "L"), size=14, aspect="pad")
    with pytest.raises(ImageError, match="got mode 'RGB', 0 x 4"):
        preprocess(Image.new("RGB", (0, 4)), size=14, aspect="pad")


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_extremely_long_images_are_refused_not_blown_up(aspect: str) -> None:
    with pytest.raises(ImageError, match="3000000 x 1 is too long an image: it would become"):
        preprocess(Image.new("RGB", (3_000_000, 1)), size=336, aspect=aspect)
