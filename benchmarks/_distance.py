"""How far a clip is from another one, by measures that people know, and ways to spoil a clip that they must rank.

PSNR here; SSIM, XPSNR (Helmrich et al. 2020) and VMAF (its model v0.6.1) by the ffmpeg that imageio-ffmpeg brings. VMAF
sees brightness alone and was made for larger pictures; 97 to 99 is what it gives to a clip and itself. Temporal flicker
is VBench's (Huang et al. 2024): 100 is a clip that stands still, so it says something beside another clip's only.

Clips are uint8 (T, H, W, 3). Knows pixels alone.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

MOST_DB = 100.0  # what counts where two frames are the same, so that means and files have a number

# The first clip of each pair is the one that the filter measures; XPSNR takes its weights from the first, VMAF from
# the second.
FILTERS = (
    "[0]format=yuv444p,split=3[x1][x2][x3];[1]format=yuv444p,split=3[y1][y2][y3];"
    "[x1][y1]ssim=stats_file=ssim.log[ssim];[y2][x2]xpsnr=stats_file=xpsnr.log[xpsnr];"
    "[x3][y3]libvmaf=log_fmt=json:log_path=vmaf.json[vmaf]"
)


def distance(clip: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """Of a clip to the plain one: "psnr" and "xpsnr" (dB), "ssim" (to 1) and "vmaf" (to 100), and each once more of its
    worst frame, as "psnr worst"; "flicker", and "flicker change" from the plain clip's.

    Of the whole clip, decibels are those of its mean squared error, as ffmpeg has them; SSIM and VMAF are means.
    """
    if clip.shape != plain.shape or clip.dtype != np.uint8 or plain.dtype != np.uint8:
        raise ValueError(f"two uint8 clips of one shape are compared, not {clip.shape} and {plain.shape}")
    errors = np.mean((clip.astype(np.float64) - plain.astype(np.float64)) ** 2, axis=(1, 2, 3))
    found = {"psnr": decibels(errors.mean()), "psnr worst": decibels(errors.max()), **_by_ffmpeg(clip, plain)}
    return found | {"flicker": flicker(clip), "flicker change": flicker(clip) - flicker(plain)}


def decibels(squared_error: float) -> float:
    return min(MOST_DB, 10 * math.log10(255**2 / max(float(squared_error), 1e-9)))


def flicker(clip: np.ndarray) -> float:
    """VBench's temporal flickering: 100 * (1 - the mean difference of neighbouring frames / 255)."""
    return 100 * (1 - float(np.mean(np.abs(np.diff(clip.astype(np.float64), axis=0)))) / 255)


def _by_ffmpeg(clip: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """SSIM, XPSNR and VMAF, of the clip and of its worst frame; of XPSNR's three planes the worst counts."""
    import imageio_ffmpeg

    _, height, width, _ = clip.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "24"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip.tofile(folder / "clip.raw")
        plain.tofile(folder / "plain.raw")
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *raw, "-i", "clip.raw", *raw]
        command += ["-i", "plain.raw", "-lavfi", FILTERS]
        for output in ("[ssim]", "[xpsnr]", "[vmaf]"):
            command += ["-map", output, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ffmpeg could not compare the clips: {done.stderr[-400:]}")
        texts = {name: (folder / f"{name}.log").read_text() for name in ("ssim", "xpsnr")}
        vmaf = [frame["metrics"]["vmaf"] for frame in json.loads((folder / "vmaf.json").read_text())["frames"]]
    ssim = [float(value) for value in re.findall(r" All:(\S+)", texts["ssim"])]
    planes = re.findall(r"n: *\d+ +XPSNR y: (\S+) +XPSNR u: (\S+) +XPSNR v: (\S+)", texts["xpsnr"])
    xpsnr = [min(MOST_DB, *map(float, values)) for values in planes]
    (average,) = re.findall(r"XPSNR average.*minimum: ([^\s)]+)", texts["xpsnr"])
    assert len(clip) == len(ssim) == len(xpsnr) == len(vmaf)
    return {
        "ssim": float(np.mean(ssim)),
        "ssim worst": min(ssim),
        "xpsnr": min(MOST_DB, float(average)),
        "xpsnr worst": min(xpsnr),
        "vmaf": float(np.mean(vmaf)),
        "vmaf worst": min(vmaf),
    }


# --- what is known to be worse ----------------------------------------------------------------------------------------


def blurred(clip: np.ndarray, strength: float) -> np.ndarray:
    """Gaussian, of so many pixels."""
    reach = np.arange(-int(3 * strength + 1), int(3 * strength + 1) + 1)
    taps = np.exp(-(reach**2) / (2 * strength**2))
    taps /= taps.sum()
    out = clip.astype(np.float64)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (-reach[0], reach[-1])
        padded = np.pad(out, pad, mode="edge")
        length = out.shape[axis]
        out = sum(tap * padded.take(np.arange(i, i + length), axis) for i, tap in enumerate(taps))
    return out.round().astype(np.uint8)


def noisy(clip: np.ndarray, strength: float) -> np.ndarray:
    """White noise of so many levels of 255."""
    noise = np.random.default_rng(0).normal(0, strength, clip.shape)
    return (clip + noise).round().clip(0, 255).astype(np.uint8)


def repeated(clip: np.ndarray, strength: float) -> np.ndarray:
    """Every frame stands for so many, and those that it hides are not seen."""
    return clip[np.arange(len(clip)) // int(strength) * int(strength)]


# Each with strengths, from weak to strong.
DEGRADATIONS: dict[str, tuple[Callable[..., np.ndarray], tuple[float, ...]]] = {
    "blur": (blurred, (0.5, 1, 2)),
    "noise": (noisy, (2, 6, 18)),
    "repeats": (repeated, (2, 3, 5)),
}
WEIGHT_BITS = (6, 4, 3)
