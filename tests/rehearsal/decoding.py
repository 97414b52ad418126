"""What decoding takes on a GPU that is not there: bytes read and written by operation, peak memory, products.

python -m tests.rehearsal.decoding [5s_sft 5s_t2v_pro_hd t2i] [--tile 512]
"""

from __future__ import annotations

import argparse

import torch

from kandinsky.config.schema import Config
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_memory import Decoding
from kandinsky.models.vae_tiling import VAETiling
from kandinsky.planning.plan import default_request
from tests.rehearsal.fake_gpu import FakeGPU
from tests.rehearsal.whole_requests import DEVICE, published, size_of

SHOWN = 14  # operations of a table, the rest in one line


def rehearse_decoding(config: Config, tile: int | None = None) -> tuple[FakeGPU, int]:
    """The config's own size decoded once, in tiles of its own size or of `tile`; and how many frames that makes."""
    request, vae_config = default_request(config), config.model.vae
    tile = tile or vae_config.spatial_tile
    kind = AutoencoderKL if vae_config.name == "flux" else AutoencoderKLHunyuanVideo
    with FakeGPU() as gpu:
        with torch.device("meta"):
            vae = kind().bfloat16()
        last = {4: torch.channels_last, 5: torch.channels_last_3d}  # as loading leaves them
        state = {
            key: torch.empty(x.shape, dtype=x.dtype, device=DEVICE,
                             memory_format=last.get(x.dim(), torch.contiguous_format))
            for key, x in vae.state_dict().items()
        }  # fmt: skip
        vae.load_state_dict(state, assign=True)
        del state
        frames, rows, columns = request.latent_size
        z = torch.empty(1, 16, frames, rows, columns, dtype=torch.bfloat16, device=DEVICE)
        weights = gpu.live
        gpu.moved.clear()
        gpu.calls.clear()
        gpu.reset_peak()
        vae.decode(z if vae_config.name != "flux" else z[:, :, 0],
                   VAETiling(size=tile, overlap=min(vae_config.spatial_overlap, tile // 2)))  # fmt: skip
        gpu.peak -= weights
        del vae, z
    return gpu, request.num_frames


def planned_bytes(config: Config, tile: int | None = None) -> int:
    """What the formula says of the same."""
    request, vae = default_request(config), config.model.vae
    channels = (128, 256, 512, 512)
    size = request.width, request.height, request.num_frames
    return Decoding(vae.name, channels, 2, *size, vae.spatial_overlap).peak_bytes(tile or vae.spatial_tile)


def report(config: Config, tile: int | None = None) -> str:
    gpu, frames = rehearse_decoding(config, tile)
    total = gpu.moved.total()
    lines = [
        f"{size_of(config)}, tiles of {tile or config.model.vae.spatial_tile} pixels: {total / frames / 1e9:.2f} GB "
        f"a frame read and written in {gpu.calls.total() / frames:.0f} calls, "
        f"{sum(gpu.flops.values()) / frames / 1e12:.2f} TFLOP a frame; "
        f"peak {gpu.peak / 2**30:.2f} GB beside the weights, {planned_bytes(config, tile) / 2**30:.2f} planned",
        "",
        "| operation | calls | GB a frame | share |",
        "|---|---|---|---|",
    ]
    for name, moved in gpu.moved.most_common(SHOWN):
        lines.append(f"| {name} | {gpu.calls[name]} | {moved / frames / 1e9:.3f} | {moved / total:.1%} |")
    rest = sum(moved for _, moved in gpu.moved.most_common()[SHOWN:])
    lines.append(f"| all else | | {rest / frames / 1e9:.3f} | {rest / total:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("configs", nargs="*", default=["5s_sft", "t2i"], help="names of configs without config_")
    parser.add_argument("--tile", type=int, help="side of the tiles in pixels; default: the config's")
    args = parser.parse_args()
    for name in args.configs:
        print(f"{name}: {report(published(name), args.tile)}\n", flush=True)


if __name__ == "__main__":
    main()
