"""Emitted programs of the examples, as text in git: a change to what users read shows in the diff."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import autoshard

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import gpt  # the examples are scripts, not a package

IDS = torch.zeros(4, 16, dtype=torch.long)


def plan(template: str, mesh: str) -> autoshard.Plan:
    torch.manual_seed(0)
    return autoshard.plan(gpt.GPT(gpt.SMALL), mesh, (IDS, IDS), hardware="h100", template=template)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", ["ddp", "fsdp", "megatron", "megatron_sp"])
def test_gpt(template: str, golden: Callable[[str, str], None]) -> None:
    golden(f"gpt_{template}_dp2_tp2.py", plan(template, "dp=2,tp=2").source())


def test_mlp_auto(golden: Callable[[str, str], None]) -> None:
    model = nn.Sequential(nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 1024))
    found = autoshard.plan(model, "dp=2,tp=4", (torch.zeros(64, 1024),), hardware="h100")
    golden("mlp_auto_dp2_tp4.py", found.source())


def test_programs_are_deterministic() -> None:
    assert plan("megatron_sp", "dp=2,tp=2").source() == plan("megatron_sp", "dp=2,tp=2").source()
