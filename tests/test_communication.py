"""What is sent is what the plan says: collectives counted in the program, and on real processes while they run."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks

import autoshard
from autoshard.conversions import BY_NAME, WIRE
from autoshard.costs import CostModel
from autoshard.program import facts
from autoshard.traffic import all_sent, sent_inside, traffic

sys.path.append(str(Path(__file__).parent / "benchmarks"))  # last: it has a pipelines.py too
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import all_reduces
import gpt


def test_separate_projections_take_sixteen_all_reduces() -> None:
    """Four layers, two all-reduces forward and two backward in each: the gradients of q, k and v are summed before they are sent.

    Source: Shoeybi et al., "Megatron-LM", 2019, section 3: four all-reduces per layer.
    """
    ids, labels = all_reduces.tokens()
    plan = autoshard.plan(all_reduces.SeparateGPT(), "tp=2", (ids, labels), constraints=all_reduces.PINS, hardware="h100")
    program = Counter(name for _, name, _ in all_sent(plan.program, CostModel(plan.mesh, plan.hardware)) if WIRE[name](2))
    assert program == {"all_reduce": 16}
    ranks = run_on_ranks(2, all_reduces.counts, "autoshard")
    for counted, _ in ranks:
        assert counted == {"all_reduce": 16}
    torch.manual_seed(0)
    assert ranks[0][1] == pytest.approx(float(all_reduces.SeparateGPT()(ids, labels).detach()), rel=1e-5)


@pytest.mark.parametrize("template", ["auto", "ddp", "fsdp", "megatron", "megatron_sp"])
def test_wire_bytes_are_those_of_the_programs_conversions(template: str) -> None:
    """Counted apart from the cost model: from local shapes, by what each collective is. Source: docs/03-conversions.md."""
    ids = torch.zeros(8, 16, dtype=torch.long)
    plan = autoshard.plan(gpt.GPT(gpt.SMALL), "dp=2,tp=2", (ids, ids), template=template, hardware="h100")
    counted: Counter[str] = Counter()
    for node in plan.program.nodes("conversion"):
        known, before = facts(node), facts(node.args[0])
        if known.is_constant:
            continue
        row = BY_NAME[node.target.__name__]
        ways = {"in": _pieces(before.layout, plan.mesh.shape), "out": _pieces(known.layout, plan.mesh.shape)}
        for name in (row.forward, row.backward)[: 2 if known.needs_grad else 1]:
            n, whole = 2, known.value.nbytes
            # bytes of the tensor that is larger of the two: the gathered, reduced or exchanged one
            held = whole / min(ways.values()) if name in ("all_gather", "reduce_scatter", "all_reduce") else whole / max(ways.values())
            factor = {"all_gather": (n - 1) / n, "reduce_scatter": (n - 1) / n, "all_reduce": 2 * (n - 1) / n, "all_to_all": (n - 1) / n}
            counted[name] += held * factor.get(name, 0.0)
    inside: Counter[str] = Counter()
    for node in plan.program.nodes("op"):
        for _, name, held in sent_inside(plan.program, node):
            inside[name] += WIRE[name](2) * held
    said = traffic(plan.program, CostModel(plan.mesh, plan.hardware))
    assert {name: said[name] for name in said} == pytest.approx({name: count for name, count in (counted + inside).items() if count})
    assert plan.stats["wire_bytes_per_step"] == said


def _pieces(layout, sizes) -> int:
    ways = 1
    for placement, n in zip(layout, sizes, strict=True):
        ways *= n if placement.is_split else 1
    return ways
