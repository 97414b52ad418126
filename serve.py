"""Serve videos and pictures over HTTP: python serve.py --config configs/config_tiny_t2v.yaml [--config FILE ...]

Pipelines stay loaded, in processes of their own; requests wait in a queue that outlives this program. OpenAI's clients
work unchanged, and GET /docs shows every address (docs/serving.md).
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kandinsky.common.command_line import Once, Parser, show_every_character
from kandinsky.common.given import check_device_name

KEY_VARIABLE = "KANDINSKY_API_KEY"
PACKAGES = "fastapi uvicorn python-multipart prometheus_client"


def build_parser() -> Parser:
    parser = Parser(
        prog="python serve.py",
        description="Serve videos and pictures over HTTP, as OpenAI's API does.",
        epilog="Any value of the YAMLs can be overridden: python serve.py --config FILE model.num_steps=20",
        allow_abbrev=False,
    )
    parser.register("action", None, Once)
    parser.add_argument(
        "--config", type=Path, action="append", required=True, help="a variant's YAML file; several times for several"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen; where other machines can ask, they want a key"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--api_key", help=f"what clients have to send; default: the variable {KEY_VARIABLE}, else none")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/served"), help="outputs, and the queue")
    parser.add_argument("--lora_dir", type=Path, metavar="DIR", help="adapters that requests may name")
    parser.add_argument("--max_queue", type=int, default=500, metavar="N", help="jobs that may wait")
    parser.add_argument("--max_upload_mb", type=int, default=32, metavar="MB", help="of a request with its picture")
    parser.add_argument("--keep_seconds", type=float, default=300, metavar="S", help="keep a job so often")
    parser.add_argument("--no_previews", action="store_true", help="show no pictures of what is being made")
    parser.add_argument("--no_page", action="store_true", help="the API alone, without the page at /")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu; default: a CUDA device where there is one")
    parser.add_argument("--dtype", help="bfloat16, float32, float16; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--attention_engine", help="as in test.py")
    parser.add_argument("--device_preset", metavar="NAME", help="as in test.py")
    parser.add_argument("--cache_dir", default="./weights/", help="the folder that ./weights/ in the YAML stands for")
    parser.add_argument("--ray_address", metavar="ADDRESS", help="make outputs on Ray: auto, local, or an address")
    parser.add_argument("--replicas", type=int, metavar="N", help="on Ray, how many jobs at a time; default: 1")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of every YAML")
    return parser


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The flags, with the key from the environment. Raises ValueError for what does not go together."""
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE) or None
    if args.api_key is not None and not args.api_key.strip():
        raise ValueError("--api_key is empty: give one, or leave it out")
    if args.api_key is None and not is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} lets other machines in: give --api_key, which they have to send, or keep to 127.0.0.1"
        )
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}; it must be from 0 (a free one) to 65535")
    for flag in ("max_queue", "max_upload_mb", "replicas"):
        if (number := getattr(args, flag)) is not None and number < 1:
            raise ValueError(f"--{flag} is {number}; it must be at least 1")
    if not args.keep_seconds > 0:
        raise ValueError(f"--keep_seconds is {args.keep_seconds:g}; it must be more than 0")
    if args.replicas is not None and args.ray_address is None:
        raise ValueError(f"--replicas {args.replicas}: give --ray_address with it")
    if args.device is not None:
        check_device_name(args.device)
    if args.lora_dir is not None and not args.lora_dir.is_dir():
        raise ValueError(f"--lora_dir {args.lora_dir}: there is no such folder")
    return args


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(args: argparse.Namespace) -> None:
    """Serve until a signal comes. Raises ValueError for whatever the user can mend."""
    from kandinsky.config.reading import load_config, preset_file
    from kandinsky.config.rules import check_processes
    from kandinsky.serving.limits import Limits
    from kandinsky.serving.variants import Catalogue, Variant, model_name

    presets = [] if args.device_preset is None else [preset_file(args.device_preset)]
    configs = [load_config(path, args.overrides, presets) for path in args.config]
    for config in configs:
        check_processes(config, 1)
    variants = [Variant(model_name(path), one, args.cache_dir) for path, one in zip(args.config, configs, strict=True)]
    limits = Limits(body_mb=args.max_upload_mb, queue=args.max_queue)
    catalogue = Catalogue(variants, args.lora_dir, limits)
    # What the page is made with asks the environment: no word to its makers, and uploads among the server's own files.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(args.output_dir.absolute() / "uploads")
    try:
        from kandinsky.serving import server
    except ImportError as error:
        raise ValueError(f"serve.py needs packages that are not here ({error.name}): pip install {PACKAGES}") from None
    server.serve(catalogue, args)


def main(arguments: Sequence[str] | None = None) -> int:
    show_every_character()
    args = build_parser().parse_intermixed_args(arguments)
    # How long a CPU thread of a worker that waits for the others spins before it sleeps (see test.py).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Likewise, how its memory is divided on a GPU.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(checked(args))
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
