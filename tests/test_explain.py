"""Plans that explain themselves: in words, what another layout would cost, and what differs between two plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import GPT
from rich.console import Console
from torch import Tensor, nn

import autoshard
from autoshard.errors import ConstraintError, PlanError
from autoshard.text import human_bytes

TEMPLATES = ("ddp", "fsdp", "megatron", "megatron_sp")


class Net(nn.Module):
    """Repeated blocks around a residual."""

    def __init__(self, blocks: int = 4, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 32)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


X = torch.zeros(16, 64)


@pytest.fixture(scope="module")
def plan() -> autoshard.Plan:
    return autoshard.plan(Net(), "dp=2,tp=2", (X,), template="megatron", hardware="h100")


def printed(thing: object, width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as text:
        console.print(thing)
    return text.get()


# -------------------------------------------------------------------------------------------------------------- explain


def test_an_explanation_of_a_deep_model_fits_one_screen() -> None:
    ids = torch.zeros(8, 8, dtype=torch.long)
    with torch.device("meta"):
        model = GPT(layers=5)
    plan = autoshard.plan(model, "dp=2,tp=2", (ids, ids), template="megatron_sp", hardware="h100")
    shown = plan.explain()
    lines = str(shown).splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 120 for line in lines)
    assert "blocks.* x5" in str(shown)
    assert "5 x all_gather@tp and reduce_scatter@tp" in str(shown)
    assert sum(row.step_s for row in shown.modules) == pytest.approx(plan.cost.total_s)
    assert sum(row.sent_bytes for row in shown.modules) == pytest.approx(sum(plan.stats["wire_bytes_per_step"].values()))
    listed = sum(row.seconds for row in shown.communications) + shown.sent_elsewhere_s
    assert listed == pytest.approx(sum(row.total_s for row in plan.cost.rows if row.axis and row.is_per_step))


def test_an_explanation_says_which_layouts_meet(plan: autoshard.Plan) -> None:
    text = str(plan.explain())
    assert "under template 'megatron'" in text
    assert "nothing is counted as overlapped" in text
    flat = " ".join(text.split())
    assert "is P@tp, " in flat
    assert "each rank holds a term of a sum" in flat
    assert "the parameter rests" not in flat  # nothing is sharded like FSDP here
    assert "ranks read the parameter for different data, so its gradient is summed" in flat


def test_memory_is_what_the_search_counted(plan: autoshard.Plan) -> None:
    kept, state = plan.stats["kept_bytes"], sum(row.state_bytes for row in plan.explain().modules)
    assert kept > state
    said = next(words for words in plan.explain().summary if words.startswith("Per rank"))
    assert f"AdamW's moments {human_bytes(state)}; with what is kept for backward, {human_bytes(kept)}, as the search counts them." in said


def test_state_of_parameters_by_module(plan: autoshard.Plan) -> None:
    shares = {row.name: row for row in plan.explain().modules}
    whole = sum(p.numel() for p in Net().parameters()) * 4 * 4
    norms = 4 * 2 * 64 * 16
    assert shares["head"].state_bytes == 16 * (64 * 32 / 2 + 32)  # the weight split on tp, the bias whole
    assert norms < sum(row.state_bytes for row in shares.values()) < whole


def test_an_explanation_names_fallbacks() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.matrix_exp(x @ x.T)

    plan = autoshard.plan(Odd(), "tp=2", (torch.zeros(4, 4),))
    assert plan.notes
    assert plan.notes[0] in plan.explain().fallbacks
    assert "To know:" in str(plan.explain())
    assert "Nothing is sent" in str(plan.explain())


# ------------------------------------------------------------------------------------------------------------------ why


def test_why_compares_with_the_best_plan_that_has_the_layout(plan: autoshard.Plan) -> None:
    answer = plan.why("blocks.1.3.weight", "S(0)@tp")
    pins = {"parameter:blocks.1.3.weight": "S(0)@tp"}
    other = autoshard.plan(Net(), "dp=2,tp=2", (X,), template="megatron", constraints=pins, hardware="h100")
    assert answer.verdict == "dearer"
    assert answer.diff is not None
    assert answer.diff.after_s == pytest.approx(other.cost.total_s)
    assert answer.diff.before_s == pytest.approx(plan.cost.total_s)
    assert answer.diff.after_bytes == other.stats["kept_bytes"]
    assert {c.name: c.after for c in answer.diff.parameters} == {c.name: c.after for c in plan.diff(other).parameters}
    assert "blocks.1.3.weight lies as I@dp S(1)@tp; S(0)@tp would be dearer by " in answer.text
    assert "sent per step" in printed(answer)


def test_why_leaves_the_plan_as_it_is(plan: autoshard.Plan) -> None:
    before = (plan.source(), plan.stats["objective_s"], list(plan.notes))
    plan.why("blocks.0.1.weight", "I")
    assert (plan.source(), plan.stats["objective_s"], list(plan.notes)) == before


def test_why_of_what_is_so_already(plan: autoshard.Plan) -> None:
    answer = plan.why("blocks.0.1.weight", "S(0)@tp")
    assert (answer.verdict, answer.diff) == ("already so", None)
    assert answer.text == "blocks.0.1.weight lies as I@dp S(0)@tp already, which is S(0)@tp."


def test_why_of_what_is_impossible_names_sizes() -> None:
    plan = autoshard.plan(nn.Linear(6, 10), "tp=4", (torch.zeros(8, 6),))
    answer = plan.why("weight", "S(1)@tp")
    assert answer.verdict == "impossible"
    assert answer.diff is None
    assert "dim 1 has size 6, axis tp of 4 ranks needs a multiple of 4: 4 or 8 would work" in answer.text


def test_why_of_a_tie() -> None:
    plan = autoshard.plan(nn.Linear(64, 64, bias=False), "a=2,b=2", (torch.zeros(8, 64),), constraints={"w*": "S(0)@a I@b"})
    answer = plan.why("weight", "I@a S(0)@b")
    assert answer.verdict == "equal"
    assert "costs the same" in answer.text


def test_why_of_values(plan: autoshard.Plan) -> None:
    """What a module returns and what one node makes."""
    module = plan.why("blocks.1", "S(0)@tp")
    assert module.constraint == ("output:blocks.1", "S(0)@tp")
    assert module.verdict in ("dearer", "cheaper")
    node = next(n.name for n in plan.program.nodes("op") if "gelu" in n.name)
    answer = plan.why(node, "I@tp")
    assert answer.constraint == (f"node:{node}", "I@tp")
    assert answer.verdict == "dearer"
    assert plan.why(f"node:{node}", "I@tp").diff == answer.diff
    given = plan.why("x", "S(1)@tp")
    assert given.constraint == ("input:x", "S(1)@tp")
    assert given.diff is not None


def test_a_node_can_be_pinned_by_its_name(plan: autoshard.Plan) -> None:
    node = next(n.name for n in plan.program.nodes("op") if "gelu" in n.name)
    other = autoshard.plan(Net(), "dp=2,tp=2", (X,), template="megatron", constraints={f"node:{node}": "I@tp"}, hardware="h100")
    answer = plan.why(node, "I@tp")
    assert answer.diff is not None
    assert other.cost.total_s == pytest.approx(answer.diff.after_s)
    model, x = Net().double(), torch.randn(16, 64).double()
    autoshard.verify(model, autoshard.plan(model, "dp=2,tp=2", (x,), constraints={f"node:{node}": "S(1)@tp"}), (x,))


def test_why_of_tied_parameters() -> None:
    ids = torch.zeros(4, 8, dtype=torch.long)
    plan = autoshard.plan(GPT(), "tp=2", (ids,), template="megatron", hardware="h100")
    by_alias, by_name = plan.why("head.weight", "S(0)@tp"), plan.why("tok.weight", "S(0)@tp")
    assert by_alias.current == by_name.current
    assert by_alias.diff is not None
    assert by_name.diff is not None
    assert by_alias.diff.after_s == by_name.diff.after_s


def test_bad_questions(plan: autoshard.Plan, tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"no parameter, input, module or node 'blocks\.1\.3\.weigth' in this plan; the nearest names are blocks"
    ):
        plan.why("blocks.1.3.weigth", "I")
    with pytest.raises(PlanError, match="names begin with parameter:, input:, output:, node: or nothing"):
        plan.why("param:head.weight", "I")
    with pytest.raises(ConstraintError, match="names axis 'ep'; the mesh has dp, tp"):
        plan.why("head.weight", "S(0)@ep")
    with pytest.raises(ConstraintError, match=r"'Q@tp': .*Q"):
        plan.why("head.weight", "Q@tp")
    plan.save(tmp_path / "plan.json")
    loaded = autoshard.Plan.load(tmp_path / "plan.json")
    assert str(loaded.explain()) == str(plan.explain())
    with pytest.raises(PlanError, match=r"read from a file.*reuse=plan"):
        loaded.why("head.weight", "I")


# ----------------------------------------------------------------------------------------------------------------- diff


def test_a_plan_does_not_differ_from_itself(plan: autoshard.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    found = plan.diff(autoshard.Plan.load(tmp_path / "plan.json"))
    assert found.is_empty
    assert not found.layouts
    assert found.before_s == found.after_s
    assert "every layout is the same" in printed(found)
    assert found.unchanged == 26


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_diff_of_templates(plan: autoshard.Plan, template: str) -> None:
    other = autoshard.plan(Net(), "dp=2,tp=2", (X,), template=template, hardware="h100")
    found = plan.diff(other)
    assert (found.before_s, found.after_s) == (plan.cost.total_s, other.cost.total_s)
    changed = {name for name in plan.parameter_layouts if plan.parameter_layouts[name] != other.parameter_layouts[name]}
    assert {change.name for change in found.parameters} == changed
    assert len(changed) + found.unchanged == 26
    for side, (one, sent) in enumerate(((plan, "bytes_before"), (other, "bytes_after"))):
        moved = dict.fromkeys(one.stats["wire_bytes_per_step"], 0.0)
        for row in found.collectives:
            if getattr(row, sent):
                moved[row.label.partition("@")[0]] += getattr(row, sent)
        assert moved == pytest.approx(one.stats["wire_bytes_per_step"]), side
    back = other.diff(plan)
    assert {(c.name, c.before, c.after) for c in back.layouts} == {(c.name, c.after, c.before) for c in found.layouts}
    if template == "fsdp":
        assert "blocks.*.*.weight x" in printed(found)


def test_a_diff_of_meshes_and_of_an_edited_model(plan: autoshard.Plan) -> None:
    other = autoshard.plan(Net(blocks=5), "dp=4,tp=2", (X,), template="megatron", hardware="h100")
    found = plan.diff(other)
    assert not found.is_empty
    assert "mesh dp=2,tp=2 -> dp=4,tp=2" in found.words()
    added = {change.name for change in found.parameters if change.before is None}
    assert added == {f"blocks.4.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")}
    assert not [change for change in found.layouts if change.after is None]
    assert {c.name for c in other.diff(plan).parameters if c.after is None} == added
    assert "(not there)" in printed(found)
    three = autoshard.plan(Net(), "tp=2", (X,), template="megatron", hardware="h100")
    assert all("@dp" not in (change.after or "") for change in plan.diff(three).layouts)
