"""The network of the reference recipe, which several benchmarks stand beside: diffusers' ``UNet2DModel`` for 28x28."""

from __future__ import annotations

from typing import Any


def reference_network() -> Any:
    """With fresh weights, 0.99 M parameters; needs diffusers."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 64),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
