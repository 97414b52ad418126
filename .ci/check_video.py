"""Fail unless a video has the stated number of frames and size, and shows something that moves; or a picture something.

It reads the file as a player would and knows nothing of the code that made it.
"""

import argparse
import sys

import imageio.v2 as imageio
import numpy as np


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--height", type=int, required=True)
    args = parser.parse_args()

    with imageio.get_reader(args.path) as reader:
        frames = np.stack(list(reader.iter_data())).astype(np.float32)  # (T, H, W, 3), of a picture T = 1

    problems = []
    expected = (args.frames, args.height, args.width, 3)
    if frames.shape != expected:
        problems.append(f"frames, height, width, channels are {frames.shape}, expected {expected}")
    contrast = float(frames.std(axis=(1, 2)).max())  # within a frame, per channel: a plain colour has none
    if contrast < 4:
        problems.append(f"every frame is one colour (largest standard deviation {contrast:.2f} of 255)")
    motion = float(np.abs(frames - frames[:1]).mean(axis=(1, 2, 3)).max())
    if args.frames > 1 and motion < 0.25:
        problems.append(f"nothing moves (largest mean difference from the first frame {motion:.2f} of 255)")

    for problem in problems:
        print(f"{args.path}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{args.path}: {args.frames} frames, {args.width}x{args.height}, {contrast=:.1f}, {motion=:.1f}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
