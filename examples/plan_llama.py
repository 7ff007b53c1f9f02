"""Plan a Llama of about one billion parameters for eight H100s, on any machine: no GPU, no weights, no processes.

    python examples/plan_llama.py
"""

import time

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import autoshard

CONFIG = LlamaConfig(
    vocab_size=32768,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    use_cache=False,
    attn_implementation="sdpa",
)


def main() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
        ids = torch.zeros(8, 2048, dtype=torch.long)
    start = time.perf_counter()
    plan = autoshard.plan(model, "dp=2,tp=4", (), {"input_ids": ids, "labels": ids}, hardware="h100")
    seconds = time.perf_counter() - start

    console = Console()
    console.print(plan.table())
    size = sum(p.numel() for p in model.parameters())
    console.print(f"{size / 1e9:.2f} B parameters planned in {seconds:.1f} s")


if __name__ == "__main__":
    main()
