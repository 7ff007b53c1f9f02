"""Hugging Face models of text and images together."""

from __future__ import annotations

from typing import Any

import torch

from zoo.models.entry import BATCH, LENGTH, VOCAB, Entry, Made, Table, normal, tokens

TABLE = Table()

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}


def _both(ids: torch.Tensor | None = None) -> dict[str, Any]:
    return {"input_ids": tokens() if ids is None else ids, "pixel_values": normal(BATCH, 3, 16, 16)}


def _add(name: str, model: str, config: str, inputs: Any = _both, configs: Any = None, **options: Any) -> None:
    def make() -> Made:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**(configs(transformers) if configs else {})))
        return made.double(), (), inputs()

    TABLE.entries.append(Entry(name, "multi-modal", make, package="transformers", **options))


_add(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    lambda: {**_both(), "return_loss": True},
    configs=lambda t: {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 16},
)
_add(
    "siglip",
    "SiglipModel",
    "SiglipConfig",
    lambda: {**_both(), "return_loss": True},
    configs=lambda t: {"text_config": {**_TEXT, "projection_size": 32}, "vision_config": _VISION},
)
_add(
    "blip",
    "BlipModel",
    "BlipConfig",
    lambda: {**_both(), "return_loss": True},
    configs=lambda t: {
        "text_config": {**_TEXT, "is_decoder": False, "encoder_hidden_size": 32},
        "vision_config": _VISION,
        "projection_dim": 16,
    },
)
_add(
    "chinese_clip",
    "ChineseCLIPModel",
    "ChineseCLIPConfig",
    lambda: {**_both(), "return_loss": True},
    configs=lambda t: {"text_config": {**_TEXT, "type_vocab_size": 2}, "vision_config": _VISION, "projection_dim": 16},
)
_add(
    "vilt",
    "ViltModel",
    "ViltConfig",
    lambda: _both(),
    configs=lambda t: {**_TEXT, "image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.0},
    refusal="cannot trace ViltModel",
)
_add(
    "git",
    "GitForCausalLM",
    "GitConfig",
    lambda: {**_both(), "labels": tokens(seed=4)},
    configs=lambda t: {**_TEXT, "vision_config": _VISION, "use_cache": False, "num_image_with_embedding": None},
)


def _image_tokens() -> torch.Tensor:
    ids = tokens(BATCH, LENGTH)
    ids[:, :4] = 3
    return ids


_add(
    "llava",
    "LlavaForConditionalGeneration",
    "LlavaConfig",
    lambda: {**_both(_image_tokens()), "use_cache": False},
    configs=lambda t: {
        "text_config": t.LlamaConfig(**_TEXT, num_key_value_heads=4, use_cache=False),
        "vision_config": t.CLIPVisionConfig(**_VISION),
        "image_token_index": 3,
        "image_seq_length": 4,
        "vision_feature_select_strategy": "default",
    },
)
