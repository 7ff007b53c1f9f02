"""The cut that is chosen beside even ones, by predicted step time under the same schedule; a part of pipelines.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig
from page import table
from torch import Tensor, nn

import autoshard
from autoshard.text import human_bytes, human_seconds


class UNet(nn.Module):
    """x, target: [batch, 3, height, width], both divisible by 8 -> loss. Its modules have names, not numbers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.enter, self.leave = Convolutions(3, width), nn.Conv2d(width, 3, 1)
        self.down_once, self.down_twice = Convolutions(width, 2 * width), Convolutions(2 * width, 4 * width)
        self.bottom = Convolutions(4 * width, 8 * width)
        self.up_once, self.join_once = nn.ConvTranspose2d(8 * width, 4 * width, 2, stride=2), Convolutions(8 * width, 4 * width)
        self.up_twice, self.join_twice = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2), Convolutions(4 * width, 2 * width)
        self.up_last, self.join_last = nn.ConvTranspose2d(2 * width, width, 2, stride=2), Convolutions(2 * width, width)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        first = self.enter(x)
        second = self.down_once(F.max_pool2d(first, 2))
        third = self.down_twice(F.max_pool2d(second, 2))
        y = self.bottom(F.max_pool2d(third, 2))
        y = self.join_once(torch.cat([self.up_once(y), third], 1))
        y = self.join_twice(torch.cat([self.up_twice(y), second], 1))
        y = self.join_last(torch.cat([self.up_last(y), first], 1))
        return F.mse_loss(self.leave(y), target)


class Convolutions(nn.Module):
    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(width, to, 3, padding=1), nn.GroupNorm(8, to), nn.Conv2d(to, to, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.second(F.silu(self.norm(self.first(x)))))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0))


def _ids(batch: int, length: int) -> Callable[[], dict[str, Any]]:
    def given() -> dict[str, Any]:
        return {name: torch.zeros(batch, length, dtype=torch.long) for name in ("ids", "labels")}

    return given


def _texts() -> dict[str, Any]:
    return {name: torch.zeros(32, 512, dtype=torch.long) for name in ("input_ids", "labels")}


def _pictures() -> dict[str, Any]:
    return {name: torch.zeros(32, 3, 256, 256, dtype=torch.bfloat16) for name in ("x", "target")}


class Model(NamedTuple):
    """A model, what it is called with, and the meshes and schedules it is cut for; None: the schedule is chosen too."""

    name: str
    make: Callable[[], nn.Module]
    given: Callable[[], dict[str, Any]]
    ways: tuple[tuple[str, str | None], ...]


_LLAMA = LlamaConfig(layers=32, heads=32, kv_heads=8, width=4096, hidden=14336, vocab=128256)
_WIDE = LlamaConfig(layers=8, heads=16, kv_heads=8, width=2048, hidden=8192, vocab=256000)
_GPT = GPTConfig(layers=24, heads=16, width=1024, block=1024, vocab=50304)
_FOUR: tuple[tuple[str, str | None], ...] = (("pp=4", "1f1b"), ("pp=4", None))

MODELS = {
    "unet": Model("U-Net of 7 blocks with skips, 32 x 256 x 256", UNet, _pictures, _FOUR),
    "gpt": Model("sizes of GPT-2 medium, 16 x 1024", lambda: GPT(_GPT), _ids(16, 1024), _FOUR),
    "t5": Model("sizes of T5 small, 32 x 512", _t5, _texts, _FOUR),
    "vocabulary": Model("8 layers of width 2048, vocabulary of 256,000, 16 x 2048", lambda: Llama(_WIDE), _ids(16, 2048), _FOUR),
    "llama": Model("sizes of Llama 3 8B, 16 x 2048", lambda: Llama(_LLAMA), _ids(16, 2048), (*_FOUR, ("pp=8", "1f1b"))),
}
MICROBATCHES = 8


def cut_table(names: list[str]) -> list[str]:
    rows = []
    for name in names:
        model = MODELS[name]
        for mesh, schedule in model.ways:
            rows.append([model.name, mesh, *_cells(model, mesh, schedule)])
            print("  ".join(rows[-1]), flush=True)
    columns = ["model", "mesh", "schedule", "stages", "auto", "even layers", "even parameters", "no cut takes less than", "longest stage"]
    return [
        "## The cut beside even ones",
        "",
        f"Predictions, not measurements: weights on the meta device, bfloat16, {MICROBATCHES} microbatches, `h100`. `even layers`: as many",
        "layers in each stage, what lies before them in the first, the head and the loss in the last; `even parameters`: as many bytes of",
        "weights. In brackets how many times as long as `auto` they take under the same schedule (a `list` is made anew for each cut,",
        "and no bound is proven for it). A model without numbered layers has no even layers. `longest stage`: its compute over the mean",
        "stage's; one op is not cut, so a head may be longer. A schedule in brackets was chosen. `fullest rank` holds weights, gradients,",
        "optimizer state and activations in flight; `plan` is how long planning took, on cores that other work shared.",
        "",
        *table([*columns, "fullest rank", "plan, s"], rows),
    ]


def _cells(model: Model, mesh: str, schedule: str | None) -> list[str]:
    with torch.device("meta"):
        module, given = model.make().bfloat16(), model.given()
    started = time.perf_counter()
    asked = autoshard.Pipelining(MICROBATCHES, schedule)
    plan = autoshard.plan(module, mesh, (), given, hardware="h100", pipeline=asked)
    took_s, stats, pipeline = time.perf_counter() - started, plan.stats, plan.program.pipeline
    assert pipeline is not None
    best = stats["pipeline_s"]
    even = [stats.get(name) for name in ("even_layers_s", "even_parameters_s")]
    others = ["none" if s is None else f"{human_seconds(s)} ({s / best:.3f})" for s in even]
    name = pipeline.name if schedule else f"({pipeline.name})"
    bound = "" if pipeline.name == "list" else human_seconds(stats["pipeline_bound_s"])
    shown = [bound, f"{stats['stage_balance']:.2f}", human_bytes(stats["stage_bytes"]), f"{took_s:.0f}"]
    return [name, str(len(pipeline.stage_ranks)), human_seconds(best), *others, *shown]
