"""Video and images out, and pictures at the size that is wanted.

Made with Pillow, imageio, and the ffmpeg that comes with imageio-ffmpeg. Pictures are read by pictures.py.

What is written appears under its name whole or not at all (see common/writing.py). Knows pixels, files and names;
knows no models, and imports no torch.

Video is H.264 in MP4 with 4:2:0 chroma, 8 bits, BT.709, and the index in front, which is what every player and browser
shows. CRF 10 is well below 17, the value from which x264 counts as visually lossless. On drifting gradients it is
within 0.6 dB of lossless 4:2:0, in a ninth of the bytes; what error there is comes from 8 bits and halved chroma.
"""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import stat
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from kandinsky.common.writing import WriteError, atomic_path, discard, hidden_name, reserved
from kandinsky.pictures import load_image as load_image  # pictures in

if TYPE_CHECKING:
    from torch import Tensor


Pixels: TypeAlias = "Tensor | np.ndarray"

VIDEO_SUFFIX = ".mp4"
IMAGE_SUFFIX = ".png"
CRF = 10
MAX_STRETCH = 1.01  # how much fit_image may change a picture's aspect instead of cropping it
MAX_SLUG = 48  # characters; at most four bytes each, so that seed, counter and suffix fit into the usual 255 bytes
# What lies beside an output of that name; the latter two are of runs that did not come to their end.
COMPANIONS = (".json", ".latents.safetensors", ".stopped.safetensors")
MAX_SIDECAR = 2**24  # bytes; ours have some thousands

# Stated twice on purpose: the filter converts RGB with this matrix, the flags tell the player that it was this one.
# Left to their defaults, ffmpeg converts with BT.601 and players of large videos assume BT.709, which shifts colours.
_COLOUR = [
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
]


# ----------------------------------------------------------------------------------------------------------- names


def check_writable(path: str | Path, suffix: str | None = None) -> None:
    """Find out before the heavy work whether `path` can be written; makes its folder where there is none.

    Raises ValueError where it can't, where it doesn't end in `suffix` (like ".mp4"), or where its record would replace
    a JSON file that is none.
    """
    path = Path(path)
    if suffix is not None:
        _check_suffix(path, suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = hidden_name(path)
        probe.touch(exist_ok=False)  # permission bits don't tell about read-only file systems, a file does
        probe.unlink(missing_ok=True)
        is_folder = _is_folder(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"can't write {path}: {reason}; name a file in a folder that you may write to") from error
    if is_folder:
        raise _is_a_folder(path, suffix or VIDEO_SUFFIX)
    if is_foreign(record := sidecar_path(path)):
        raise ValueError(f"can't write {path}: its record would replace {record}, which is none; take another name")


def default_output_path(folder: str | Path, prompt: str, seed: int, suffix: str = VIDEO_SUFFIX) -> Path:
    """A name in `folder` (made where missing) that tells prompt and seed and that no earlier result has.

    Nor has any run that was stopped before its end. The name is free now; it is not reserved: of two processes that
    ask at the same moment with the same prompt and seed, both get it.
    """
    with reserved_output_path(folder, prompt, seed, suffix) as path:
        return path


@contextmanager
def reserved_output_path(folder: str | Path, prompt: str, seed: int, suffix: str = VIDEO_SUFFIX) -> Iterator[Path]:
    """`default_output_path`, and until the block ends no other process that asks is given that name."""
    for path in _free_names(Path(folder) / f"{output_stem(prompt, seed)}{suffix}", COMPANIONS):
        check_writable(path)
        with reserved(path) as is_ours:
            if is_ours and _is_free(path, COMPANIONS):  # or another process has come and gone in between
                yield path
                return


def output_stem(prompt: str, seed: int) -> str:
    """A file name, without its ending, that tells prompt and seed."""
    words = re.findall(r"\w+", unicodedata.normalize("NFC", prompt).lower())
    return f"{'-'.join(words)[:MAX_SLUG].strip('-_') or 'untitled'}_seed{seed}"


def output_paths(path: str | Path, count: int) -> list[Path]:
    """Where `count` results go that are asked for under one name.

    One result: `path` itself, which replaces what is there, because somebody named it. Several: name.mp4, name_2.mp4,
    name_3.mp4 and so on, leaving out the names that an earlier result has, because nobody named those.
    """
    return [Path(path)] if count == 1 else list(itertools.islice(_free_names(Path(path)), count))


def _free_names(path: Path, companions: Sequence[str] = (".json",)) -> Iterator[Path]:
    """name.mp4, name_2.mp4, ... without those that are taken."""
    for number in itertools.count(1):
        name = path if number == 1 else path.with_stem(f"{path.stem}_{number}")
        if _is_free(name, companions):
            yield name


def _is_free(path: Path, companions: Sequence[str]) -> bool:
    """Whether there is neither a result nor what would lie beside it: either is enough to hold its name."""
    return not any(map(os.path.lexists, (path, *map(path.with_suffix, companions))))


def sidecar_path(path: str | Path) -> Path:
    """Where the JSON for the output `path` goes: beside it, under the same name."""
    return Path(path).with_suffix(".json")


def last_frame_path(output: Path) -> Path:
    """Where the last frame of a video goes: video.mp4 -> video.last.png."""
    return output.with_suffix(f".last{IMAGE_SUFFIX}")


def preview_path(output: Path) -> Path:
    """Where previews of an output are shown: video.mp4 -> video.preview.mp4."""
    return output.with_suffix(f".preview{output.suffix}")


def remove_preview(output: Path) -> None:
    """Remove an output's preview, once the output is there. What has a record is an output itself, of that name."""
    preview = preview_path(output)
    if not sidecar_path(preview).exists():
        discard(preview)


def is_foreign(sidecar: Path) -> bool:
    """Whether something is at a sidecar's path that `write_sidecar` did not write."""
    if not os.path.lexists(sidecar):
        return False
    try:
        if not sidecar.is_file() or sidecar.stat().st_size > MAX_SIDECAR:
            return True
        facts = json.loads(sidecar.read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    return not (isinstance(facts, dict) and {"prompt", "seed", "versions"} <= set(facts))


def _is_folder(path: Path) -> bool:
    # Path.is_dir would hide a name that is too long.
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _is_a_folder(path: Path, suffix: str) -> ValueError:
    return ValueError(f"can't write {path}: it is a folder; name a file in it, like {path / ('output' + suffix)}")


def _check_suffix(path: Path, suffix: str) -> None:
    if not path.suffix and os.path.isdir(path):
        raise _is_a_folder(path, suffix)
    if path.suffix.lower() != suffix:
        given = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        what = "a video" if suffix == VIDEO_SUFFIX else "an image"
        better = path.parent / ((path.stem or "output") + suffix)
        raise ValueError(f"{path} {given}; {what} is written as {suffix}: call it {better}")


# ------------------------------------------------------------------------------------------------------------- out


def nothing() -> None:
    """What comes before an output takes its name, where nobody says."""


def write_video(
    frames: Pixels, path: str | Path, fps: float = 24, write_record: Callable[[], object] = nothing, crf: int = CRF
) -> None:
    """Write uint8 frames, a tensor (3, T, H, W) or an array (T, H, W, 3), as an MP4; replaces what is there.

    crf: x264's quality, from 0 (lossless but for chroma) to 51.
    write_record: called when all is written, before it takes its name: so no output is ever there without its record.

    Raises ValueError for frames of another shape or type, for odd sizes (4:2:0 chroma halves both sides), and for a
    path that isn't an .mp4; WriteError where encoding fails.
    """
    path = Path(path)
    _check_suffix(path, VIDEO_SUFFIX)
    video = _to_array(frames, "frames", "(3, T, H, W)", "(T, H, W, 3)")
    write_frames(video, *_frame_sizes(video), path, fps, write_record, crf)


def _frame_sizes(video: np.ndarray) -> tuple[int, int, int]:
    num_frames, height, width, _ = video.shape
    return num_frames, width, height


def write_frames(
    frames: Iterable[np.ndarray],
    num_frames: int | None,
    width: int,
    height: int,
    path: str | Path,
    fps: float = 24,
    write_record: Callable[[], object] = nothing,
    crf: int = CRF,
) -> None:
    """`write_video` of uint8 frames (height, width, 3) that come one after the other, `num_frames` of them; None: as
    many as come."""
    import imageio.v2 as imageio  # with the function that needs it: half of this module's import time
    import imageio_ffmpeg

    path = Path(path)
    _check_suffix(path, VIDEO_SUFFIX)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}; it must be more than 0")
    if height % 2 or width % 2:
        raise ValueError(f"the frames are {width}x{height} pixels; a video needs an even width and height")

    with atomic_path(path) as temporary:
        writer: Any = imageio.get_writer(
            temporary,
            format="FFMPEG",
            mode="I",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            quality=None,  # in favour of crf
            macro_block_size=1,  # otherwise imageio stretches the frames to multiples of 16
            ffmpeg_log_level="error",
            output_params=["-crf", str(crf), "-movflags", "+faststart", *_COLOUR],
        )
        count = 0
        with writer:
            for count, frame in enumerate(frames, 1):  # noqa: B007  (of the last one)
                try:
                    writer.append_data(frame)
                except OSError:  # ffmpeg ended early and has said why; imageio would say very much
                    break
        # imageio doesn't look at how ffmpeg ended: a full disk would pass for success.
        try:
            written, _ = imageio_ffmpeg.count_frames_and_secs(str(temporary))
        except RuntimeError:  # not even a beginning of a video
            written = 0
        wanted = count if num_frames is None else num_frames
        if written != wanted:
            raise OSError(f"only {written} of {wanted} frames could be written; is the disk full?")
        write_record()


def join_videos(parts: Sequence[Path], path: str | Path, write_record: Callable[[], object] = nothing) -> int:
    """One MP4 of several that `write_video` made at one size and rate, one after the other, their streams as they are:
    nothing is encoded again. How many frames it has. Raises WriteError where that fails.
    """
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder, atomic_path(path) as temporary:
        quoted = [str(part.absolute()).replace("'", r"'\''") for part in parts]
        Path(folder, "parts").write_text("".join(f"file '{name}'\n" for name in quoted), encoding="utf-8")
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", "-f", "concat", "-safe", "0"]
        command += ["-i", str(Path(folder, "parts")), "-c", "copy", "-movflags", "+faststart", str(temporary)]
        joined = subprocess.run(command, capture_output=True, text=True)
        wanted = sum(imageio_ffmpeg.count_frames_and_secs(str(part))[0] for part in parts)
        try:
            written, _ = imageio_ffmpeg.count_frames_and_secs(str(temporary))
        except RuntimeError:
            written = 0
        if joined.returncode or written != wanted:
            raise OSError(f"only {written} of {wanted} frames could be joined: {joined.stderr.strip()[-200:]}")
        write_record()
    return int(written)


def write_image(frame: Pixels | Image.Image, path: str | Path, write_record: Callable[[], object] = nothing) -> None:
    """Write one uint8 picture, a tensor (3, H, W), an array (H, W, 3) or a PIL image, as a PNG; replaces what is there.

    write_record: as in `write_video`.

    Raises ValueError for another shape or type, and for a path that isn't a .png.
    """
    path = Path(path)
    _check_suffix(path, IMAGE_SUFFIX)
    image = frame if isinstance(frame, Image.Image) else to_pil(frame)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
        write_record()


def write_sidecar(path: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write `facts` as JSON beside the output `path`; returns the JSON's path. What JSON doesn't know becomes text.

    Raises WriteError where it can't be written, and where there is a JSON file that is no sidecar.
    """
    target = sidecar_path(path)
    if target == Path(path):
        raise ValueError(f"{path} is itself a JSON file; give the path of the video or image")
    text = json.dumps(facts, indent=2, ensure_ascii=False, default=str) + "\n"
    if is_foreign(target):
        raise WriteError(target, OSError(errno.EEXIST, "something else is there that is not a record of an output"))
    with atomic_path(target) as temporary:
        # A prompt from a terminal with a broken encoding holds half characters: as escapes they are still JSON.
        temporary.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    return target


def to_pil(frame: Pixels) -> Image.Image:
    """One uint8 picture, a tensor (3, H, W) or an array (H, W, 3), as a PIL image."""
    return Image.fromarray(_to_array(frame, "picture", "(3, H, W)", "(H, W, 3)"))


def versions() -> dict[str, str]:
    """What took part in making an output, by name; reads package metadata and imports nothing."""
    from kandinsky import __version__

    found = {"kandinsky": __version__, "python": platform.python_version()}
    for package in ("torch", "tokenizers", "numpy", "imageio-ffmpeg"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _to_array(pixels: Pixels, name: str, tensor_shape: str, array_shape: str) -> np.ndarray:
    """Channels last, whatever came; no copy of a tensor that is on the CPU already."""
    dimensions = tensor_shape.count(",") + 1
    if isinstance(pixels, np.ndarray):
        array, given, right = pixels, pixels.shape, pixels.ndim == dimensions and pixels.shape[-1] == 3
    else:  # a torch tensor: its own methods do, torch needs no import
        given, right = tuple(pixels.shape), pixels.ndim == dimensions and pixels.shape[0] == 3
        array = np.moveaxis(pixels.detach().cpu().numpy(), 0, -1)
    if not right or 0 in given:
        raise ValueError(
            f"the {name} has shape {given}; it must be a tensor {tensor_shape} or an array {array_shape}, and not empty"
        )
    if array.dtype != np.uint8:
        raise ValueError(f"the {name} is {array.dtype}; it must be uint8, from 0 to 255")
    return array


# -------------------------------------------------------------------------------------------------------------- in


def fit_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """An RGB picture at width x height pixels, resampled bilinearly with antialiasing.

    Where that changes its aspect by at most 1 % it is stretched, and nothing is lost. Otherwise it is scaled until it
    covers the size, and what stands out is cut off evenly on both sides.
    """
    stretch = (width / height) / (image.width / image.height)
    if max(stretch, 1 / stretch) <= MAX_STRETCH:
        return image.resize((width, height), Image.Resampling.BILINEAR)
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def halve_image(image: Image.Image) -> Image.Image:
    """An RGB picture at half its width and height, rounded down: what the text encoder sees of a picture to edit."""
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)
