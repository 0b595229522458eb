"""Image files to the pixels the vision tower takes, equal to the reference bit for bit.

Pillow does the resizing: its antialiased bicubic filter on uint8 is what the released weights were
trained with, and no accelerator's resize equals it. The result stays uint8; the device normalises.
"""

import io

import numpy as np
from PIL import Image, ImageOps

try:  # Optional: decodes most JPEGs to the same bits in less time (tests/data/test_image.py).
    import simplejpeg
except ImportError:
    simplejpeg = None

from sg4v_jax.models.config import CLIP_MEAN, CLIP_STD

ASPECTS = ("square", "pad")
_PAD_COLOR = (122, 116, 104)  # tuple(int(255 * x) for x in CLIP_MEAN), the colour of "nothing"
# Padding or resizing a very long image can blow it up; Pillow takes 4 bytes a pixel.
_MAX_WORK_PIXELS = 1 << 28
# Above this Pillow warns of "decompression bombs", and later refuses.
_MAX_FAST_PIXELS = 80_000_000


class ImageError(ValueError):
    """An image can't be read or used; the message names it and says why."""


def load_image(
    data: bytes,
    *,
    name: str,
    max_pixels: int = 100_000_000,
    apply_exif_rotation: bool = False,
) -> Image.Image:
    """Decodes an image file to RGB.

    Colours come out as Pillow's `convert("RGB")` gives them (transparency is dropped), except that
    16-bit greys keep their upper 8 bits, as Pillow itself does for 16-bit colour; `convert` would
    turn nearly all of them white. Of an animation the first frame counts.

    Args:
        data: the file's bytes.
        name: for messages.
        max_pixels: the largest width x height to decode, tested on the header. Above 178 million
            Pillow's own limit holds (`PIL.Image.MAX_IMAGE_PIXELS`).
        apply_exif_rotation: turns the image as its EXIF orientation says. The released weights
            were trained without, which is the default.

    Raises:
        ImageError: not an image, cut off, damaged or too large.
    """
    if not apply_exif_rotation:
        pixels = _decode_jpeg(data, min(max_pixels, _MAX_FAST_PIXELS))
        if pixels is not None:
            return Image.fromarray(pixels)
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{name}: {width} x {height} is more than {max_pixels} pixels; make it smaller "
                    "or raise max_pixels"
                )
            image.load()
            turned = ImageOps.exif_transpose(image) if apply_exif_rotation else image
            return _to_rgb(turned)
    except ImageError:
        raise
    # A damaged file makes Pillow's decoders raise nearly anything, from OSError to IndexError.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name}: can't be decoded ({len(data)} bytes): {reason}") from error


def preprocess(image: Image.Image, *, size: int, aspect: str) -> np.ndarray:
    """Brings an image to the tower's square.

    Equal to the CLIP image processor up to its normalisation: bicubic resize of the shorter edge
    to `size` (the longer to `int(size * long / short)`), then the centre `size` x `size`.

    Args:
        image: an RGB image, as from `load_image`.
        size: edge of the square: 336 for ShareGPT4V.
        aspect: "square" cuts the longer edge (pre-training); "pad" first puts the image in the
            middle of a square of the mean colour (fine-tuning and inference).

    Returns:
        uint8[size, size, 3].

    Raises:
        ValueError: unknown `aspect`.
        ImageError: not RGB, without pixels, or so long that the work would take gigabytes.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"unknown aspect {aspect!r}; use one of {', '.join(map(repr, ASPECTS))}")
    width, height = image.size
    if image.mode != "RGB" or not width or not height:
        raise ImageError(f"expected RGB pixels, got mode {image.mode!r}, {width} x {height}")
    return _resize_padded(image, size) if aspect == "pad" else _resize_and_crop(image, size)


def normalize_reference(pixels: np.ndarray) -> np.ndarray:
    """Normalises on the host, `(pixels / 255 - CLIP_MEAN) / CLIP_STD` in float32.

    This is what the device computes from the uint8 pixels, and equal bit for bit to the CLIP image
    processor.

    Args:
        pixels: uint8[..., 3].

    Returns:
        float32[..., 3].
    """
    unit = pixels.astype(np.float32) / np.float32(255)
    normal: np.ndarray = (unit - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return normal


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _high_byte(np.asarray(image))
    if image.mode == "I":
        # Pillow gives 16-bit PGM and some 16-bit TIFF this mode; smaller values are 8-bit data.
        values = np.asarray(image)
        if values.max() > 255:
            return _high_byte(values.clip(0, 65535))
    return image.convert("RGB")


def _high_byte(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """uint8[height, width, 3]; None for all that Pillow has to look at, as it does without simplejpeg."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if width * height > max_pixels or colorspace not in ("YCbCr", "Gray", "RGB"):
            return None
        # Strict: what libjpeg only warns of, Pillow may refuse.
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None
    return pixels


def _resize_padded(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the image in the middle of a square; its rows first, and those of the padding not at all.

    Resizing makes equal pixels of equal pixels, so the padding above and below may come later.
    """
    width, height = image.size
    side = max(width, height)
    _check_work((side, side), image)
    if width < height:
        image = _paste(image, (side, side))
    rows = image.resize((size, image.height), Image.Resampling.BICUBIC)
    return np.asarray(_paste(rows, (size, side)).resize((size, size), Image.Resampling.BICUBIC))


def _paste(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in the middle of a canvas of the mean colour."""
    if image.size == size:
        return image
    canvas = Image.new("RGB", size, _PAD_COLOR)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def _resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    width, height = image.size
    # Multiply first and truncate: the processor's rounding, to the last pixel.
    longer = int(size * max(width, height) / min(width, height))
    resized = (size, longer) if width <= height else (longer, size)
    _check_work(resized, image)
    top, left = (resized[1] - size) // 2, (resized[0] - size) // 2
    if width > height:
        # Rows, then columns: what one call does. In between, the columns that are cut off can go.
        rows = image.resize((longer, height), Image.Resampling.BICUBIC)
        image, left = rows.crop((left, 0, left + size, height)), 0
        resized = (size, size)
    # Not so for tall images: there Pillow 13 does columns first, earlier ones do rows first.
    pixels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    # A copy, so that the cut-off rest is freed.
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _check_work(size: tuple[int, int], image: Image.Image) -> None:
    if size[0] * size[1] > _MAX_WORK_PIXELS:
        raise ImageError(
            f"{image.width} x {image.height} is too long an image: it would become {size[0]} x "
            f"{size[1]} on the way; cut it, or make it smaller"
        )
