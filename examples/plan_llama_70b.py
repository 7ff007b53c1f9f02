"""Plan Llama 3 70B for 64 H100s on a laptop: 80 layers on the meta device, no weights, no GPU, no processes.

Eight nodes of eight GPUs: tensor parallelism inside a node, data parallelism between them, and a memory budget, under which the
planner splits optimizer state and gradients too and chooses what backward computes again.

    python examples/plan_llama_70b.py                                 all 80 layers: minutes, two on a quiet core
    python examples/plan_llama_70b.py --mesh pp=4,dp=2,tp=8           with pipeline stages
    python examples/plan_llama_70b.py --layers 8                      a short one
"""

import argparse
import time

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import autoshard

GIB = 2**30


def config(layers: int) -> LlamaConfig:
    """The shapes of Llama 3 70B."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        use_cache=False,
        attn_implementation="sdpa",
    )


class Loss(nn.Module):
    """What training reads: the logits, 128,256 numbers for every token, need not be put together on any GPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan Llama 3 70B for 64 H100s.")
    parser.add_argument("--mesh", default="dp=8,tp=8", help="axes and sizes; an axis pp holds pipeline stages")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16, help="sequences in the global batch")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    args = parser.parse_args()

    with torch.device("meta"):
        model = Loss(LlamaForCausalLM(config(args.layers)).to(torch.bfloat16))
        ids = torch.zeros(args.batch, args.length, dtype=torch.long)
    start = time.perf_counter()
    plan = autoshard.plan(model, args.mesh, (ids,), hardware="h100x8", memory_budget_bytes=72 * GIB)
    seconds = time.perf_counter() - start

    console = Console()
    console.print(plan.table())
    console.print(plan.explain())
    size = sum(p.numel() for p in model.parameters())
    mesh, predicted = autoshard.MeshSpec.of(args.mesh), plan.stats["predicted_s"]
    console.print(f"{size / 1e9:.1f} B parameters on {mesh} planned in {seconds:.0f} s")
    console.print(f"predicted: {predicted:.2f} s a step, {ids.numel() / predicted / mesh.size:,.0f} tokens a second and GPU")


if __name__ == "__main__":
    main()
