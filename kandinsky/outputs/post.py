"""After it: more frames a second and larger pictures, of what was just made or of any video or PNG there is.

    python -m kandinsky.outputs.post video.mp4 --fps 48 --upscale 2

Frames between are ffmpeg's (`minterpolate`: motion estimated in blocks, both ways); pictures are enlarged by a network
from a file (models/upscaler.py) or, without one, by Lanczos' filter. Both go frame by frame: what is in memory is a
few frames, however long the video is. The duration stays, to less than a frame; sound is left out.

Knows frames, files and ffmpeg; knows nothing of how a video was made.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from kandinsky.checkpoints.headers import open_tensors, read_header
from kandinsky.clips import ADVICE, FILES, PICTURES, open_clip, rate_and_sound, stream_clip
from kandinsky.common.command_line import Parser, show_every_character
from kandinsky.common.given import LONGEST_LINE, MISSING, check_device_name, shortened, why_no_file
from kandinsky.config.schema import MOST_FPS
from kandinsky.outputs import media

if TYPE_CHECKING:
    from kandinsky.models.upscaler import CompactUpscaler

logger = logging.getLogger(__name__)
TILE = 256  # pixels of the small picture that the network takes at once
SCALES = (1, 2, 4)
MOST_FRAMES = 200_000  # of a file that is given
CONVERT = "python tools/convert_upscaler.py"
BETWEEN = "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1"


@dataclass(frozen=True)
class Post:
    """What is done to an output. fps: None leaves it; upscale: of SCALES; upscaler: a network's file, or None."""

    fps: float | None = None
    upscale: int = 1
    upscaler: str | None = None

    @classmethod
    def of(cls, runtime: Mapping[str, Any]) -> Post:
        """As the settings say; `runtime` is that section of a config."""
        return cls(runtime["fps"], runtime["upscale"], runtime["upscaler"])

    @property
    def does_nothing(self) -> bool:
        return self.fps is None and self.upscale == 1

    def facts(self, frames: int, width: int, height: int) -> dict[str, Any]:
        """What the record says."""
        by = None if self.upscale == 1 else "Lanczos" if self.upscaler is None else str(self.upscaler)
        facts: dict[str, Any] = {"upscale": self.upscale, "upscaled_by": by, "width": width, "height": height}
        if self.fps is not None:
            facts |= {"fps": self.fps, "interpolated_by": "ffmpeg minterpolate"}
        return facts | {"frames": frames}


def check_upscaler(path: str | Path | None) -> None:
    """Raise ValueError unless there is a network in the file, from its header alone."""
    if path is None:
        return
    path = Path(path)
    if (why := why_no_file(path)) is not None:
        raise ValueError(f"there is no upscaler {path}" if why == MISSING else f"can't read the upscaler {path}: {why}")
    if path.suffix in (".pth", ".pt"):
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is opened, and is not read here: {CONVERT} {path} "
            "makes a .safetensors file of it"
        )
    from kandinsky.models.upscaler import upscaler_of

    try:
        upscaler_of({name: shape for name, (_, shape) in read_header(path).items()})
    except ValueError as error:
        raise ValueError(f"the upscaler {path}: {error}") from None


def load_upscaler(path: str | Path, device: Any) -> CompactUpscaler:
    """The network of a file, in float32. Raises ValueError as `check_upscaler` does."""
    from kandinsky.models.upscaler import upscaler_of

    check_upscaler(path)
    try:
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name).to(device).float() for name in file.keys()}  # noqa: SIM118
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch's: of devices that are not there, and of builds without them
        if str(device) == "cpu":
            raise
        raise ValueError(f"the upscaler can't be brought to {device}: {error}; use cpu") from None
    network = upscaler_of({name: tensor.shape for name, tensor in tensors.items()})
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


# --- frames in, frames out -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frames:
    """uint8 frames (height, width, 3), one after the other, and how many there are."""

    frames: Iterable[np.ndarray]
    count: int
    width: int
    height: int
    fps: float


def processed(video: Frames, post: Post, device: Any = "cpu") -> Frames:
    """`video` as `post` wants it; nothing is computed before it is asked for."""
    if post.fps is not None and post.fps != video.fps:
        video = interpolated(video, post.fps)
    if post.upscale == 1:
        return video
    frames = upscaled(video.frames, post, device)
    return Frames(frames, video.count, video.width * post.upscale, video.height * post.upscale, video.fps)


def upscaled(frames: Iterable[np.ndarray], post: Post, device: Any = "cpu") -> Iterator[np.ndarray]:
    """Each frame larger by `post.upscale`."""
    network = None if post.upscaler is None else load_upscaler(post.upscaler, device)
    for frame in frames:
        if network is None:
            size = frame.shape[1] * post.upscale, frame.shape[0] * post.upscale
            yield np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
        else:
            yield _by_network(frame, network, post.upscale)


def _by_network(frame: np.ndarray, network: CompactUpscaler, scale: int) -> np.ndarray:
    """(H, W, 3) -> (scale H, scale W, 3); what the network makes too large is averaged down."""
    import torch
    from torch.nn import functional

    with torch.inference_mode():
        weight = next(network.parameters())
        x = torch.tensor(frame, device=weight.device).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
        times = 1
        while times < scale:
            x, times = network.in_tiles(x, TILE).clamp_(0, 1), times * network.scale
        if times != scale:
            size = frame.shape[0] * scale, frame.shape[1] * scale
            x = functional.interpolate(x, size=size, mode="area")
        pixels = x[0].mul(255).round_().to(torch.uint8).permute(1, 2, 0)
        return pixels.contiguous().cpu().numpy()


def interpolated(video: Frames, fps: float) -> Frames:
    """The same time in another number of frames; the first one stays as it is."""
    count = max(1, round(video.count * fps / video.fps))
    return Frames(_between(video, fps, count), count, video.width, video.height, fps)


def _between(video: Frames, fps: float, count: int) -> Iterator[np.ndarray]:
    import imageio_ffmpeg

    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    # The filter needs frames after the last one; what it makes of them is left out. Its own format has all colours.
    colours = "out_color_matrix=bt709:out_range=pc:flags=accurate_rnd+full_chroma_int"
    back = "in_color_matrix=bt709:in_range=pc:flags=accurate_rnd+full_chroma_int"
    longer, more = "tpad=stop_mode=clone:stop=8", f"minterpolate=fps={fps}:{BETWEEN}"
    between = f"scale={colours},format=yuv444p,{longer},{more},scale={back}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", *raw]
    command += ["-s", f"{video.width}x{video.height}", "-r", str(video.fps), "-i", "pipe:0", "-vf", between]
    command += ["-frames:v", str(count), *raw, "pipe:1"]
    failures: list[Exception] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def feed() -> None:
            try:
                with stdin:
                    for frame in video.frames:
                        stdin.write(np.ascontiguousarray(frame).data)
            except BrokenPipeError:  # it has all that it needs
                return
            except Exception as error:  # of whoever makes the frames
                failures.append(error)

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        made, size = 0, 3 * video.width * video.height
        try:
            while made < count and len(data := stdout.read(size)) == size:
                made += 1
                yield np.frombuffer(data, np.uint8).reshape(video.height, video.width, 3)
        finally:
            process.kill()
            feeder.join()
    if failures:
        raise failures[0]
    if made < count:
        raise OSError(f"ffmpeg made {made} of {count} frames between those there are")


# --- files -----------------------------------------------------------------------------------------------------------


def open_video(path: Path) -> Frames:
    """Any video that clips.py reads, at its own rate and size. Raises ValueError for what can't be read."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a video, or with --upscale a PNG")
    if path.suffix.lower() in PICTURES:
        raise ValueError(f"{path} is a picture that is no PNG: save it as one")
    try:
        open_clip(path, 24, 1)  # is it one
    except ValueError as error:  # a folder has no frames a second
        raise ValueError(str(error).replace(ADVICE, f"{FILES}, or with --upscale a PNG")) from None
    fps, has_sound = rate_and_sound(path)
    if fps > MOST_FPS:
        raise ValueError(f"{path} has {fps:g} frames a second; it may have {MOST_FPS}")
    if has_sound:
        logger.warning("%s has sound, which is left out", path)
    clip = open_clip(path, fps, MOST_FRAMES)
    return Frames(stream_clip(clip), clip.frames, *clip.size, fps)


def process_file(path: str | Path, post: Post, output: str | Path | None = None, device: Any = "cpu") -> Path:
    """A video, or with `upscale` a PNG, processed into another file, with its record; returns its path.

    The record is the input's, if it has one, and what was done. Raises ValueError for what can't be read or written.
    """
    path = Path(path)
    is_picture = path.suffix.lower() == media.IMAGE_SUFFIX
    suffix = media.IMAGE_SUFFIX if is_picture else media.VIDEO_SUFFIX
    check(post, is_picture)
    if output is None:
        done = [f"{post.upscale}x"] if post.upscale > 1 else []
        done += [f"{post.fps:g}fps"] if post.fps is not None else []
        output = path.with_name(f"{path.stem}_{'_'.join(done)}{suffix}")
    output = Path(output)
    if output.absolute() == path.absolute():
        raise ValueError(f"{path} can't be its own result: name another --output_filename")
    if is_picture and not path.is_dir():
        picture = np.asarray(media.load_image(path))
        video = Frames([picture], 1, picture.shape[1], picture.shape[0], 1)
    else:
        video = open_video(path)
    made = processed(video, post, device)
    if not is_picture and (made.width % 2 or made.height % 2):
        raise ValueError(f"{path} has {made.width}x{made.height} pixels, and a video needs an even width and height")
    media.check_writable(output, suffix)
    record = {"prompt": None, "seed": None, "versions": media.versions()}
    sidecar = media.sidecar_path(path)
    if sidecar.exists() and not media.is_foreign(sidecar):
        record = json.loads(sidecar.read_bytes())
    facts = record | {"source": str(path), "post": post.facts(made.count, made.width, made.height)}
    with closing(iter_of(made.frames)) as frames:

        def write_record() -> None:
            media.write_sidecar(output, facts)

        if is_picture:
            media.write_image(next(frames), output, write_record)
        else:
            media.write_frames(frames, made.count, made.width, made.height, output, made.fps, write_record)
    return output


def iter_of(frames: Iterable[np.ndarray]) -> Any:
    """A generator of them, which can be closed."""
    yield from frames


def check(post: Post, is_picture: bool) -> None:
    """Raise ValueError for what isn't possible, or not together."""
    if post.does_nothing:
        raise ValueError("there is nothing to do: give --fps 48, --upscale 2 or both")
    if post.upscale not in SCALES:
        raise ValueError(f"--upscale is {post.upscale}; it must be 2 or 4")
    if post.fps is not None and is_picture:
        raise ValueError("a picture has no frames a second: leave --fps out")
    if post.fps is not None and not 1 <= post.fps <= MOST_FPS:
        raise ValueError(f"--fps is {post.fps:g}; it must be from 1 to {MOST_FPS}")
    if post.upscaler is not None and post.upscale == 1:
        raise ValueError("an upscaler is for --upscale: give --upscale 2 or 4, or leave --upscaler out")
    check_upscaler(post.upscaler)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m kandinsky.outputs.post", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="a video, or with --upscale a PNG")
    parser.add_argument("--fps", type=float, help="1 to 240 frames a second, computed between those there are")
    parser.add_argument("--upscale", type=int, default=1, help="how many times larger: 2 or 4")
    parser.add_argument("--upscaler", help="a network's .safetensors file; default: Lanczos' filter")
    parser.add_argument("--output_filename", type=Path, help="default: a name beside the file that says what was done")
    parser.add_argument("--device", default="cpu", help="where the network runs: cpu, cuda, ... (default: %(default)s)")
    show_every_character()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        check_device_name(args.device)
        output = process_file(args.file, Post(args.fps, args.upscale, args.upscaler), args.output_filename, args.device)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {shortened(str(error), LONGEST_LINE)}\n")
        return 2
    sys.stdout.write(f"{output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
