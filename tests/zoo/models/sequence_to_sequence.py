"""Hugging Face encoder-decoders."""

from __future__ import annotations

from typing import Any

from zoo.models.entry import BATCH, LENGTH, VOCAB, Entry, Table, hugging_face, normal, tokens

TABLE = Table()

_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "use_cache": False,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


def _text() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens(BATCH, 4, seed=4)}


def _given() -> dict[str, Any]:
    """The decoder's tokens, which a model otherwise makes from the labels by writing into a tensor."""
    return {"input_ids": tokens(), "decoder_input_ids": tokens(BATCH, 4, seed=4)}


def _audio() -> dict[str, Any]:
    return {"input_features": normal(BATCH, 8, 16), "labels": tokens(BATCH, 4)}


def _heard() -> dict[str, Any]:
    return {"input_features": normal(BATCH, 8, 16), "decoder_input_ids": tokens(BATCH, 4)}


def _translator(name: str, model: str, sizes: dict[str, Any], inputs: Any = _text, family: str = "encoder-decoder", **options: Any) -> None:
    whole = model if model.endswith("Model") else f"{model}ForConditionalGeneration"
    make = hugging_face(whole, _config(model), inputs, **sizes)
    TABLE.entries.append(Entry(name, family, make, package="transformers", **options))


def _config(model: str) -> str:
    return {"MarianMTModel": "MarianConfig"}.get(model, f"{model}Config")


_translator("t5", "T5", {**_T5, "dropout_rate": 0.1})
_translator("t5_decoder_ids", "T5", {**_T5, "dropout_rate": 0.0}, _given)
_translator("t5_gated", "MT5", {**_T5, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"})
_translator("bart", "Bart", {**_BART, "dropout": 0.1, "forced_eos_token_id": 2})
_translator("bart_decoder_ids", "Bart", {**_BART, "forced_eos_token_id": 2}, _given)
_translator("mbart", "MBart", _BART)
_translator("pegasus_decoder_ids", "Pegasus", _BART, _given)
_translator("pegasus", "Pegasus", _BART)
_translator("marian", "MarianMTModel", _BART)
_translator("m2m_100", "M2M100", _BART, modes=("eval",))  # in training it branches on a drawn number, even when layerdrop is 0
_translator("blenderbot", "Blenderbot", _BART)
_translator(
    "whisper",
    "Whisper",
    {
        **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
        "num_mel_bins": 8,
        "max_source_positions": LENGTH,
        "max_target_positions": 16,
    },
    _audio,
    "audio",
)
_translator(
    "whisper_decoder_ids",
    "Whisper",
    {
        **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
        "num_mel_bins": 8,
        "max_source_positions": LENGTH,
        "max_target_positions": 16,
    },
    _heard,
    "audio",
)
