"""Plans of an edited model that keep an earlier plan's layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoshard
from autoshard.errors import PlanError
from autoshard.plan_diff import parameter_texts


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """hidden: of each block's MLP."""

    def __init__(self, hidden: tuple[int, ...], name: str = "blocks") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.ModuleList(Mlp(16, size) for size in hidden))

    def forward(self, x: Tensor) -> Tensor:
        for block in getattr(self, self.name):
            x = x + block(x)
        return x.sum()


ODD = {"blocks.0.up.weight": "S(1)@tp", "blocks.1.down.weight": "S(0)@dp"}  # what no search would choose by itself


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    autoshard.plan(Net((32, 32, 32)), "dp=2,tp=2", (torch.zeros(8, 16),), template="megatron", constraints=ODD).save(path)
    return path


def test_what_an_edit_left_alone_keeps_its_layout(earlier: Path) -> None:
    """A block widened, one added, one removed."""
    old = parameter_texts(autoshard.Plan.load(earlier).program)
    model, x = Net((32, 64, 32, 32)).double(), torch.randn(8, 16).double()
    del model.blocks[2].down.bias
    model.blocks[2].down.register_parameter("bias", None)
    plan = autoshard.plan(model, "dp=2,tp=2", (x,), reuse=earlier)
    new = parameter_texts(plan.program)
    widened = {"blocks.1.up.weight", "blocks.1.up.bias", "blocks.1.down.weight"}
    kept = {name for name in new if name in old and name not in widened}
    assert len(kept) == 8
    assert {name: new[name] for name in kept} == {name: old[name] for name in kept}
    assert new["blocks.0.up.weight"] == "I@dp S(1)@tp"
    assert "8 parameters keep the layouts of the plan that was reused" in plan.notes
    assert "solved anew, new: blocks.*.up.weight, blocks.*.up.bias".replace("*", "3") in "; ".join(plan.notes)
    assert "solved anew, its shape was [32, 16] and is [64, 16]: blocks.1.up.weight" in plan.notes
    assert "no longer in the model: blocks.2.down.bias" in plan.notes
    autoshard.verify(model, plan, (x,))


def test_without_an_edit_everything_stays(earlier: Path) -> None:
    before = autoshard.Plan.load(earlier)
    after = autoshard.plan(Net((32, 32, 32)), "dp=2,tp=2", (torch.zeros(8, 16),), reuse=before)
    assert after.parameter_layouts == before.parameter_layouts
    assert before.diff(after).unchanged == 12
    assert after.notes == ["12 parameters keep the layouts of the plan that was reused"]


def test_a_larger_mesh_of_the_same_axes(earlier: Path) -> None:
    after = autoshard.plan(Net((32, 32, 32)), "dp=2,tp=32", (torch.zeros(8, 16),), reuse=earlier)
    odd = "solved anew, its layout does not fit mesh dp=2,tp=32: blocks.0.up.weight, blocks.*.down.weight x2"
    assert odd in after.notes
    assert parameter_texts(after.program)["blocks.1.up.weight"] == "I@dp S(0)@tp"


def test_constraints_come_before_what_is_reused(earlier: Path) -> None:
    pins = {"blocks.0.up.weight": "S(0)@dp"}
    after = autoshard.plan(Net((32, 32, 32)), "dp=2,tp=2", (torch.zeros(8, 16),), reuse=earlier, constraints=pins)
    assert parameter_texts(after.program)["blocks.0.up.weight"].startswith("S(0)@dp")
    assert "solved anew, constraints name it: blocks.0.up.weight" in after.notes


def test_why_of_a_parameter_that_was_reused(earlier: Path) -> None:
    plan = autoshard.plan(Net((32, 32, 32)), "dp=2,tp=2", (torch.zeros(8, 16),), reuse=earlier)
    answer = plan.why("blocks.0.up.weight", "S(0)@tp")
    assert answer.diff is not None
    assert [(c.name, c.after) for c in answer.diff.parameters] == [("blocks.0.up.weight", "I@dp S(0)@tp")]
    assert "(12 parameters were held where the reused plan has them)" in answer.text


def test_plans_that_cannot_be_reused(earlier: Path, tmp_path: Path) -> None:
    x = (torch.zeros(8, 16),)
    with pytest.raises(PlanError, match=r"made for another model, Net: no parameter of Net is in it"):
        autoshard.plan(Net((32,), "layers"), "dp=2,tp=2", x, reuse=earlier)
    with pytest.raises(PlanError, match="is for axes dp, tp, this mesh has x, y; name them alike"):
        autoshard.plan(Net((32,)), "x=2,y=2", x, reuse=earlier)
    with pytest.raises(PlanError, match="reuse is a plan or the path of a saved one, not dict"):
        autoshard.plan(Net((32,)), "dp=2,tp=2", x, reuse={})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="cannot read the plan"):
        autoshard.plan(Net((32,)), "dp=2,tp=2", x, reuse=tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(PlanError, match="not a plan"):
        autoshard.plan(Net((32,)), "dp=2,tp=2", x, reuse=tmp_path / "broken.json")
