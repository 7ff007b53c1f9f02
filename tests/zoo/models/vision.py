"""Hugging Face models of images and of sound."""

from __future__ import annotations

from typing import Any

import torch

from zoo.models.entry import BATCH, Entry, Table, hugging_face, normal

TABLE = Table()

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 4,
}
_SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 4,
    "drop_path_rate": 0.0,
}


def _classes() -> dict[str, Any]:
    return {"pixel_values": normal(BATCH, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 3])}


def _images() -> dict[str, Any]:
    return {"pixel_values": normal(BATCH, 3, 16, 16).requires_grad_()}


def _large() -> dict[str, Any]:
    return {"pixel_values": normal(BATCH, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 3])}


def _segments() -> dict[str, Any]:
    return {"pixel_values": normal(BATCH, 3, 32, 32), "labels": torch.arange(BATCH * 32 * 32).reshape(BATCH, 32, 32) % 4}


def _config(model: str) -> str:
    return (model.rpartition("For")[0] or model).removesuffix("Model") + "Config"


def _vision(name: str, model: str, sizes: dict[str, Any], inputs: Any = _classes, **options: Any) -> None:
    TABLE.entries.append(Entry(name, "vision", hugging_face(model, _config(model), inputs, **sizes), package="transformers", **options))


_vision("vit", "ViTForImageClassification", {**_SIZES, "hidden_dropout_prob": 0.1})
_vision("deit", "DeiTForImageClassification", _SIZES)
_vision("beit", "BeitForImageClassification", {**_SIZES, "drop_path_rate": 0.0, "use_relative_position_bias": True})
_vision("swin", "SwinForImageClassification", _SWIN)
_vision("swinv2", "Swinv2ForImageClassification", _SWIN)
_vision(
    "convnext",
    "ConvNextForImageClassification",
    {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "patch_size": 2, "num_labels": 4},
)
_vision(
    "convnextv2",
    "ConvNextV2ForImageClassification",
    {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "patch_size": 2, "num_labels": 4},
)
_vision(
    "resnet",
    "ResNetForImageClassification",
    {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 4},
    _large,
)
_vision(
    "regnet",
    "RegNetForImageClassification",
    {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "groups_width": 8, "num_labels": 4},
    _large,
)
_vision("dinov2", "Dinov2Model", {**_SIZES, "mlp_ratio": 2, "drop_path_rate": 0.0}, _images)
_vision(
    "segformer",
    "SegformerForSemanticSegmentation",
    {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "num_attention_heads": [2, 4],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
        "num_labels": 4,
        "drop_path_rate": 0.0,
        "classifier_dropout_prob": 0.0,
    },
    _segments,
)
_vision(
    "poolformer",
    "PoolFormerForImageClassification",
    {
        "depths": [1, 1],
        "hidden_sizes": [8, 16],
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
        "num_labels": 4,
        "drop_path_rate": 0.0,
    },
    _large,
)
_vision(
    "mobilenet_v2", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "num_labels": 4, "classifier_dropout_prob": 0.0}, _large
)
_vision("vit_msn", "ViTMSNForImageClassification", _SIZES)
_vision(
    "pvt",
    "PvtForImageClassification",
    {
        "image_size": 32,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sequence_reduction_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
        "num_labels": 4,
        "drop_path_rate": 0.0,
    },
    _large,
)
_vision(
    "focalnet",
    "FocalNetForImageClassification",
    {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "num_labels": 4,
        "drop_path_rate": 0.0,
    },
)

_WAVE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "vocab_size": 32,
}


def _sound() -> dict[str, Any]:
    return {"input_values": normal(BATCH, 164)}


def _hearing(name: str, model: str, sizes: dict[str, Any], inputs: Any = _sound, **options: Any) -> None:
    TABLE.entries.append(Entry(name, "audio", hugging_face(model, _config(model), inputs, **sizes), package="transformers", **options))


_hearing("wav2vec2", "Wav2Vec2ForCTC", _WAVE)
_hearing("hubert", "HubertModel", _WAVE)
_hearing("sew", "SEWModel", {**_WAVE, "squeeze_factor": 2})
_hearing("unispeech", "UniSpeechModel", _WAVE)
_hearing(
    "audio_spectrogram",
    "ASTForAudioClassification",
    {**{k: v for k, v in _SIZES.items() if k != "image_size"}, "max_length": 16, "num_mel_bins": 8},
    lambda: {"input_values": normal(BATCH, 16, 8), "labels": torch.tensor([0, 1, 2, 3])},
)
_hearing(
    "wav2vec2_ctc_loss",
    "Wav2Vec2ForCTC",
    _WAVE,
    lambda: {"input_values": normal(BATCH, 164), "labels": torch.full((BATCH, 3), 5)},
    refusal="cannot trace Wav2Vec2ForCTC",
)
