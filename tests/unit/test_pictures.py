"""Pictures from cameras, scanners and strangers: colours as they are meant, and one line for what is no picture."""

from __future__ import annotations

import io
import logging
import os
import socket
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from kandinsky import pictures
from kandinsky.pictures import load_image

# ------------------------------------------------------------------------------------------------------ colour profiles

# (X, Y, Z) of red, green and blue, adapted to D50 as profiles have them, and how values become light.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
PROPHOTO = ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491))


def srgb_light(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def gamma(exponent: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda value: value**exponent


def icc_profile(primaries: tuple[tuple[float, ...], ...], light: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A display profile of matrix and curves, as ICC.1:2001-04 has them."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(map(number, values))

    table = (light(np.linspace(0, 1, 1024)) * 65535).round().astype(">u2").tobytes()
    text = b"a test"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(79),
        b"cprt": b"text" + bytes(4) + text + bytes(1),
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
        **{name: xyz(primary) for name, primary in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv" + bytes(4) + struct.pack(">I", 1024) + table),
    }
    directory, body, begin = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        directory += name + struct.pack(">II", begin + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = struct.pack(">I", begin + len(body))
    fields = size + b"test" + b"\x02\x10\0\0" + b"mntrRGB XYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp"
    header = fields + bytes(28) + b"".join(map(number, (0.9642, 1.0, 0.8249))) + bytes(4)
    return header + bytes(128 - len(header)) + directory + body


def in_srgb(
    colour: tuple[int, ...], primaries: tuple[tuple[float, ...], ...], light: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The same colour in sRGB, by the textbook and without a library."""
    linear = np.linalg.solve(np.array(SRGB).T, np.array(primaries).T @ light(np.array(colour) / 255)).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))  # type: ignore[return-value]


def test_display_p3_as_phones_take_it(tmp_path: Path) -> None:
    profile = icc_profile(DISPLAY_P3, srgb_light)
    Image.new("RGB", (4, 4), (200, 120, 90)).save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs(np.subtract(pixel(load_image(tmp_path / "a.png")), (214, 116, 82))).max() <= 1
    Image.new("RGB", (16, 16), (200, 120, 90)).save(tmp_path / "a.jpg", icc_profile=profile, quality=100)
    assert np.abs(np.subtract(pixel(load_image(tmp_path / "a.jpg")), (214, 116, 82))).max() <= 2


@pytest.mark.parametrize(
    ("primaries", "light"),
    [(DISPLAY_P3, srgb_light), (ADOBE_RGB, gamma(2.2)), (PROPHOTO, gamma(1.8)), (SRGB, gamma(1.0))],
)
def test_colours_are_what_the_profile_means(
    tmp_path: Path, primaries: tuple[tuple[float, ...], ...], light: Callable[[np.ndarray], np.ndarray]
) -> None:
    colours = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 120, 90), (90, 130, 110), (120, 110, 140)]
    picture = Image.new("RGB", (len(colours), 1))
    for x, colour in enumerate(colours):
        picture.putpixel((x, 0), colour)
    for name in ("a.png", "a.webp", "a.tif"):
        options = {"lossless": True} if name == "a.webp" else {}
        picture.save(tmp_path / name, icc_profile=icc_profile(primaries, light), **options)
        found = load_image(tmp_path / name)
        for x, colour in enumerate(colours):
            assert np.abs(pixel(found, x) - in_srgb(colour, primaries, light)).max() <= 1.5, (name, colour)


def test_srgb_stays_as_it_is_to_the_bit(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "a.png", icc_profile=icc_profile(SRGB, srgb_light))
    assert load_image(tmp_path / "a.png").tobytes() == noise.tobytes()


def test_profiles_of_transparent_and_of_grey_pictures(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (3, 1), (200, 120, 90, 255))
    picture.putpixel((1, 0), (200, 120, 90, 0))
    picture.save(tmp_path / "a.png", icc_profile=icc_profile(DISPLAY_P3, srgb_light))
    found = load_image(tmp_path / "a.png")
    assert np.abs(np.subtract(pixel(found), (214, 116, 82))).max() <= 1
    assert pixel(found, 1) == (255, 255, 255)
    for mode, colour in (("L", 100), ("LA", (100, 255)), ("P", 0)):  # grey stays grey; a palette has colours
        picture = Image.new(mode, (2, 1), colour)
        if mode == "P":
            picture.putpalette([200, 120, 90])
        picture.save(tmp_path / "b.png", icc_profile=icc_profile(DISPLAY_P3, srgb_light))
        expected = (214, 116, 82) if mode == "P" else (100, 100, 100)
        assert np.abs(np.subtract(pixel(load_image(tmp_path / "b.png")), expected)).max() <= 1, mode


@pytest.mark.parametrize("change", ["cut", "empty", "noise", "of paper"])
def test_a_broken_profile_is_ignored_with_a_warning(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = icc_profile(DISPLAY_P3, srgb_light)
    broken = {
        "cut": whole[:200],
        "empty": b"\0",
        "noise": bytes(range(256)) * 4,
        "of paper": whole.replace(b"RGB XYZ ", b"CMYKXYZ "),
    }
    picture = Image.new("RGB", (2, 2), (200, 120, 90))
    picture.save(tmp_path / "a.png", icc_profile=broken[change])
    assert pixel(load_image(tmp_path / "a.png")) == (200, 120, 90)
    (record,) = caplog.records
    assert "colour profile can't be used" in record.getMessage() and record.levelno == logging.WARNING


# ------------------------------------------------------------------------------------------------------------- damage


def with_exif(exif: bytes) -> bytes:
    """A JPEG, red above and blue below, with this block of EXIF."""
    picture = Image.new("RGB", (16, 32), "red")
    picture.paste("blue", (0, 16, 16, 32))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


GOOD_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"  # orientation 3: upside down
BROKEN_EXIF = {
    "cut in an entry": GOOD_EXIF[:20],
    "more entries than there are": GOOD_EXIF.replace(b"\0\x01\x01\x12", b"\xff\xff\x01\x12"),
    "begins outside": GOOD_EXIF.replace(b"\0\0\0\x08", b"\x7f\xff\xff\xff"),
    "a value outside": GOOD_EXIF.replace(b"\0\x03\0\0\0\x01\0\x03\0\0", b"\0\x05\0\0\0\x01\x7f\xff\xff\xff"),
    "of no byte order": GOOD_EXIF.replace(b"MM\0*", b"QQ\0*"),
    "a header and no more": GOOD_EXIF[:12],
}


def test_exif_turns_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(with_exif(GOOD_EXIF))
    image = load_image(tmp_path / "a.jpg")
    assert pixel(image, 8, 4)[2] > 200 and pixel(image, 8, 28)[0] > 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_undone(tmp_path: Path, orientation: int) -> None:
    """By the corner in which EXIF says that the first stored pixel belongs, and the side along which the row goes."""
    picture = Image.new("RGB", (30, 20), "white")
    picture.paste("red", (0, 0, 15, 5))  # the first row, on its left
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    assert image.size == ((30, 20) if orientation <= 4 else (20, 30))
    found = {
        (x, y): pixel(image, x * (image.width - 1), y * (image.height - 1)) == (255, 0, 0)
        for x in (0, 1)
        for y in (0, 1)
    }
    assert [corner for corner, is_red in found.items() if is_red] == [corners[orientation]]


@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_broken_exif_costs_the_orientation_only(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "a.jpg").write_bytes(with_exif(BROKEN_EXIF[name]))
    image = load_image(tmp_path / "a.jpg")
    assert image.size == (16, 32)
    assert {pixel(image, 8, y)[0] > 200 for y in (4, 28)} == {True, False}  # upside down, where that could be read
    assert not recwarn.list  # none of Pillow's own
    assert all("EXIF is damaged" in record.getMessage() for record in caplog.records)


# A quarter turn, and an entry that Pillow reads and cannot write again: of no type that fits, or of no number.
TURNED = (
    b"Exif\0\0MM\0*\0\0\0\x08\0\x04%s\x01\x12\0\x03\0\0\0\x01\0\x06\0\0%s\x87i\0\x04\0\0\0\x01\0\0\0N\0\0\0\0"
    b"camera\0\0\0\0\0H\0\0\0\x01\0\x02\x82\x9a\0\x0c\0\0\0\x01\0\0\0l\x90\0\0\x07\0\0\0\x040230\0\0\0\0?\x84z\xe1G\xae\x14{"
)
MAKER, RESOLUTION = b"\x01\x0f\0\x02\0\0\0\x07\0\0\0>", b"\x01\x1a\0\x05\0\0\0\x01\0\0\0F"
DAMAGED = {
    "struct.error": TURNED % (b"\x01\x08" + MAKER[2:], RESOLUTION),
    "TypeError": TURNED % (MAKER, RESOLUTION.replace(b"\x1a\0\x05", b"\x1a\0\x01")),
}


@pytest.mark.parametrize("error", DAMAGED)
def test_other_entries_of_exif_are_not_looked_at(tmp_path: Path, error: str) -> None:
    (tmp_path / "a.jpg").write_bytes(with_exif(DAMAGED[error]))
    with pytest.raises((struct.error, TypeError)), Image.open(tmp_path / "a.jpg") as theirs:
        ImageOps.exif_transpose(theirs)
    image = load_image(tmp_path / "a.jpg")
    assert image.size == (32, 16) and pixel(image, 28, 8)[0] > 200  # what was above is on the right


def test_exif_that_cannot_be_read_at_all_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Image.Image) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert load_image(Image.new("RGB", (16, 32))).size == (16, 32)
    assert "EXIF is damaged" in caplog.text and "may lie on its side" in caplog.text


def refused(source: object) -> str:
    with pytest.raises(ValueError) as error:
        load_image(source)  # type: ignore[arg-type]
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_what_never_ends_is_not_waited_for(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        monkeypatch.chdir(tmp_path)  # a socket's name may have 108 bytes
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("a.png")
    else:
        path = Path("/dev/zero")
    assert "it is a pipe, a socket or a device; give a PNG" in refused(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n", "it is none of these; give a PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is none of these; give a PNG"),
        (b"P6 4 4 255 " + bytes(48), "it is none of these; give a PNG"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "it is an AVIF picture, which is not read here"),
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "it is a HEIC picture, which is not read here"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2", "it is a video, which is not read here"),
    ],
)
def test_other_formats_are_told_in_words(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.png").write_bytes(content)  # whatever it is called
    assert says in refused(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_the_documented_formats_are_read(tmp_path: Path, name: str) -> None:
    picture = Image.new("RGB", (16, 16), (200, 120, 90))
    picture.save(tmp_path / name)
    assert np.abs(np.subtract(pixel(load_image(tmp_path / name)), (200, 120, 90))).max() <= 3


def test_pixels_that_would_become_black_or_white(tmp_path: Path) -> None:
    levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    assert "its pixels are floating-point numbers: save it as RGB with 8 or 16 bits" in refused(tmp_path / "a.tif")
    assert "floating-point" in refused(Image.fromarray(levels))
    Image.fromarray(np.full((8, 8), 10**9, np.int32)).save(tmp_path / "b.tif")
    assert "its pixels have 32 bits: save it with 8 or 16" in refused(tmp_path / "b.tif")


def test_sixteen_bits_of_a_tiff(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "a.tif")
    assert [pixel(load_image(tmp_path / "a.tif"), x)[0] for x in range(3)] == [0, 128, 255]


def png_that_says(width: int, height: int) -> bytes:
    """A PNG's beginning: what stands in its header is believed, and there is nothing behind it."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(("size", "megapixels"), [((12000, 9000), 108), ((16320, 12240), 200), ((9000, 8889), 80)])
def test_too_many_pixels_are_told_to_be_scaled_down(tmp_path: Path, size: tuple[int, int], megapixels: int) -> None:
    (tmp_path / "a.png").write_bytes(png_that_says(*size))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        message = refused(tmp_path / "a.png")
    assert f"it has {megapixels} megapixels, and at most 80 are read: scale it down" in message
    assert not told and "DOS" not in message and "give a PNG" not in message


def test_the_largest_picture_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_MEGAPIXELS", 1)
    assert load_image(Image.new("RGB", (1000, 1000))).size == (1000, 1000)
    assert "it has 1 megapixels, and at most 1" in refused(Image.new("RGB", (1000, 1001)))


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/cat.png",
        "HTTP://example.org/cat.png",
        "s3://bucket/cat.png",
        "data:image/png;base64,iVBORw0KGgo" + 5000 * "A",
    ],
)
def test_an_address_is_told_to_be_one(address: str) -> None:
    for source in (address, Path(address)):
        message = refused(source)
        assert "is an address and no file: download the picture" in message
        if "example" in address:
            assert address in message  # with both slashes, also where a Path has eaten one
