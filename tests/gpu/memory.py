"""The part `memory` of tests/gpu/run.py: predicted peak memory beside torch.cuda.max_memory_allocated."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from allocation_tracker import fake_group, measure_step
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autoshard
from autoshard.memory import Memory
from autoshard.text import human_bytes

WORST = 0.10
COLUMNS = ["model", "plan", "predicted peak", "measured peak", "error", "predicted with margin", "reserved, measured"]
SMALL_GPT = GPTConfig(layers=2, heads=4, width=64, block=32, vocab=64)
GPT_124M = GPTConfig(layers=12, heads=12, width=768, block=1024, vocab=50304)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """All parameters at once, as the other parts train."""
    return torch.optim.AdamW(parameters, 1e-4, foreach=True)


def run_memory(found: Any, device: str) -> None:
    """Rank 0 of dp=2,tp=4 alone: every model under every template; on the CPU small ones, against its allocator. found: parts.Findings."""
    models: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {"GPT, small": (lambda: GPT(SMALL_GPT), SMALL_GPT.vocab, 8, 32)}
    if device == "cuda":
        models = {
            "GPT, 124 M, float32": (lambda: GPT(GPT_124M), GPT_124M.vocab, 16, 1024),
            "Llama, 1.1 B, bfloat16": (lambda: Llama(LlamaConfig()).bfloat16(), LlamaConfig().vocab, 8, 2048),
        }
    rows = []
    with fake_group(8):
        mesh = init_device_mesh(device, (2, 4), mesh_dim_names=("dp", "tp"))
        for name, (make, vocab, batch, length) in models.items():
            for template in ("auto", "fsdp", "megatron_sp") if device == "cuda" else ("fsdp",):
                memory, peak, reserved = compare(make, vocab, batch, length, mesh, template, device)
                error = memory.peak_bytes / peak - 1
                found.check(f"{name}, {template}: predicted peak within {WORST:.0%}", abs(error) <= WORST, f"{error:+.2%}")
                counts = [memory.peak_bytes, peak, memory.reserved_bytes, reserved]
                shown = ["not measured" if count is None else human_bytes(count) for count in counts]
                rows.append([name, template, shown[0], shown[1], f"{error:+.2%}", shown[2], shown[3]])
    note = (
        "A step that is not the first, AdamW over all parameters at once. On a fake process group collectives allocate and return at once."
    )
    found.table("Memory of one rank of dp=2,tp=4: predicted and measured", COLUMNS, rows, note)


def compare(
    make: Callable[[], nn.Module], vocab: int, batch: int, length: int, mesh: Any, template: str, device: str
) -> tuple[Memory, int, int | None]:
    """Prediction, measured peak, and what the caching allocator reserved (None on the CPU)."""
    gc.collect()
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated() if device == "cuda" else 0
    with torch.device("meta"):
        model = make()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    ids = torch.randint(vocab, (batch, length), device=device)
    hardware = "cpu" if device == "cpu" else _preset()
    arguments: dict[str, Any] = {"example_inputs": (ids,), "example_kwargs": {"labels": ids}, "hardware": hardware}
    sharded = autoshard.compile(model, mesh, template=template, **arguments)  # type: ignore[arg-type]
    sharded.materialize(lambda name: torch.randn(shapes[name], device=device) * 0.02)
    memory = sharded.plan.memory(adamw, device)  # type: ignore[arg-type]
    if device == "cpu":
        return memory, measure_step(sharded, (ids,), {"labels": ids}, adamw).peak_bytes, None
    optimizer = adamw(list(sharded.parameters()))
    for step in range(3):
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        loss = sharded(ids, labels=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return memory, torch.cuda.max_memory_allocated() - base, torch.cuda.max_memory_reserved()


def _preset() -> str:
    """The hardware preset that fits this device's name; h100 where none does."""
    name = torch.cuda.get_device_name().lower()
    return next((preset for preset in ("h200", "h100", "a100", "b200") if preset in name), "h100")
