"""Planning without processes or weights: what plans say, what templates mean, what is written."""

from __future__ import annotations

import ast
import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import EXAMPLES, GPT, LENGTH, MLP, SLOW, VOCAB, ConvNet
from torch import nn

import autoshard
from autoshard.passes import PASSES
from autoshard.placements import Layout
from autoshard.program import facts
from autoshard.runner import pass_name

IDS = torch.zeros(4, LENGTH, dtype=torch.int64)


def plan_gpt(mesh: str, template: str, layers: int = 1, **keywords: object) -> autoshard.Plan:
    with torch.device("meta"):
        model = GPT(layers)
    return autoshard.plan(model, mesh, (IDS, IDS), template=template, hardware="h100", **keywords)


def conversions(plan: autoshard.Plan, is_parameter: bool = False) -> Counter:
    """How often each conversion is called, of activations or of parameters."""
    found: Counter = Counter()
    for node in plan.program.nodes("conversion"):
        root = node
        while facts(root).role == "conversion":
            root = root.args[0]
        if (facts(root).role == "parameter") == is_parameter:
            found[node.target.__name__] += 1
    return found


def texts(layouts: dict[str, Layout]) -> dict[str, str]:
    return {name: " ".join(map(str, layout)) for name, layout in layouts.items()}


# ---------------------------------------------------------------------------------------------------------------- plans


def test_planning_needs_no_process_group_and_no_weights() -> None:
    assert not torch.distributed.is_initialized()
    with torch.device("meta"):
        model = GPT()
        ids = torch.zeros(4, LENGTH, dtype=torch.int64)
    plan = autoshard.plan(model, {"dp": 2, "tp": 2}, (ids,), {"labels": ids}, hardware="h100")
    assert str(plan.mesh) == "dp=2,tp=2"
    assert plan.program.is_training
    assert model.tok.weight.is_meta
    assert repr(plan).startswith("Plan(GPT on dp=2,tp=2, auto, ")


def test_the_model_is_left_alone() -> None:
    model = EXAMPLES["conv_net"].model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = autoshard.plan(model, "dp=2", EXAMPLES["conv_net"].batch(0)[0])
    autoshard.verify(model, plan, EXAMPLES["conv_net"].batch(0)[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_stats() -> None:
    stats = plan_gpt("dp=2,tp=2", "megatron").stats
    for phase in ("trace_s", "normalize_s", "annotate_s", "solve_s", "insert_s", "localize_s", "emit_s"):
        assert 0 < stats[phase] < 60, phase
    assert stats["nodes"] > 50
    assert 0 < stats["bound_s"] <= stats["objective_s"]
    assert set(stats["wire_bytes_per_step"]) <= {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "maximum"}
    assert stats["wire_bytes_per_step"]["all_reduce"] > 0


def test_the_source_is_deterministic_python_that_imports_torch_and_its_runtime() -> None:
    first, second = plan_gpt("dp=2,tp=2", "megatron_sp"), plan_gpt("dp=2,tp=2", "megatron_sp")
    assert first.source(0) == first.source(3) == second.source()
    assert first.fingerprint == second.fingerprint != plan_gpt("dp=2,tp=2", "ddp").fingerprint
    tree = ast.parse(first.source())
    imported = [
        node.names[0].name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert imported == ["torch", "autoshard_runtime"]
    assert '"blocks.0.attn.qkv.weight": ([48, 16], "f32", "I@dp S(0:3x16)@tp")' in first.source()


def test_emit_writes_a_folder(tmp_path: Path) -> None:
    plan = plan_gpt("tp=2", "megatron")
    folder = plan.emit(tmp_path / "new" / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["autoshard_runtime", "plan.json", "program.py", "run.py"]
    assert (folder / "program.py").read_text() == plan.source()
    assert autoshard.Plan.load(folder / "plan.json").source() == plan.source()
    assert plan.emit(folder) == folder


def test_intermediate_graphs_are_dumped(tmp_path: Path) -> None:
    plan_gpt("tp=2", "megatron", options=autoshard.Options(dump_dir=str(tmp_path)))
    names = [f"{number:02d}_{pass_name(cls.__new__(cls))}.txt" for number, cls in enumerate(PASSES)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    traced, finished = (tmp_path / names[0]).read_text(), (tmp_path / names[-1]).read_text()
    assert "conversion" not in traced
    assert "aten.linear.default" in traced
    assert "conversion" in finished
    assert "S(0:3x16)@tp" in finished


def test_random_plans_are_sound_and_differ() -> None:
    model = EXAMPLES["gpt"].model()
    args = EXAMPLES["gpt"].batch(0)[0]
    plans = [autoshard.plan(model, "dp=2,tp=2", args, options=autoshard.Options(seed=seed)) for seed in (1, 1, 2)]
    assert plans[0].source() == plans[1].source() != plans[2].source()
    assert all(autoshard.verify(model, plan, args).is_equal for plan in plans)


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("is_training", [True, False])
def test_verify_and_simulate(example: str, is_training: bool) -> None:
    model = EXAMPLES[example].model().train(is_training)
    args, kwargs = EXAMPLES[example].batch(0)
    plan = autoshard.plan(model, "tp=2", args, kwargs, template="megatron_sp", hardware="h100")
    assert plan.program.is_training is is_training
    result = autoshard.verify(model, plan, args, kwargs, tolerance=1e-6 if example.startswith("hf_") else None)
    assert result.is_equal, result
    assert result.gradients
    assert str(result).startswith("equal: outputs ")
    simulation = autoshard.simulate(plan, model, args, kwargs)
    split = next(node for node in plan.program.nodes("op") if any(placement.is_split for placement in facts(node).layouts[0]))
    values = simulation.values[split.name].values
    assert len(values) == 2
    assert simulation.whole(split.name).shape == facts(split).values[0].shape


def test_verify_finds_a_wrong_plan() -> None:
    model = EXAMPLES["gpt"].model()
    args = EXAMPLES["gpt"].batch(0)[0]
    plan = autoshard.plan(model, "tp=2", args, template="megatron", hardware="h100")
    node = next(node for node in plan.program.nodes("conversion") if node.target.__name__ == "all_reduce_invariant")
    node.replace_all_uses_with(node.args[0])
    result = autoshard.verify(model, plan, args)
    assert not result.is_equal
    assert str(result).startswith("DIFFERENT")


def test_dropout_is_switched_off_to_verify() -> None:
    model = GPT(dropout=0.5).double()
    args = EXAMPLES["gpt"].batch(0)[0]
    result = autoshard.verify(model, autoshard.plan(model, "dp=2", args, template="ddp"), args)
    assert result.is_equal
    assert result.is_random_off
    assert "random ops switched off" in str(result)


def test_frozen_parameters_get_no_gradient() -> None:
    model = EXAMPLES["gpt"].model()
    model.blocks.requires_grad_(False)
    args = EXAMPLES["gpt"].batch(0)[0]
    result = autoshard.verify(model, autoshard.plan(model, "dp=2,tp=2", args, template="fsdp"), args)
    assert result.is_equal
    assert not any(name.startswith("blocks") for name in result.gradients)


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, negate: bool = False, names: tuple[str, ...] = ()) -> dict[str, object]:
        y = self.inner(x) * scale
        return {"y": -y if negate else y, "count": len(names), "none": None, "pair": [y.sum(), (y,)]}


def test_arguments_that_are_no_tensors_are_baked_in() -> None:
    model, x = Flagged().double(), torch.randn(4, 8, dtype=torch.float64)
    plan = autoshard.plan(model, "dp=2", (x, 3.0), {"negate": True, "names": ("a", "b")}, template="ddp")
    assert plan.program.flat_inputs == ("x", None, None, None, None)
    assert plan.program.baked[:-1] == ("3.0", "True", "'a'", "'b'")
    assert "def forward(self, x):" in plan.source()
    assert autoshard.verify(model, plan, (x, 3.0), {"negate": True, "names": ("a", "b")}).is_equal


# ------------------------------------------------------------------------------------------------- templates, constraints


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_ddp_keeps_parameters_whole_and_splits_the_batch(mesh: str) -> None:
    plan = plan_gpt(mesh, "ddp")
    axes = mesh.count("=")
    assert set(texts(plan.parameter_layouts).values()) == {" ".join(["I"] * axes)}
    assert conversions(plan, is_parameter=True)["vary"] >= axes * (len(plan.parameter_layouts) - 1)  # positions have no batch
    linear = [node for node in plan.program.nodes("op") if str(node.target) == "aten.linear.default"]
    assert all(facts(node).layout[0].is_split for node in linear)


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_fsdp_splits_parameters_and_gathers_them(mesh: str) -> None:
    plan = plan_gpt(mesh, "fsdp")
    assert all(placement.is_split for layout in plan.parameter_layouts.values() for placement in layout)
    assert conversions(plan, is_parameter=True)["all_gather"] >= mesh.count("=") * (len(plan.parameter_layouts) - 1)


def test_megatron_cuts_columns_then_rows_with_two_all_reduces_a_block() -> None:
    plans = [plan_gpt("tp=2", "megatron", layers) for layers in (1, 3)]
    layouts = texts(plans[0].parameter_layouts)
    assert layouts["blocks.0.attn.qkv.weight"] == "S(0:3x16)"
    assert layouts["blocks.0.attn.qkv.bias"] == "S(0:3x16)"
    assert layouts["blocks.0.attn.proj.weight"] == "S(1)"
    assert layouts["blocks.0.up.weight"] == layouts["blocks.0.up.bias"] == "S(0)"
    assert layouts["blocks.0.down.weight"] == "S(1)"
    assert layouts["blocks.0.norm1.weight"] == layouts["blocks.0.attn.proj.bias"] == layouts["blocks.0.down.bias"] == "I"
    per_block = {name: (count - conversions(plans[0])[name]) / 2 for name, count in conversions(plans[1]).items()}
    assert {name: count for name, count in per_block.items() if count} == {"all_reduce_invariant": 2, "vary": 2}


def test_megatron_on_two_axes_splits_the_batch_too() -> None:
    plan = plan_gpt("dp=2,tp=2", "megatron")
    layouts = texts(plan.parameter_layouts)
    assert layouts["blocks.0.up.weight"] == "I S(0)"
    assert layouts["blocks.0.down.weight"] == "I S(1)"
    (loss,) = [node for node in plan.program.nodes("op") if facts(node).values[0].shape == ()]
    assert str(facts(loss).layout[0]) == "P"


def test_megatron_sp_splits_the_sequence_between_blocks() -> None:
    plan = plan_gpt("tp=2", "megatron_sp", layers=2)
    layouts = texts(plan.parameter_layouts)
    assert layouts["blocks.0.up.weight"] == "S(0)"
    assert layouts["blocks.0.down.weight"] == "S(1)"
    residuals = [node for node in plan.program.nodes("op", "conversion") if facts(node).values[0].shape == (4, LENGTH, 16)]
    assert any(str(facts(node).layout[0]) == "S(1)" for node in residuals)


def test_templates_of_a_convolutional_net() -> None:
    images = torch.zeros(64, 3, 64, 64, device="meta")
    plan = autoshard.plan(ConvNet(), "dp=2", (images, torch.zeros(64, dtype=torch.int64)), template="ddp", hardware=SLOW)
    assert plan.source().count("= batch_norm(") == 2  # over the whole batch, without gathering it
    assert set(texts(plan.parameter_layouts).values()) == {"I"}


def test_constraints_are_honoured() -> None:
    constraints = {"*.up.weight": "S(0)@tp I@dp", "input:ids": "S(0)@dp", "head.weight": "S(0)@tp I@dp", "output:blocks.*": "S(0)@dp"}
    plan = plan_gpt("dp=2,tp=2", "auto", constraints=constraints)
    layouts = texts(plan.parameter_layouts)
    assert layouts["blocks.0.up.weight"] == "I S(0)"
    assert layouts["head.weight"] == "I S(0)"
    assert "slice_varying(ids, dp, 0)" in plan.source()
    assert plan.constraints == constraints


def test_a_constraint_on_one_name_of_a_tied_parameter_holds_for_all() -> None:
    plan = plan_gpt("tp=2", "auto", constraints={"tok.weight": "S(1)"})
    assert texts(plan.parameter_layouts)["head.weight"] == "S(1)"
    assert plan.program.aliases == {"tok.weight": "head.weight"}


def test_constraints_refine_a_template() -> None:
    plan = plan_gpt("tp=2", "megatron", constraints={"head.weight": "I"})
    layouts = texts(plan.parameter_layouts)
    assert layouts["head.weight"] == "I"
    assert layouts["blocks.0.up.weight"] == "S(0)"


def test_a_memory_budget_is_kept() -> None:
    free = plan_gpt("dp=2,tp=2", "auto")
    budget = free.stats["kept_bytes"] * 0.7
    tight = plan_gpt("dp=2,tp=2", "auto", memory_budget_bytes=budget)
    assert tight.stats["kept_bytes"] <= budget < free.stats["kept_bytes"]
    assert tight.stats["objective_s"] >= free.stats["objective_s"]


def test_the_table_and_the_picture_can_be_read() -> None:
    from rich.console import Console

    plan = plan_gpt("dp=2,tp=2", "megatron", layers=2)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan.table())
    shown = console.export_text()
    assert "blocks.*.attn.qkv.weight" in shown
    assert f"f32[{VOCAB}, 16]" in shown
    assert "all_reduce" in shown
