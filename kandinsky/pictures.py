"""Pictures in: files, PIL images and arrays become upright RGB in sRGB, which is what the models have learnt from.

Knows a picture's pixels, its EXIF orientation and its colour profile (ICC.1, by LittleCMS, which Pillow brings); knows
no sizes that a model takes. Files are strangers' work: only `FORMATS` are opened, of at most `MAX_MEGAPIXELS`, and what
is damaged beside the pixels is left out with a warning.
"""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from kandinsky.common.given import MISSING, shortened, why_no_file

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_MEGAPIXELS = 80  # 240 MB of RGB; the largest picture that is made has 4
ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What pixels may be, and as what their colours are taken: profiles are of grey, RGB or CMYK.
MODES = {
    **{"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "RGBX": "RGB"},
    **{"CMYK": "CMYK", "YCbCr": "RGB", "HSV": "RGB", "La": "L", "RGBa": "RGB"},
}
SAME_COLOUR = 2  # levels of 255 that a profile may move any colour and still be taken for sRGB
AVIF = (b"avif", b"avis")
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
ADVICE = "give a PNG, JPEG, WebP, GIF, BMP or TIFF file"
ADDRESSES = ("http", "https", "ftp", "s3", "gs", "hf", "file", "data")


class _NoPicture(Exception):
    """Why something is no picture that can be taken; becomes a ValueError that names it."""


def load_image(source: str | Path | Image.Image | np.ndarray | bytes) -> Image.Image:
    """An RGB picture in sRGB, upright as its EXIF says, transparency laid on white.

    `source` is the path of a PNG, JPEG, WebP, GIF, BMP or TIFF file of 8 or 16 bits, or what such a file holds, a PIL
    image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4). Of an animation it is the first frame. Raises ValueError for
    what isn't there, isn't a picture, or has more than `MAX_MEGAPIXELS`. Whether it is large enough is for sizes.py to
    say.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise ValueError(
                f"the image is an array {source.shape} of {source.dtype}; it must be uint8 and (H, W), (H, W, 3) "
                "or (H, W, 4)"
            )
        source = Image.fromarray(source)
    if isinstance(source, str | os.PathLike):
        check_is_path(source)
        name = shortened(os.fspath(source))
    elif isinstance(source, Image.Image):
        name = f"given as a {type(source).__name__}"  # of a file, maybe, whose pixels are read only now
    elif isinstance(source, bytes):
        name = "that was sent"
    else:
        raise ValueError(f"the image is a {type(source).__name__}; it must be a path, a PIL image or a uint8 array")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's are for programmers: of large pictures, of metadata
            if isinstance(source, Image.Image):
                return _to_rgb(source)
            return _decoded(io.BytesIO(source)) if isinstance(source, bytes) else _read(source)
    except FileNotFoundError:
        raise ValueError(f"there is no image {name}") from None
    except _NoPicture as error:
        reason = str(error)
    except Exception as error:
        # Pillow's readers raise whatever they stumble over in a damaged file: struct.error, IndexError, SyntaxError ...
        reason = f"the file is damaged ({shortened(str(error)) or type(error).__name__}); {ADVICE}"
    raise ValueError(f"can't read the image {name}: {reason}")


def check_is_path(source: str | Path) -> None:
    """Raise ValueError for the address of a picture on the web: nothing is fetched here."""
    kind, colon, rest = os.fspath(source).partition(":")
    if colon and kind.lower() in ADDRESSES:
        address = shortened(f"{kind}://{rest.lstrip('/')}")  # a Path has one slash left of the two
        raise ValueError(f"the image {address} is an address and no file: download the picture, and give its path")


def _read(path: str | Path) -> Image.Image:
    reason = why_no_file(path)
    if reason == MISSING:
        raise FileNotFoundError
    if reason is not None:
        raise _NoPicture(f"{reason}; {ADVICE}")
    with open(path, "rb") as file:
        return _decoded(file)


def _decoded(file: BinaryIO) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return _to_rgb(image)
    except UnidentifiedImageError:
        file.seek(0)
        raise _NoPicture(f"{_what_it_is(file.read(16))}; {ADVICE}") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _NoPicture(_too_large(int(pixels[0]) if pixels else 10**9)) from None


def _what_it_is(head: bytes) -> str:
    """Of a file that is no picture, by its first 16 bytes."""
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp":  # ISO 14496-12, the box that all of these begin with
        brand = head[8:12]
        kind = "an AVIF picture" if brand in AVIF else "a HEIC picture" if brand in HEIC else "a video"
        return f"it is {kind}, which is not read here: save it as something else"
    return "it is none of these"


def _too_large(pixels: int) -> str:
    return (
        f"it has {pixels / 1e6:.0f} megapixels, and at most {MAX_MEGAPIXELS} are read: scale it down, its long side "
        "to 4096 pixels or less"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_MEGAPIXELS * 1_000_000:
        raise _NoPicture(_too_large(image.width * image.height))
    image.load()
    orientation = _orientation(image)
    if image.mode.startswith("I"):  # 16 bits: converting would clip everything above 255 to white
        levels = np.asarray(image).astype(np.float32) / 257
        if not 0 <= levels.min() <= levels.max() <= 255:
            raise _NoPicture("its pixels have 32 bits: save it with 8 or 16")
        profile = image.info.get("icc_profile")
        image = Image.fromarray(levels.round().astype(np.uint8))
        image.info["icc_profile"] = profile
    if image.mode not in MODES:
        what = "are floating-point numbers" if image.mode == "F" else f"are of the kind {image.mode}"
        raise _NoPicture(f"its pixels {what}: save it as RGB with 8 or 16 bits")
    rgb = _to_srgb(image)
    if image.has_transparency_data:
        rgb.putalpha(image.convert("RGBA").getchannel("A"))
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return rgb if orientation is None else rgb.transpose(orientation)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns the picture upright, as its EXIF says; None where there is nothing to do."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception as error:  # a block of EXIF that is cut, or lies about lengths: see `load_image`
        logger.warning("a picture's EXIF is damaged and left out, so it may lie on its side (%s)", error)
        return None


def _to_srgb(image: Image.Image) -> Image.Image:
    """The colours of a picture of one of `MODES`, without transparency, as its ICC profile means them."""
    colours = image.convert(MODES[image.mode])
    icc = image.info.get("icc_profile")
    if not icc:
        return colours.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if profile.profile.xcolor_space.strip() == "RGB":
            colours = colours.convert("RGB")
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            colours.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if colours.mode == "RGB":  # most profiles are one of the many sRGBs: those pixels stay as they are
            steps = np.arange(0, 256, 17, dtype=np.uint8)
            grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(64, 64, 3)
            moved = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform)).astype(int) - grid
            if abs(moved).max() <= SAME_COLOUR:
                return colours
        converted = ImageCms.applyTransform(colours, transform)
        assert converted is not None
        return converted
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError) as error:
        logger.warning("a picture's colour profile can't be used, and its colours are taken for sRGB (%s)", error)
        return colours.convert("RGB")
