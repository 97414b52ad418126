"""What the training of the tiny checkpoints carries over from one model to the next."""

from __future__ import annotations

import torch

from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from tools.tiny_training import with_input_channels
from tools.train_tiny_image import image_vae_weights

SMALL = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, model_dim=16, ff_dim=16,
    num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
)  # fmt: skip
VAE = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)


@torch.no_grad()
def test_new_input_channels_change_nothing_yet() -> None:
    torch.manual_seed(0)
    plain = DiffusionTransformer3D(**SMALL)
    for parameter in plain.parameters():
        parameter.normal_(std=0.3)
    conditioned = DiffusionTransformer3D(**SMALL, instruct_type="channel")
    conditioned.load_state_dict(with_input_channels(plain.state_dict(), conditioned.in_channels))
    latents, extra = torch.randn(1, 1, 4, 4, 4), torch.randn(1, 1, 4, 4, 5)
    rest = torch.randn(1, 3, 8), torch.randn(1, 8), torch.tensor([500.0])
    expected = plain(latents, *rest)
    assert expected.std() > 0.1
    assert torch.allclose(conditioned(torch.cat((latents, extra), -1), *rest), expected, atol=1e-5)
    # And back: the first channels are what is kept.
    back = with_input_channels(conditioned.state_dict(), plain.in_channels)
    assert all(torch.equal(back[name], tensor) for name, tensor in plain.state_dict().items())


@torch.no_grad()
def test_image_vae_begins_as_the_video_vae_on_one_frame() -> None:
    """Where no padding is seen: the two pad differently, so the middle of one wide convolution is compared."""
    torch.manual_seed(0)
    video, image = AutoencoderKLHunyuanVideo(**VAE), AutoencoderKL(**VAE)
    image.load_state_dict(image_vae_weights(video.state_dict(), image), strict=True)
    picture = torch.randn(1, 3, 32, 32)
    ours = image.encoder.conv_in(picture)
    theirs = video.encoder.conv_in(picture[:, :, None])[:, :, 0]
    assert torch.allclose(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], atol=1e-5)
    assert not torch.allclose(ours, theirs, atol=1e-5)
    latents = torch.randn(1, 16, 6, 6)
    ours = image.decoder.conv_in(latents)
    theirs = video.decoder.conv_in(video.post_quant_conv(latents[:, :, None]))[:, :, 0]
    assert torch.allclose(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], atol=1e-5)
