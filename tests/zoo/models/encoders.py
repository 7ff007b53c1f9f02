"""Hugging Face encoders of text."""

from __future__ import annotations

from typing import Any

import torch

from zoo.models.entry import BATCH, VOCAB, Entry, Table, hugging_face, tokens

TABLE = Table()

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _padding() -> torch.Tensor:
    """An attention mask with padding in the last row."""
    mask = torch.ones(BATCH, 8, dtype=torch.int64)
    mask[-1, 6:] = 0
    return mask


def _config(model: str) -> str:
    return (model.rpartition("For")[0] or model).removesuffix("Model").removesuffix("LMHead") + "Config"


def _encoder(name: str, model: str, sizes: dict[str, Any], labels: str = "tokens", mask: bool = True, **options: Any) -> None:
    def inputs() -> dict[str, Any]:
        given: dict[str, Any] = {"input_ids": tokens()}
        if mask:
            given["attention_mask"] = _padding()
        if labels == "tokens":
            given["labels"] = tokens(seed=4)
        elif labels == "class":
            given["labels"] = torch.tensor([0, 1, 1, 0])
        return given

    config = _config(model)
    make = hugging_face(model, config, inputs, **sizes)
    TABLE.entries.append(Entry(name, "encoder", make, package="transformers", **options))


_encoder("bert", "BertForMaskedLM", {**_SIZES, "hidden_dropout_prob": 0.1})
_encoder("bert_classifier", "BertForSequenceClassification", {**_SIZES, **_QUIET}, labels="class")
_encoder("roberta", "RobertaForMaskedLM", {**_SIZES, **_QUIET})
_encoder(
    "distilbert",
    "DistilBertForMaskedLM",
    {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32, "dropout": 0.1},
)
_encoder("albert", "AlbertForMaskedLM", {**_SIZES, **_QUIET, "embedding_size": 16})
_encoder("electra", "ElectraForMaskedLM", {**_SIZES, **_QUIET, "embedding_size": 16})
_encoder("mpnet", "MPNetForMaskedLM", {**_SIZES, **_QUIET})
_encoder("deberta_v2", "DebertaV2Model", {**_SIZES, **_QUIET, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, labels="")
_encoder("convbert", "ConvBertForMaskedLM", {**_SIZES, **_QUIET, "embedding_size": 32})
_encoder("fnet", "FNetForMaskedLM", {**_SIZES, "hidden_dropout_prob": 0.0, "tpu_short_seq_length": 8}, mask=False)
_encoder("roformer", "RoFormerForMaskedLM", {**_SIZES, **_QUIET})
_encoder(
    "modernbert",
    "ModernBertForMaskedLM",
    {**_SIZES, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
)
_encoder(
    "mobilebert",
    "MobileBertForMaskedLM",
    {**_SIZES, **_QUIET, "embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
)
_encoder("squeezebert", "SqueezeBertForMaskedLM", {**_SIZES, **_QUIET, "embedding_size": 32})
_encoder(
    "xlnet",
    "XLNetLMHeadModel",
    {
        "vocab_size": VOCAB,
        "d_model": 32,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 64,
        "dropout": 0.0,
        "use_mems_train": False,
        "use_mems_eval": False,
    },
)
_encoder("deberta_v2_loss", "DebertaV2ForMaskedLM", {**_SIZES, **_QUIET, "legacy": False})
_encoder("longformer", "LongformerModel", {**_SIZES, **_QUIET, "attention_window": 4}, labels="", refusal="cannot trace LongformerModel")
