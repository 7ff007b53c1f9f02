"""Attention over split sequences on real processes, through autoshard.compile: training equals that of one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import SLOW
from processes import run_on_ranks
from test_compiled_module import assert_same_gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import autoshard

LENGTH, WIDTH = 8, 12
CASES = {"ring": "s&k", "queries": "s", "masked ring": "q&k", "keys": "k"}


class Attention(nn.Module):
    """Two layers of attention with grouped queries, causal or with a learned mask."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.query, self.key_value, self.out = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 2 * 8), nn.Linear(16, WIDTH)
        self.bias = nn.Parameter(torch.randn(LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            query = self.query(x).unflatten(-1, (4, 4)).transpose(1, 2)
            key, value = self.key_value(x).unflatten(-1, (4, 4)).transpose(1, 2).chunk(2, 1)
            mask = None if self.is_causal else self.bias
            found = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.is_causal, enable_gqa=True)
            x = x + self.out(found.transpose(1, 2).flatten(2))
        return x.square().mean()


def train(names: list[str], is_compiled: bool) -> None:
    """Three steps of every case; the emitted program must call the lowering."""
    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    for name in names:
        torch.manual_seed(0)
        model = Attention(is_causal=CASES[name][0] == "s").double()
        reference = copy.deepcopy(model)
        batches = [torch.randn(1, LENGTH, WIDTH, dtype=torch.float64) for _ in range(3)]
        constraints = {"parameter:*": "I", "split:scaled_dot_product_attention": CASES[name]}
        compiled: Any = autoshard.compile(model, mesh, example_inputs=(batches[0],), constraints=constraints, hardware=SLOW)
        compiled(batches[0])  # planned and checked before
        assert "split_attention(" in compiled.plan.source()
        run = torch.compile(compiled, backend="aot_eager", fullgraph=True) if is_compiled else compiled
        optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (compiled, reference)]
        for batch in batches:
            losses = [run(batch), reference(batch)]
            torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
            for loss in losses:
                loss.backward()
            assert_same_gradients(compiled, reference)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def train_and_compile() -> None:
    train(list(CASES), False)
    train(["queries", "masked ring", "keys"], True)


def test_two_ranks() -> None:
    """Also under torch.compile, as one graph."""
    run_on_ranks(2, train_and_compile)


def test_four_ranks() -> None:
    run_on_ranks(4, train, ["ring", "masked ring"], False)
