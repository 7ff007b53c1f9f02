"""Hugging Face decoders, mixtures of experts and state space models."""

from __future__ import annotations

from typing import Any

import torch

from zoo.models.entry import LENGTH, VOCAB, Entry, Table, hugging_face, tokens

DECODER, MOE, STATE = "decoder", "mixture of experts", "state space"
TABLE = Table()

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32, **_SPECIAL}
_N = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **_SPECIAL}


def _language(name: str, family: str, model: str, sizes: dict[str, Any], labels: bool = True, **options: Any) -> None:
    def inputs() -> dict[str, Any]:
        return {"input_ids": tokens(), **({"labels": tokens(seed=4)} if labels else {})}

    whole = model if model.endswith("LMHeadModel") else f"{model}ForCausalLM"
    dtype = options.get("dtype", torch.float64)
    make = hugging_face(whole, _config(model), inputs, dtype, **{"use_cache": False, **sizes})
    TABLE.entries.append(Entry(name, family, make, package="transformers", **options))


def _config(model: str) -> str:
    return {"GPT2LMHeadModel": "GPT2Config", "Gemma3": "Gemma3TextConfig"}.get(model, f"{model}Config")


_language("gpt2", DECODER, "GPT2LMHeadModel", {**_N, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})
_language("gpt2_odd_sizes", DECODER, "GPT2LMHeadModel", {**_N, "n_embd": 30, "n_head": 3, "vocab_size": 67})
_language(
    "gpt_neo",
    DECODER,
    "GPTNeo",
    {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        **_SPECIAL,
    },
)
_language("gptj", DECODER, "GPTJ", {**_N, "rotary_dim": 4})
_language("gpt_neox", DECODER, "GPTNeoX", {**_SIZES, "max_position_embeddings": 32, **_SPECIAL})
_language("opt", DECODER, "OPT", {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 32, **_SPECIAL})
_language(
    "bloom",
    DECODER,
    "Bloom",
    {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_SPECIAL},
    refusal="custom autograd.Function GeLUFunction",
)
_language("falcon", DECODER, "Falcon", {**_SIZES, "multi_query": True, "new_decoder_architecture": False, **_SPECIAL})
_language("llama", DECODER, "Llama", _GROUPED)
_language("mistral", DECODER, "Mistral", {**_GROUPED, "sliding_window": 4})
_language("gemma", DECODER, "Gemma", {**_GROUPED, "head_dim": 8, "num_key_value_heads": 1})
_language("gemma2", DECODER, "Gemma2", {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4})
_language("gemma3", DECODER, "Gemma3", {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4})
_language("qwen2", DECODER, "Qwen2", _GROUPED)
_language("qwen3", DECODER, "Qwen3", {**_GROUPED, "head_dim": 8})
_language("phi", DECODER, "Phi", _GROUPED)
_language("phi3", DECODER, "Phi3", _GROUPED)
_language("stablelm", DECODER, "StableLm", _GROUPED)
_language("olmo2", DECODER, "Olmo2", _GROUPED)
_language("starcoder2", DECODER, "Starcoder2", {**_GROUPED, "sliding_window": 4})
_language("cohere", DECODER, "Cohere", _GROUPED)
_language("granite", DECODER, "Granite", _GROUPED)
_language("mpt", DECODER, "Mpt", {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "expansion_ratio": 2})
_language("smollm3", DECODER, "SmolLM3", _GROUPED)

_BATCHED = {"experts_implementation": "batched_mm"}
_ROUTED = {**_GROUPED, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
# The default way to run experts, grouped_mm, has no kernel for float64; batched_mm has.
_language("mixtral", MOE, "Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, dtype=torch.float32)
_language(
    "mixtral_router_loss",
    MOE,
    "Mixtral",
    {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, **_BATCHED},
)
_language("qwen2_moe", MOE, "Qwen2Moe", {**_ROUTED, **_BATCHED, "shared_expert_intermediate_size": 32})
_language("qwen3_moe", MOE, "Qwen3Moe", {**_ROUTED, "head_dim": 8}, dtype=torch.float32)
_language("olmoe", MOE, "Olmoe", {**_ROUTED, **_BATCHED})
_language(
    "deepseek_v3",
    MOE,
    "DeepseekV3",
    {
        **_GROUPED,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        **_BATCHED,
    },
)
_language(
    "gpt_oss", MOE, "GptOss", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4, **_BATCHED}
)
_language(
    "mixtral_expert_loop",
    MOE,
    "Mixtral",
    {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    refusal="cannot trace MixtralForCausalLM",
)

_language(
    "mamba",
    STATE,
    "Mamba",
    {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "expand": 2, "time_step_rank": 4, **_SPECIAL},
)
_language(
    "mamba2",
    STATE,
    "Mamba2",
    {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "state_size": 4,
        "num_hidden_layers": 1,
        "expand": 2,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 4,
        **_SPECIAL,
    },
)
_RWKV = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "context_length": LENGTH, **_SPECIAL}
_language("rwkv", STATE, "Rwkv", _RWKV, modes=("train",))
# at its first evaluation, as a Python flag remembers: a program that divides would do so at each
_language("rwkv_eval", STATE, "Rwkv", _RWKV, modes=("eval",), refusal="div_.Tensor writes into the parameter")
_language("gpt2_cache", DECODER, "GPT2LMHeadModel", {**_N, "use_cache": True}, labels=False, refusal="Cache")
