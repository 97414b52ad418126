"""Train the tiny checkpoints that ship in `assets/tiny`, from nothing, on clips and pictures that our own code draws.

    python tools/train_tiny.py vae       # 3-D VAE: single frames, then 17-frame windows, then the decoder alone
    python tools/train_tiny.py text      # Qwen2.5-VL and CLIP in small, taught to tell the captions apart
    python tools/train_tiny.py latents --size 64 ; python tools/train_tiny.py latents --size 128   # clips encoded
    python tools/train_tiny.py dit       # one DiT for text to video and image to video, on small, then full-size clips
    python tools/train_tiny.py latents --size 256 --shards 1 --shard_clips 500   # and larger ones, for NABLA
    python tools/train_tiny.py nabla     # the exported DiT trained on, on these with block-sparse attention
    python tools/train_tiny.py latents --size 128 --shards 3 --shard_clips 200 --loops   # clips that end as they begin
    python tools/train_tiny.py keyframes # the exported DiT trained on, with any of its frames given
    python tools/train_tiny.py export    # write assets/tiny/t2v/{model,vae,text_encoder,text_encoder2}

    python tools/train_tiny.py vae --task image      # image VAE, starting from the video VAE's state
    python tools/train_tiny.py text --task image     # encoders for captions and instructions, with a vision tower
    python tools/train_tiny.py dit --task image      # text to image, starting from the exported video DiT
    python tools/train_tiny.py edit --task image     # image to image, starting from text to image
    python tools/train_tiny.py export --task image   # write assets/tiny/image

Every stage keeps its state in `.train/tiny` or `.train/tiny_image` (ignored by git), saves it about once a minute and
goes on from there when it is started again. The modules that are trained are the package's own: the files that `export`
writes load through the same code as the published 2B and 19B checkpoints. On a CPU, run one process to a core with
OMP_NUM_THREADS=1. `--device cuda` is meant to run the same stages on a GPU; nobody has tried it yet.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

from tools import train_tiny_image, train_tiny_video

STAGES = {
    "video": {
        "vae": train_tiny_video.stage_vae,
        "decoder": train_tiny_video.stage_decoder,
        "text": train_tiny_video.stage_text,
        "latents": train_tiny_video.stage_latents,
        "dit": train_tiny_video.stage_dit,
        "nabla": train_tiny_video.stage_nabla,
        "keyframes": train_tiny_video.stage_keyframes,
        "export": train_tiny_video.stage_export,
    },
    "image": {
        "vae": train_tiny_image.stage_vae,
        "text": train_tiny_image.stage_text,
        "dit": train_tiny_image.stage_dit,
        "edit": train_tiny_image.stage_edit,
        "export": train_tiny_image.stage_export,
    },
}
PATHS = {
    "video": {"state": ".train/tiny", "out": "assets/tiny/t2v", "config": "configs/config_tiny_t2v.yaml"},
    "image": {"state": ".train/tiny_image", "out": "assets/tiny/image", "config": "configs/config_tiny_t2i.yaml"},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(dict.fromkeys(stage for stages in STAGES.values() for stage in stages)))
    parser.add_argument("--task", choices=list(STAGES), default="video")
    parser.add_argument("--device", default="cpu", help="where to train, for example cuda (default: %(default)s)")
    parser.add_argument("--state", type=Path, help="where a stage keeps its state (default: .train/tiny[_image])")
    parser.add_argument("--out", type=Path, help="where export writes (default: assets/tiny/t2v or assets/tiny/image)")
    parser.add_argument("--config", type=Path, help="the tiny YAML of text to video or of text to image")
    both = parser.add_argument_group("both tasks")
    both.add_argument("--text_steps", type=int, help="default: 400 for video, 270 for images")
    both.add_argument("--dit_steps", type=int, help="default: 3400 for video, 1400 for images")
    both.add_argument("--batch", type=int, help="of the DiTs (default: 16 clips of 128 pixels, 64 images)")
    both.add_argument("--lr", type=float, default=3e-3, help="Muon's for the DiTs (default: %(default)s)")
    video = parser.add_argument_group("video")
    video.add_argument("--compile", action="store_true", help="dit, keyframes: half the time a step")
    video.add_argument("--image_steps", type=int, default=480, help="vae: on single frames")
    video.add_argument("--clip_steps", type=int, default=930, help="vae: mostly on 17-frame windows")
    video.add_argument("--decoder_steps", type=int, default=600, help="vae: of the decoder alone")
    video.add_argument("--decoder_lr", type=float, default=2e-4, help="decoder: Muon's (default: %(default)s)")
    video.add_argument("--size", type=int, default=64, help="latents: of clips of this many pixels a side")
    video.add_argument("--first_shard", type=int, default=0, help="latents: number of the first file")
    video.add_argument("--loops", action="store_true", help="latents: of clips that end as they begin")
    video.add_argument("--shards", type=int, default=2, help="latents: how many files")
    video.add_argument("--shard_clips", type=int, default=1152, help="latents: clips a file, each another combination")
    video.add_argument("--small_steps", type=int, default=1200, help="dit: steps on 64-pixel clips, the first ones")
    video.add_argument("--from_exported", action="store_true", help="dit: start from the checkpoint in --out")
    video.add_argument("--nabla_steps", type=int, default=400, help="nabla: steps on 256-pixel clips")
    video.add_argument("--nabla_batch", type=int, default=8, help="nabla: clips a step (default: %(default)s)")
    video.add_argument("--keyframe_steps", type=int, default=700, help="keyframes: steps on 128-pixel clips")
    video.add_argument("--nabla_config", type=Path, default=Path("configs/config_tiny_t2v_10s.yaml"))
    image = parser.add_argument_group("image")
    image.add_argument("--vae_steps", type=int, default=400, help="vae: from the video VAE")
    image.add_argument("--edit_steps", type=int, default=900)
    image.add_argument("--pictures", type=int, default=4096, help="dit, edit: how many are encoded to train on")
    image.add_argument("--video_state", type=Path, default=Path(PATHS["video"]["state"]), help="vae: of the video VAE")
    image.add_argument("--video_out", type=Path, default=Path(PATHS["video"]["out"]), help="dit: the video DiT")
    image.add_argument("--edit_config", type=Path, default=Path("configs/config_tiny_i2i.yaml"))
    args = parser.parse_args()
    if args.stage not in STAGES[args.task]:
        parser.error(f"--task {args.task} has the stages {', '.join(STAGES[args.task])}, not {args.stage}")
    for name, path in PATHS[args.task].items():
        setattr(args, name, getattr(args, name) or Path(path))
    defaults = {"video": (400, 3400, 16), "image": (270, 1400, 64)}[args.task]
    for name, value in zip(("text_steps", "dit_steps", "batch"), defaults, strict=True):
        setattr(args, name, getattr(args, name) or value)
    return args


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.state.mkdir(parents=True, exist_ok=True)
    STAGES[args.task][args.stage](args)


if __name__ == "__main__":
    main()
