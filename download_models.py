"""Download the weights of one or more models into the folder that the configs expect.

    python download_models.py --models list
    python download_models.py                                   # 5s_sft
    python download_models.py --models 5s_sft,t2i --cache_dir /big/weights
    python download_models.py --models all --dry_run            # only say how much it would be

A model's name is that of its config (configs/config_5s_sft.yaml is 5s_sft) or of its repository on the hub. Besides
its own file every model needs a VAE and the two text encoders (about 19 GB), which are shared and downloaded once; so
is the one file of a Pro model and its _hd. What is there already is not downloaded again, and what was interrupted goes
on where it stopped. taehv and taef1 are no models but tiny decoders, for quick previews (docs/weights.md).

The image models' VAE is part of FLUX.1-dev, which asks for a licence to be accepted and for a token.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from math import prod
from pathlib import Path

CONFIG_DIR = Path(__file__).resolve().parent / "configs"
DEFAULT_MODEL = "5s_sft"
DEFAULT_FOLDER = Path("./weights")


def build_parser() -> argparse.ArgumentParser:
    names = [path.stem.removeprefix("config_") for path in sorted(CONFIG_DIR.glob("config_*.yaml"))]
    parser = argparse.ArgumentParser(description="Download model weights.")
    parser.add_argument(
        "--models",
        default=DEFAULT_MODEL,
        help=f"names separated by commas, or all, or list (default {DEFAULT_MODEL}); configs: "
        f"{', '.join(name for name in names if not name.startswith('tiny'))}",
    )
    parser.add_argument("--cache_dir", type=Path, default=DEFAULT_FOLDER, help="where to (default ./weights)")
    parser.add_argument("--hf_token", help="Hugging Face token, for FLUX.1-dev's VAE; default: the variable HF_TOKEN")
    parser.add_argument("--verify", action="store_true", help="check what is there already too, reading all of it")
    parser.add_argument("--dry_run", action="store_true", help="only say what would be downloaded, and how much")
    return parser


def main(arguments: list[str] | None = None) -> int:
    from kandinsky.common.command_line import show_every_character

    show_every_character()
    args = build_parser().parse_args(arguments)
    from kandinsky.checkpoints import hub
    from kandinsky.checkpoints.dit_layout import expected_dit_shapes
    from kandinsky.checkpoints.files import TINY_DECODERS
    from kandinsky.checkpoints.tiny_decoder import KINDS, parameters

    try:
        known = hub.known_models()
        if args.models == "list":
            for name, config in known.items():
                size = sum(prod(shape) for shape in expected_dit_shapes(config.model.dit_params).values())
                there = "" if hub.sources(config, args.cache_dir, only_missing=True) else "  (downloaded)"
                steps = f"{config.model.num_steps} steps  {size / 1e9:4.1f} B parameters"
                print(f"{name:16} {config.task}  {steps}  {config.model.hub_repo}{there}")
            for vae, name in TINY_DECODERS.items():
                (source,) = hub.tiny_sources([name], args.cache_dir)
                there = "  (downloaded)" if all((source.target / file).is_file() for file in source.names) else ""
                words = f"tiny decoder for previews and --vae tiny, {parameters(KINDS[vae]) / 1e6:.1f} M parameters"
                print(f"{name:16} {words}  {source.repo}{there}")
            return 0
        words = [word.strip() for word in args.models.split(",")]
        tiny = list(dict.fromkeys(word.lower() for word in words if word.lower() in TINY_DECODERS.values()))
        models = [word for word in words if word.lower() not in tiny]
        chosen = hub.choose(",".join(models), known) if any(models) or not tiny else []
        wanted = [source for name in chosen for source in hub.sources(known[name], args.cache_dir)]
        wanted += hub.tiny_sources(tiny, args.cache_dir)
        hub.download(wanted, args.cache_dir, args.hf_token, verify=args.verify, dry_run=args.dry_run, say=say)
    except KeyboardInterrupt:
        return 130
    except (ValueError, hub.DownloadError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1 if isinstance(error, hub.DownloadError) else 2
    if chosen and not args.dry_run:
        words = " --image picture.png" if known[chosen[0]].task in ("i2v", "i2i") else ""
        if args.cache_dir != DEFAULT_FOLDER:
            words += f" --cache_dir {shlex.quote(str(args.cache_dir))}"
        print(f"Done. Try: python test.py --config configs/config_{chosen[0]}.yaml --prompt '...'{words}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
