"""Download the weights of one or more models into the folder that the configs expect.

    python download_models.py --models list
    python download_models.py --models 5s_sft,10s_distil --cache_dir ./weights

A model's name is that of its config: configs/config_5s_sft.yaml is 5s_sft. Besides its own file every model
needs a VAE and the two text encoders (about 19 GB), which are shared and downloaded once. So is the one file of a Pro
model and its _hd. What is already there is not downloaded again.

The image models' VAE is part of FLUX.1-dev, which asks for a licence to be accepted and for a token.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kandinsky.config import Config

CONFIG_DIR = Path(__file__).resolve().parent / "configs"
DEFAULT_MODEL = "5s_sft"


@dataclass(frozen=True)
class Download:
    """Some files of a hub repository, and the folder below cache_dir that they keep their paths in."""

    repo: str
    patterns: tuple[str, ...]
    folder: str = "."


# Weights as safetensors only, and the configs and tokenizers beside them (JSON and the merges' .txt).
MODEL_FILES = ("*.safetensors", "*.json", "*.txt")
VAES = {
    "hunyuan": Download("hunyuanvideo-community/HunyuanVideo", ("vae/*.safetensors", "vae/*.json")),
    "flux": Download("black-forest-labs/FLUX.1-dev", ("vae/*.safetensors", "vae/*.json"), "flux"),
}
TEXT_ENCODERS = (
    Download("Qwen/Qwen2.5-VL-7B-Instruct", MODEL_FILES, "text_encoder"),
    Download("openai/clip-vit-large-patch14", MODEL_FILES, "text_encoder2"),
)


def known_models() -> dict[str, Config]:
    """name -> config of every model that has a hub repository."""
    from kandinsky.checkpoints import model_name
    from kandinsky.config import load_config

    configs = {model_name(path): load_config(path) for path in sorted(CONFIG_DIR.glob("config_*.yaml"))}
    return {name: config for name, config in configs.items() if config.model.hub_repo is not None}


def choose(names: str, known: list[str]) -> list[str]:
    """Turn what --models says into names, or raise ValueError."""
    if names == "all":
        return known
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise ValueError(f"--models is empty: choose from {', '.join(known)}, all or list")
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2) or known
            raise ValueError(f"unknown model {name!r}: did you mean {' or '.join(near)}? (--models list shows all)")
    return list(dict.fromkeys(chosen))


def plan_downloads(configs: list[Config]) -> list[Download]:
    """What the models need, each download once."""
    # VAEs first: they are small, and one may be refused, which is better known before the large files than after.
    downloads = [VAES[config.model.vae.name] for config in configs]
    for config in configs:
        # ./weights/model/x.safetensors here is model/x.safetensors in the hub repository
        file = PurePosixPath(config.model.checkpoint_path).relative_to("weights")
        downloads.append(Download(str(config.model.hub_repo), (str(file),)))
    downloads.extend(TEXT_ENCODERS)
    return list(dict.fromkeys(downloads))


def fetch(download: Download, cache_dir: Path, token: str | None) -> None:
    from huggingface_hub import snapshot_download

    target = cache_dir / download.folder
    print(f"{download.repo} ({', '.join(download.patterns)}) -> {target}", flush=True)
    try:
        snapshot_download(download.repo, allow_patterns=list(download.patterns), local_dir=target, token=token)
    except Exception as error:
        status = http_status(error)
        if status not in (401, 403):
            raise
        raise RuntimeError(
            f"the hub does not hand out {download.repo} ({status}): sign in and accept its licence at "
            f"https://huggingface.co/{download.repo}, make a token that may read it at "
            "https://huggingface.co/settings/tokens, and pass it with --hf_token or in the variable HF_TOKEN"
        ) from error
    # Neither a pattern that matches nothing nor, where the folder exists, a hub that doesn't answer is an error to
    # snapshot_download.
    weights = [pattern for pattern in download.patterns if pattern.endswith(".safetensors")]
    missing = [pattern for pattern in weights if not any(target.glob(pattern))]
    if missing:
        raise RuntimeError(
            f"{missing[0]} did not arrive: {download.repo} has no such file, or the hub does not answer (its client "
            "warns above)"
        )


def http_status(error: BaseException | None) -> int | None:
    """The hub's answer behind an error, which its client wraps in others: 401, 403 and so on."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def build_parser() -> argparse.ArgumentParser:
    names = [path.stem.removeprefix("config_") for path in sorted(CONFIG_DIR.glob("config_*.yaml"))]
    parser = argparse.ArgumentParser(description="Download model weights.")
    parser.add_argument(
        "--models",
        default=DEFAULT_MODEL,
        help=f"names separated by commas, or all, or list (default {DEFAULT_MODEL}); "
        f"configs: {', '.join(names)} (tiny ones need no download)",
    )
    parser.add_argument("--cache_dir", type=Path, default=Path("./weights"), help="where to (default ./weights)")
    parser.add_argument("--hf_token", help="Hugging Face token, for FLUX.1-dev's VAE; default: the variable HF_TOKEN")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        known = known_models()
        if args.models == "list":
            for name, config in known.items():
                print(f"{name:16} {config.task}  {config.model.num_steps} steps  {config.model.hub_repo}")
            return 0
        chosen = choose(args.models, list(known))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        for download in plan_downloads([known[name] for name in chosen]):
            fetch(download, args.cache_dir, args.hf_token)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:  # the hub's client raises many kinds: a person needs the line, not the stack
        kept = "what has been downloaded is kept, the same command goes on from there"
        print(f"error: {' '.join(str(error).split())} ({kept})", file=sys.stderr)
        return 1
    image = " --image picture.png" if known[chosen[0]].task in ("i2v", "i2i") else ""
    print(f"Done. Try: python test.py --config configs/config_{chosen[0]}.yaml --prompt '...'{image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
