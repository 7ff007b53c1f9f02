"""diffusers' networks, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.models.entry import BATCH, Entry, Made, Table, normal

TABLE = Table()

_BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}


def _diffusers(name: str, model: str, inputs: Callable[[], dict[str, Any]], **sizes: Any) -> None:
    def make() -> Made:
        import diffusers

        return getattr(diffusers, model)(**sizes).double(), (), {**inputs(), "return_dict": False}

    TABLE.entries.append(Entry(f"diffusers_{name}", "diffusers", make, package="diffusers"))


def _noise(channels: int = 4) -> dict[str, Any]:
    return {"sample": normal(BATCH, channels, 8, 8), "timestep": torch.tensor([1, 5, 9, 13])}


_diffusers(
    "unet2d",
    "UNet2DModel",
    _noise,
    **_BLOCKS,
    in_channels=4,
    out_channels=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
)
_diffusers(
    "unet2d_condition",
    "UNet2DConditionModel",
    lambda: {**_noise(), "encoder_hidden_states": normal(BATCH, 4, 16)},
    **_BLOCKS,
    in_channels=4,
    out_channels=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=4,
)
_diffusers(
    "autoencoder_kl",
    "AutoencoderKL",
    lambda: {"sample": normal(BATCH, 3, 8, 8), "sample_posterior": False},
    **_BLOCKS,
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=4,
)
_diffusers(
    "dit",
    "DiTTransformer2DModel",
    lambda: {"hidden_states": normal(BATCH, 4, 8, 8), "timestep": torch.tensor([1, 5, 9, 13]), "class_labels": torch.tensor([0, 1, 2, 3])},
    num_attention_heads=4,
    attention_head_dim=8,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=16,
    norm_num_groups=4,
)
_diffusers(
    "pixart",
    "PixArtTransformer2DModel",
    lambda: {
        "hidden_states": normal(BATCH, 4, 8, 8),
        "timestep": torch.tensor([1, 5, 9, 13]),
        "encoder_hidden_states": normal(BATCH, 4, 16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    num_attention_heads=4,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=1,
    sample_size=8,
    patch_size=2,
    cross_attention_dim=32,
    caption_channels=16,
    norm_num_groups=4,
)
_diffusers(
    "flux",
    "FluxTransformer2DModel",
    lambda: {
        "hidden_states": normal(BATCH, 4, 8),
        "encoder_hidden_states": normal(BATCH, 4, 16),
        "pooled_projections": normal(BATCH, 8),
        "timestep": torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(4, 3),
    },
    patch_size=1,
    in_channels=8,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=16,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 2, 2),
)
_diffusers(
    "sd3",
    "SD3Transformer2DModel",
    lambda: {
        "hidden_states": normal(BATCH, 4, 8, 8),
        "encoder_hidden_states": normal(BATCH, 4, 16),
        "pooled_projections": normal(BATCH, 8),
        "timestep": torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64),
    },
    sample_size=8,
    patch_size=2,
    in_channels=4,
    num_layers=1,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=16,
    caption_projection_dim=32,
    pooled_projection_dim=8,
    out_channels=4,
)
_diffusers(
    "vq",
    "VQModel",
    lambda: {"sample": normal(BATCH, 3, 8, 8)},
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    layers_per_block=1,
    num_vq_embeddings=8,
)
