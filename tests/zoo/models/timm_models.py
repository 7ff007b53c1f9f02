"""timm's models, small."""

from __future__ import annotations

from typing import Any

import torch

from zoo.models.entry import BATCH, Entry, Made, Table, normal

TABLE = Table()


def _mixer(**options: Any) -> torch.nn.Module:
    """Its entry points fix the patch size."""
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=8, **options)


def _timm(name: str, model: str, size: int = 32, **options: Any) -> None:
    def make() -> Made:
        import timm

        if model == "MlpMixer":
            return _mixer(**options).double(), (normal(BATCH, 3, size, size),), {}
        return timm.create_model(model, pretrained=False, num_classes=8, **options).double(), (normal(BATCH, 3, size, size),), {}

    TABLE.entries.append(Entry(f"timm_{name}", "timm", make, package="timm torchvision"))


_timm("resnet", "resnet10t", channels=(8, 16, 16, 32), stem_width=8)
_timm("resnet_bottleneck", "resnet26", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
_timm("vit", "vit_tiny_patch16_224", img_size=16, size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)
_timm("mixer", "MlpMixer", img_size=16, size=16, patch_size=4, embed_dim=32, num_blocks=2)
_timm("efficientnet", "test_efficientnet")
_timm("mobilenet_v3", "mobilenetv3_small_050")
_timm("convnext", "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
_timm(
    "swin",
    "swin_tiny_patch4_window7_224",
    img_size=16,
    size=16,
    patch_size=2,
    window_size=4,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    drop_path_rate=0.0,
)
_timm("densenet", "densenet121", block_config=(2, 2), growth_rate=8)
_timm("nfnet", "test_nfnet")
_timm("levit", "levit_128s", img_size=64, size=64, embed_dim=(16, 32), key_dim=8, num_heads=(2, 4), depth=(1, 1), drop_path_rate=0.0)
_timm("vit_pooled", "test_vit3", img_size=32)
_timm("cait", "cait_xxs24_224", img_size=16, size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4)
_timm("convnext_hybrid", "test_convnext")
