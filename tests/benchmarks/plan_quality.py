"""What plans are predicted to cost: auto beside each template, and hand counts of the literature; writes docs/benchmarks/plan_quality.md.

python tests/benchmarks/plan_quality.py            every workload; no GPU, minutes
python tests/benchmarks/plan_quality.py --only moe
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "examples")]
import all_reduces  # noqa: E402
from gpt import GPT, GPTConfig  # noqa: E402
from page import OUT, heading, table, write  # noqa: E402
from processes import run_on_ranks  # noqa: E402
from train_unet import UNet  # noqa: E402

import autoshard  # noqa: E402
from autoshard.conversions import WIRE  # noqa: E402
from autoshard.costs import CostModel  # noqa: E402
from autoshard.errors import AutoshardError  # noqa: E402
from autoshard.program import facts, producer  # noqa: E402
from autoshard.text import human_bytes, human_seconds  # noqa: E402
from autoshard.traffic import all_sent  # noqa: E402

TEMPLATES = ("auto", "ddp", "fsdp", "megatron", "megatron_sp")
MESH, HARDWARE = "dp=2,tp=4", "h100"
Made = tuple[nn.Module, dict[str, torch.Tensor]]


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(batch, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def gpt() -> Made:
    ids = torch.zeros(16, 1024, dtype=torch.long)
    return GPT(GPTConfig(layers=4, heads=12, width=768, block=1024, vocab=50304)), {"ids": ids, "labels": ids}


def llama() -> Made:
    sizes = {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, use_cache=False)), tokens(8, 2048)


def vit() -> Made:
    config = ViTConfig(num_hidden_layers=4, num_labels=1000)
    return ViTForImageClassification(config), pictures(256)


def moe() -> Made:
    sizes = {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8}
    return OlmoeForCausalLM(OlmoeConfig(**sizes, num_hidden_layers=2, use_cache=False)), tokens(8, 2048)


def resnet() -> Made:
    return ResNetForImageClassification(ResNetConfig(depths=[1, 1, 1, 1], num_labels=1000)), pictures(256)


def unet() -> Made:
    images = torch.zeros(64, 1, 256, 256, dtype=torch.bfloat16)
    return UNet(width=128), {"image": images, "clean": images}


def pictures(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.zeros(batch, 3, 224, 224, dtype=torch.bfloat16), "labels": torch.zeros(batch, dtype=torch.long)}


class Case(NamedTuple):
    name: str
    make: Callable[[], Made]


CASES = {
    "gpt": Case("GPT: 4 layers of GPT-2 small, 16 x 1024 tokens", gpt),
    "llama": Case("Llama: 4 layers of width 2048, 8 x 2048 tokens", llama),
    "vit": Case("ViT: 4 layers of ViT-Base, 256 pictures of 224 x 224", vit),
    "moe": Case("Mixture of experts: 2 layers of OLMoE, 64 experts, 8 x 2048 tokens", moe),
    "resnet": Case("ResNet: one bottleneck block per stage, 256 pictures of 224 x 224", resnet),
    "unet": Case("U-Net: two scales, width 128, 64 pictures of 256 x 256", unet),
}


def plan_of(case: Case, template: str) -> autoshard.Plan:
    with torch.device("meta"):
        model, kwargs = case.make()
        model = model.to(torch.bfloat16)
    return autoshard.plan(model, MESH, (), kwargs, hardware=HARDWARE, template=template, outputs="dtensor")  # type: ignore[arg-type]


def quality_rows(case: Case) -> tuple[list[str], list[list[str]]]:
    """Predicted step, peak memory and bytes sent by collective, of auto and every template."""
    found: dict[str, dict[str, Any] | str] = {}
    for template in TEMPLATES:
        try:
            plan = plan_of(case, template)
            found[template] = {**plan.stats, "peak_bytes": plan.memory("adamw").peak_bytes}
        except AutoshardError as error:
            found[template] = str(error).splitlines()[0]
        print(case.name, template, flush=True)
    planned = {name: stats for name, stats in found.items() if isinstance(stats, dict)}
    kinds = sorted({kind for stats in planned.values() for kind in stats["wire_bytes_per_step"]})
    rows = []
    for template, stats in found.items():
        if isinstance(stats, str):
            rows.append([template, "no plan", "", "", *[""] * len(kinds)])
            continue
        sent = [human_bytes(stats["wire_bytes_per_step"].get(kind, 0.0)) for kind in kinds]
        ratio = stats["predicted_s"] / planned["auto"]["predicted_s"]
        rows.append([template, human_seconds(stats["predicted_s"]), f"{ratio:.3f}", human_bytes(stats["peak_bytes"]), *sent])
    return ["", "predicted step", "against auto", "peak memory", *kinds], rows


# ---------------------------------------------------------------------------------------------------------- hand counts


def counted(plan: autoshard.Plan) -> Counter[str]:
    """Collectives of a step, by name, with how often."""
    return Counter(name for _, name, _ in all_sent(plan.program, CostModel(plan.mesh, plan.hardware)) if WIRE[name](2))


def megatron_count() -> list[str]:
    ids, labels = all_reduces.tokens()
    plan = autoshard.plan(all_reduces.SeparateGPT(), "tp=2", (ids, labels), constraints=all_reduces.PINS, hardware=HARDWARE)
    ours, theirs = (run_on_ranks(2, all_reduces.counts, kind)[0][0] for kind in ("autoshard", "dtensor"))
    return [
        "Megatron: all-reduces of 4 GPT layers with separate q, k and v",
        "16: two forward, two backward per layer",
        f"{counted(plan)['all_reduce']} in the program, {_said(ours)} on two gloo processes",
        f"DTensor (parallelize_module), same processes: {_said(theirs)}",
    ]


def _said(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


class Halves(nn.Module):
    """A stack of linear layers under bfloat16 autocast, of which float32 weights are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x).float().square().mean()


def fsdp_count() -> list[str]:
    with torch.device("meta"):
        plan = autoshard.plan(Halves(), "dp=4", (torch.zeros(4096, 1024),), template="fsdp", hardware=HARDWARE)
    found, size = counted(plan), 6 * 1024 * 1024
    dtypes = {str(facts(node).value.dtype) for node in plan.program.nodes("conversion") if _gathers_weight(node)}
    sent = plan.stats["wire_bytes_per_step"]
    each = size * 2 * 3 / 4
    return [
        "FSDP: 6 linear layers, float32 weights, bfloat16 autocast, 4 ranks",
        f"per weight 2 all-gathers and 1 reduce-scatter in the compute dtype, or 1 and 1 where gathered weights are kept for backward: "
        f"{human_bytes(2 * each)} or {human_bytes(each)} gathered, {human_bytes(each)} scattered",
        f"{found['all_gather']} all-gathers, {found['reduce_scatter']} reduce-scatters of {', '.join(dtypes)}; "
        f"{human_bytes(sent.get('all_gather', 0))} and {human_bytes(sent.get('reduce_scatter', 0))}",
        "gathered weights are kept",
    ]


def _gathers_weight(node: fx.Node) -> bool:
    source = producer(node.args[0])[0]  # type: ignore[arg-type]
    return facts(node).value.shape == (1024, 1024) and facts(source).needs_grad


def report(parts: dict[str, tuple[list[str], list[list[str]]]], hand: list[list[str]]) -> str:
    lines = [
        *heading("What plans are predicted to cost, and what they send", "tests/benchmarks/plan_quality.py"),
        f"Mesh {MESH}, hardware {HARDWARE}, bfloat16, training. Times and memory are predictions of the cost model, not measurements;",
        "bytes are those that a rank sends in a step, counted in the emitted program. Peak memory is that of a rank in a step of AdamW,",
        'rehearsed as on a GPU (docs/06-memory.md). Results beside the loss stay split (outputs="dtensor").',
    ]
    for key, (columns, rows) in parts.items():
        lines += ["", f"## {CASES[key].name}", "", *table(columns, rows)]
    lines += ["", "## Against hand counts of the literature", ""]
    lines += table(["what", "hand count", "here", "beside"], hand)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted costs of plans, write docs/benchmarks/plan_quality.md.")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    hand = [megatron_count(), fsdp_count()]
    parts = {}
    for key in args.only:
        parts[key] = quality_rows(CASES[key])
        write(args.out, "plan_quality.md", report(parts, hand))


if __name__ == "__main__":
    main()
