"""Every mode that Pillow opens: scaled to the range of its pixels, or refused with a count."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.images import MOST_PIXELS, ImageBatches, ImageSet, decode, pixels_of

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6


def png(kind: int, bits: int, rows: list[bytes], width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of rows as they are stored, by the format's own words."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def shown(content: bytes) -> list[list[int]]:
    """Return the colours of a decoded image of one row."""
    image = decode(content)
    assert image.dtype == torch.uint8 and image.shape[:2] == (3, 1)
    return image[:, 0].T.tolist()


def grey(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


def test_16_bit_grey_ramp_keeps_its_shades():
    # Every value that there is; 0.4 % of them are white, not 99.6 %.
    row = np.arange(65536, dtype=">u2").tobytes()
    image = decode(png(GREY, 16, [row], 65536))
    counts = image[0, 0].bincount(minlength=256)
    assert counts.tolist() == [256] * 256
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_16_bit_grey_is_as_bright_as_16_bit_colour():
    values = np.random.default_rng(0).integers(0, 65536, 500, dtype=np.uint16).astype(">u2")
    alone = decode(png(GREY, 16, [values.tobytes()], 500))
    colours = np.repeat(values, 3).tobytes()
    assert torch.equal(alone, decode(png(COLOUR, 16, [colours], 500)))
    assert alone[0, 0].tolist() == [int(value) >> 8 for value in values]


@pytest.mark.parametrize(("bits", "step"), [(1, 255), (2, 85), (4, 17)])
def test_fewer_bits_reach_from_black_to_white(bits, step):
    values = list(range(2**bits))
    packed = "".join(f"{value:0{bits}b}" for value in values).ljust(8, "0")
    row = int(packed, 2).to_bytes(len(packed) // 8, "big")
    assert shown(png(GREY, bits, [row], len(values))) == grey(*(step * v for v in values))


def test_transparency_is_left_off():
    assert shown(png(GREY_ALPHA, 8, [bytes([200, 0, 10, 255])], 2)) == grey(200, 10)
    row = struct.pack(">4H", 0xC834, 0, 0x0AFF, 0xFFFF)
    assert shown(png(GREY_ALPHA, 16, [row], 2)) == grey(0xC8, 0x0A)
    row = bytes([1, 2, 3, 0, 4, 5, 6, 255])
    assert shown(png(COLOUR_ALPHA, 8, [row], 2)) == [[1, 2, 3], [4, 5, 6]]
    row = struct.pack(">4H", 0x0102, 0x0203, 0x0304, 0)
    assert shown(png(COLOUR_ALPHA, 16, [row], 1)) == [[1, 2, 3]]
    # One colour, or one grey of sixteen bits, that stands for nothing.
    row = bytes([9, 8, 7, 1, 2, 3])
    made = png(COLOUR, 8, [row], 2, (b"tRNS", struct.pack(">3H", 9, 8, 7)))
    assert shown(made) == [[9, 8, 7], [1, 2, 3]]
    row = struct.pack(">2H", 0x1234, 0xFF00)
    assert shown(png(GREY, 16, [row], 2, (b"tRNS", struct.pack(">H", 0x1234)))) == grey(0x12, 0xFF)


@pytest.mark.parametrize("transparency", [None, bytes([0, 128]), bytes([255, 0, 255])])
def test_palette_is_looked_up_without_a_warning(transparency):
    colours = bytes([10, 20, 30, 40, 50, 60, 70, 80, 90])
    chunks = [(b"PLTE", colours)] + ([(b"tRNS", transparency)] if transparency else [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = shown(png(PALETTE, 8, [bytes([2, 0, 1])], 3, *chunks))
    assert found == [[70, 80, 90], [10, 20, 30], [40, 50, 60]]


def jpeg(mode: str, colour: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (16, 1), colour).save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, [77, 77, 77]),
        ("RGB", (200, 30, 60), [200, 30, 60]),
        # Cyan, magenta, yellow and black inks: each takes its part of the light.
        ("CMYK", (0, 0, 0, 0), [255, 255, 255]),
        ("CMYK", (0, 0, 0, 255), [0, 0, 0]),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("CMYK", (51, 102, 0, 51), [163, 122, 204]),
        ("YCbCr", (76, 85, 255), [254, 0, 0]),
    ],
)
def test_jpeg_of_every_mode_has_its_colours(mode, colour, expected):
    for found in shown(jpeg(mode, colour)):
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 3, found


def image_of(mode: str, values: list, dtype: str) -> Image.Image:
    return Image.frombytes(mode, (len(values), 1), np.array(values, dtype).tobytes())


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (image_of("I;16", [0, 255, 0x1234, 0xFFFF], "<u2"), grey(0, 0, 0x12, 255)),
        (image_of("I;16L", [0x1234, 0xFFFF], "<u2"), grey(0x12, 255)),
        (image_of("I;16B", [0, 255, 0x1234, 0xFFFF], ">u2"), grey(0, 0, 0x12, 255)),
        # As some versions of Pillow open sixteen bits.
        (image_of("I", [0, 255, 0x1234, 0xFFFF], "i4"), grey(0, 0, 0x12, 255)),
        (Image.new("1", (1, 1), 1), grey(255)),
        (Image.new("1", (1, 1), 0), grey(0)),
        (Image.new("L", (1, 1), 99), grey(99)),
        (Image.new("LA", (1, 1), (99, 0)), grey(99)),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), [[1, 2, 3]]),
        (Image.new("RGBX", (1, 1), (1, 2, 3, 0)), [[1, 2, 3]]),
        (Image.new("CMYK", (1, 1), (51, 102, 0, 51)), [[163, 122, 204]]),
        (Image.new("YCbCr", (1, 1), (128, 128, 128)), grey(128)),
        (Image.new("HSV", (1, 1), (0, 255, 255)), [[255, 0, 0]]),
    ],
)
def test_every_mode_is_scaled_by_its_own_range(image, expected):
    assert pixels_of(image)[0].tolist() == expected


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (image_of("I", [0, 70000], "i4"), "grey from 0 to 70000, beyond 16 bits"),
        (image_of("I", [-1, 5], "i4"), "grey from -1 to 5, beyond 16 bits"),
        (Image.new("F", (1, 1), 0.5), "mode F, whose range is not known"),
    ],
)
def test_mode_without_a_range_is_refused(image, reason):
    with pytest.raises(ValueError, match=reason):
        pixels_of(image)


def test_all_modes_of_pillow_are_decided_on():
    """A mode is scaled or refused by a sentence; none of them fails otherwise or is clipped."""
    refused = set()
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA"):
        refused |= decided(mode)
    for mode in ("PA", "RGBX", "RGBa", "La", "I;16", "I;16L", "I;16B", "I;16N"):
        refused |= decided(mode)
    assert {"F"} <= refused <= {"F", "LAB", "RGBa", "La"}


def decided(mode: str) -> set[str]:
    try:
        assert pixels_of(Image.new(mode, (2, 1))).shape == (1, 2, 3)
    except ValueError:
        return {mode}
    return set()


def test_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    width = MOST_PIXELS // 1000 + 1
    content = png(GREY, 8, [bytes(8)], 8)
    # The header alone is enough.
    header = struct.pack(">IIBBBBB", width, 1000, 8, 0, 0, 0, 0)
    at = content.index(b"IHDR")
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    content = content[: at + 4] + header + checksum + content[at + 4 + len(header) + 4 :]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"{width} x 1000 pixels, more than {MOST_PIXELS}"):
            decode(content)


def test_refused_image_is_counted(tmp_path: Path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(png(GREY, 16, [struct.pack(">H", 0x8000)], 1))
    bad.write_bytes(png(GREY, 16, [struct.pack(">H", 0x8000)], 1)[:40])
    images = ImageSet(((str(bad), 0), (str(good), 0)), ("class",))
    batches = ImageBatches(images, torch.Tensor.float, batch_size=2, skip_corrupt=True)
    ((shown_images, labels),) = list(batches)
    assert labels.tolist() == [0] and shown_images.unique().tolist() == [128.0]
    assert list(batches.skipped) == [str(bad)]
