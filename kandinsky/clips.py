"""Moving pictures in: videos, GIFs and folders of frames become frames at one rate and size.

Files are strangers' work. The ffmpeg that comes with imageio-ffmpeg reads them, as a process of its own: only the
containers of `CONTAINERS` and only the file itself, no frame of more than `MAX_PIXELS`, no more frames than are asked
for, and it is waited for no longer than `MOST_SECONDS` and a little for each frame. It turns pictures upright as their
metadata say, makes pixels square, and brings any rate, varying ones too, to one by leaving out and repeating. Knows no
sizes that a model takes.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kandinsky.common.given import MISSING, shortened, shown, why_no_file
from kandinsky.pictures import load_image

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpegts,mpeg"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 40_000_000  # of a frame: 8K has 33
MOST_SECONDS = 300.0  # that ffmpeg is waited for; a minute of 4K takes 30 on two cores
FRAME_SECONDS = 0.1  # and for each frame that is asked for after the first: one of 8K takes 0.08
FILES = "give an MP4, WebM, MOV, GIF, AVI or MPEG file"
ADVICE = f"{FILES}, or a folder of pictures"


@dataclass(frozen=True)
class Clip:
    """A file or folder that was looked at. size: (width, height), upright. frames: at `fps`, as far as was counted."""

    path: Path
    size: tuple[int, int]
    frames: int
    fps: float


def open_clip(path: str | Path, fps: float, at_most: int) -> Clip:
    """What a video, GIF or folder of pictures (frame after frame, by name) is; frames beyond `at_most` don't count.

    Raises ValueError for what isn't there or can't be read.
    """
    path = Path(path)
    if path.is_dir():
        files = _pictures_in(path)
        return Clip(path, load_image(files[0]).size, min(len(files), at_most), fps)
    if (why := why_no_file(path)) is not None:
        raise ValueError(f"there is no video {path}" if why == MISSING else f"can't read the video {path}: {why}")
    # The first frame as a PPM, whose header has its size; then all of them, tiny, to be counted.
    header = _ffmpeg(path, ["-vf", SQUARE, "-frames:v", "1", "-c:v", "ppm", "-f", "image2pipe"], 32)
    words = header.split(maxsplit=3)
    if len(words) < 3 or words[0] != b"P6":
        raise ValueError(f"can't read the video {path}: there is no picture in it; {ADVICE}")
    tiny = ["-vf", f"fps={fps},scale=2:2", "-frames:v", str(at_most), "-pix_fmt", "gray", "-f", "rawvideo"]
    return Clip(path, (int(words[1]), int(words[2])), len(_ffmpeg(path, tiny, 4 * at_most)) // 4, fps)


def read_clip(clip: Clip, frames: int, width: int, height: int) -> np.ndarray:
    """uint8 (frames, height, width, 3), transparency on white; what stands out is cut off evenly. A clip that is too
    short keeps its last frame."""
    found = np.empty((frames, height, width, 3), np.uint8)
    count = 0
    for frame in iterate_clip(clip, frames, width, height):
        found[count] = frame
        count += 1
    found[count:] = found[count - 1]
    return found


def iterate_clip(clip: Clip, frames: int, width: int, height: int) -> Iterator[np.ndarray]:
    """The same frames, at most so many, one after the other, (height, width, 3)."""
    if clip.path.is_dir():
        for file in _pictures_in(clip.path)[:frames]:
            yield np.asarray(_covering(load_image(file), width, height))
        return
    cover = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags={EXACT}"
    steps = f"fps={clip.fps},{SQUARE},{cover},crop={width}:{height},format=rgba"
    output = ["-vf", steps, "-frames:v", str(frames), "-f", "rawvideo"]
    count, size = 0, 4 * width * height
    for data in _pieces(clip.path, output, size, frames):
        if len(data) < size:
            break
        count += 1
        yield _on_white(np.frombuffer(data, np.uint8).reshape(height, width, 4))
    if not count:
        raise ValueError(f"can't read the video {clip.path}: there is no picture in it; {ADVICE}")


def stream_clip(clip: Clip) -> Iterator[np.ndarray]:
    """As many frames as were counted, one after the other, (height, width, 3), at the clip's own size; where the file
    has less, its last one again."""
    missing = clip.frames
    for frame in iterate_clip(clip, clip.frames, *clip.size):
        missing -= 1
        yield frame
    for _ in range(missing):
        yield frame


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 4) -> (height, width, 3)."""
    if (rgba[..., 3] == 255).all():
        return rgba[..., :3].copy()
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


NTSC = {fps: round(fps) * 1000 / 1001 for fps in (23.98, 29.97, 59.94, 119.88)}  # as ffmpeg rounds them


def rate_and_sound(path: Path) -> tuple[float, bool]:
    """Frames a second of a video that `open_clip` has opened, on average, and whether it has sound. Raises ValueError
    where it doesn't say."""
    done = subprocess.run(_reading(path, "info"), capture_output=True, stdin=subprocess.DEVNULL, timeout=MOST_SECONDS)
    said = done.stderr.decode("utf-8", "replace")
    found = re.search(r"Stream #0:.* Video: .*?([0-9.]+) (?:fps|tbr)", said)
    if found is None or not 0 < (rate := float(found[1])) < 1000:
        raise ValueError(f"the video {path} doesn't say how many frames a second it has; {ADVICE}")
    return NTSC.get(rate, rate), re.search(r"Stream #0:.* Audio: ", said) is not None


SQUARE = "scale=iw*sar:ih,setsar=1"
# Without the last two, 4:2:0 comes out up to three levels too dark.
EXACT = "area+accurate_rnd+full_chroma_int+full_chroma_inp"


def _covering(image: Image.Image, width: int, height: int) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def _pictures_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"there are no pictures in the folder {folder}; {ADVICE}")
    return files


def _reading(path: Path, says: str = "error") -> list[str]:
    """ffmpeg, as it may read a stranger's file."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", says, "-max_alloc", str(2**30)]
    command += ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-max_pixels", str(MAX_PIXELS)]
    return [*command, "-i", f"file:{path}"]


def _ffmpeg(path: Path, output: list[str], limit: int) -> bytes:
    """At most `limit` bytes of what ffmpeg makes of a file. Raises ValueError where it makes nothing."""
    return next(_pieces(path, output, limit, 1))


def _pieces(path: Path, output: list[str], size: int, count: int) -> Iterator[bytes]:
    """What ffmpeg makes of a file, at most `count` times `size` bytes; the last piece may be shorter.

    Only the time counts in which ffmpeg is waited for: who takes the pieces may be slow. Raises ValueError where it
    makes nothing, or takes too long.
    """
    command = [*_reading(path), "-map", "0:v:0", *output, "pipe:1"]
    made = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stderr is not None
        said: list[bytes] = []
        errors = process.stderr
        listener = threading.Thread(target=lambda: said.append(_some_of(errors)), daemon=True)
        listener.start()

        patience = Patience(MOST_SECONDS + FRAME_SECONDS * (count - 1), process.kill)
        try:
            while count:
                with patience:
                    data = process.stdout.read(size)
                if patience.left <= 0 or not data:
                    break
                made, count = True, count - 1
                yield data
        finally:
            patience.stop_looking()
            process.kill()
        listener.join()  # before leaving closes what it reads from
    if patience.left <= 0:
        raise ValueError(
            f"reading the video {path} took more than {MOST_SECONDS:g} s and {FRAME_SECONDS:g} s a frame: cut out the "
            "part that you need"
        )
    if not made:
        lines = said[0].decode("utf-8", "replace").strip().splitlines() or ["there is no picture in it"]
        # Without the names of ffmpeg's own parts, as in "[out#0/image2pipe @ 0x55d0] Nothing was written into ...".
        said_last = re.sub(r"^\[[^]]*\] ", "", lines[-1]).replace(f"file:{path}", "").strip(":. ")
        if said_last.startswith("Nothing was written"):
            said_last = "it ends before its first picture does"
        reason = shortened(said_last) or shown(lines[-1])
        raise ValueError(f"can't read the video {path}: {reason}; {ADVICE}")


class Patience:
    """For a process that is waited for again and again: `end_it` where that takes longer than so many seconds in all.

    What waits stands in `with patience:`. One thread looks on until `stop_looking`.
    """

    def __init__(self, seconds: float, end_it: Callable[[], None]) -> None:
        self._seconds, self._end_it = seconds, end_it
        self._since: float | None = None  # when the waiting that is going on began
        self._lock, self._stopped = threading.Lock(), threading.Event()
        threading.Thread(target=self._look_on, daemon=True).start()

    @property
    def left(self) -> float:
        """Seconds; the process has been ended, or is about to be, where there are none."""
        with self._lock:
            return self._seconds if self._since is None else self._seconds + self._since - time.monotonic()

    def __enter__(self) -> None:
        with self._lock:
            self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        left = self.left
        with self._lock:
            self._seconds, self._since = left, None

    def stop_looking(self) -> None:
        self._stopped.set()

    def _look_on(self) -> None:
        while (left := self.left) > 0:  # before so much time is over it can't be used up
            if self._stopped.wait(left):
                return
        self._end_it()


def _some_of(stream: object, most: int = 20_000) -> bytes:
    """The end of what comes; it is read to its end, so that nobody waits for us."""
    kept = b""
    while chunk := stream.read(65536):  # type: ignore[attr-defined]
        kept = (kept + chunk)[-most:]
    return kept
