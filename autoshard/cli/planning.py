"""The commands that decide or check: plan, search, verify."""

from __future__ import annotations

import argparse
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import autoshard
from autoshard.cli.command import FINE, NO, Command
from autoshard.cli.options import (
    MODEL_HELP,
    OF_PLANS,
    add_model_options,
    add_plan_options,
    add_search_options,
    check_writable,
    constraints_of,
    count,
    given_options,
    unwritable,
)
from autoshard.cli.screen import Screen
from autoshard.cli.sources import load_model, plan_of_model, saved_plan
from autoshard.costs import CostModel
from autoshard.errors import BudgetError, InputError
from autoshard.hardware import hardware_of
from autoshard.placements import format_layout
from autoshard.plan import Plan
from autoshard.program import facts
from autoshard.text import short_dtype
from autoshard.verification import Verification

_MOST_GRADIENTS = 10


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as plain data: what was asked, every parameter's layout, what is predicted, what must be known."""
    costs = CostModel(plan.mesh, plan.hardware)
    known = {name: facts(node) for name, node in plan.program.parameters().items()}
    mesh, stages = plan.program.whole_mesh, plan.program.pipeline
    return {
        "model": plan.model_name,
        "mesh": dict(zip(mesh.axes, mesh.shape, strict=True)),
        "pipeline": stages and {"microbatches": stages.microbatches, "schedule": stages.name, "stage_ranks": stages.stage_ranks},
        "hardware": plan.hardware.name,
        "template": plan.template,
        "constraints": plan.constraints,
        "is_training": plan.program.is_training,
        "parameters": {
            name: {
                "shape": known[name].value.shape,
                "dtype": short_dtype(known[name].value.dtype),
                "layout": format_layout(layout, plan.mesh),
                "rank_bytes": costs.local_bytes(known[name].value, layout),
            }
            for name, layout in plan.parameter_layouts.items()
        },
        "stats": plan.stats,
        "notes": plan.notes,
        "fingerprint": plan.fingerprint,
    }


def save(plan: Plan, path: str | None) -> list[str]:
    """Save a plan where a path was given -> what to say about it. Raises InputError where it cannot be written."""
    if path is None:
        return []
    try:
        plan.save(path)
    except OSError as error:
        raise unwritable(path, error) from error
    return [f"saved as {path}"]


# ---------------------------------------------------------------------------------------------------------------- plan


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_plan_options(parser, is_required=True)
    parser.add_argument("--out", metavar="FILE", help="save the plan, e.g. plan.json")


def run_plan(asked: argparse.Namespace, screen: Screen) -> int:
    """Plan a model and show the table."""
    if asked.out:
        check_writable(asked.out)
    plan = plan_of_model(asked, screen)
    said = save(plan, asked.out)
    screen.answer({**plan_data(plan), "out": asked.out}, plan.table(), *said)
    return FINE


# -------------------------------------------------------------------------------------------------------------- search


def _search_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--devices", type=count, required=True, metavar="N", help="how many devices there are")
    parser.add_argument("--cluster", metavar="NAME", help="h100, h100x4 (nodes of 4), a100, h200, b200, cpu, measured, profile:FILE")
    parser.add_argument("--max-axes", type=count, default=2, metavar="N", help="1 to 3 axes; three take much longer (default: 2)")
    add_model_options(parser)
    add_search_options(parser)
    parser.add_argument("--out", metavar="FILE", help="save the best plan, e.g. plan.json")


def run_search(asked: argparse.Namespace, screen: Screen) -> int:
    """Rank the meshes of so many devices."""
    if asked.out:
        check_writable(asked.out)
    keywords = {"cluster": hardware_of(asked.cluster), "constraints": constraints_of(asked), "memory_budget_bytes": asked.memory_budget}
    loaded = load_model(asked, screen)
    with screen.tracing(f"search {asked.devices} devices"):
        found = autoshard.search(loaded.model, loaded.args, loaded.kwargs, devices=asked.devices, max_axes=asked.max_axes, **keywords)
    said = save(found.best, asked.out)
    data = {"best": plan_data(found.best), "ranking": found.ranking, "devices": found.devices, "seconds": found.seconds, "out": asked.out}
    screen.answer(data, found.table(), *said)
    return FINE


# -------------------------------------------------------------------------------------------------------------- verify


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("plan", metavar="PLAN", nargs="?", help="a saved plan of it; without one it is planned at once, which takes --mesh")
    add_plan_options(parser)
    parser.add_argument("--tolerance", type=float, metavar="X", help="largest relative difference (default: by dtype, 1e-4 in float32)")


def run_verify(asked: argparse.Namespace, screen: Screen) -> int:
    """Simulate all ranks of a plan and compare with the model on one device."""
    given = given_options(asked, OF_PLANS)
    if asked.plan and given:
        raise InputError(f"{asked.plan} is a saved plan, made for its own mesh and hardware; leave out {', '.join(given)}")
    plan = saved_plan(asked.plan, screen) if asked.plan else None
    if plan is None and asked.mesh is None:
        raise InputError(
            "verify takes a saved plan, or --mesh to plan at once: autoshard verify MODEL plan.json, or MODEL --mesh dp=2,tp=4"
        )
    loaded = load_model(asked, screen, is_real=True)
    plan = plan or plan_of_model(asked, screen, loaded)
    mesh = plan.program.whole_mesh
    with screen.working(f"simulate {mesh.size} ranks"):
        found = autoshard.verify(loaded.model, plan, loaded.args, loaded.kwargs, tolerance=asked.tolerance)
    data = {"is_equal": found.is_equal, **vars(found), "mesh": mesh, "model": plan.model_name}
    screen.answer(data, f"{plan.model_name} on {mesh}: {found}", *([] if found.is_equal else [_differences(found)]))
    return FINE if found.is_equal else NO


def _differences(found: Verification) -> Table:
    """The tensors that differ, worst first."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("differs", overflow="fold")
    table.add_column("by", justify="right")
    errors = {"outputs": found.outputs, **{f"gradient of {name}": error for name, error in found.gradients.items()}, **found.buffers}
    wrong = sorted(((error, name) for name, error in errors.items() if error > found.tolerance), reverse=True)
    for error, name in wrong[:_MOST_GRADIENTS]:
        table.add_row(name, f"{error:.1e}")
    if len(wrong) > _MOST_GRADIENTS:
        table.add_row(f"and {len(wrong) - _MOST_GRADIENTS} more", "")
    return table


COMMANDS = (
    Command(
        "plan",
        "choose a layout for every tensor of a model on a mesh",
        "Plan a model on a mesh: no GPU, no process group and no weights are needed. Exit status 1: no plan fits the memory budget.",
        (
            "autoshard plan train.py:build --mesh dp=2,tp=4 --hardware h100 --out plan.json",
            "autoshard plan Llama-3.1-8B/ --mesh dp=2,tp=4 --hardware h100 --batch 16 --seq 4096",
            "autoshard plan train.py:build --mesh tp=8 --template megatron --constraint 'head.weight=S(0)@tp' --json",
        ),
        _plan_options,
        run_plan,
    ),
    Command(
        "search",
        "rank the meshes of so many devices",
        "Plan a model on every mesh of so many devices and rank the meshes by predicted step. Exit status 1: no mesh fits the budget.",
        (
            "autoshard search train.py:build --devices 64 --cluster h100x8",
            "autoshard search train.py:build --devices 16 --cluster a100 --memory-budget 70GB --out plan.json",
        ),
        _search_options,
        run_search,
    ),
    Command(
        "verify",
        "compare a plan with the model on one device, in this process",
        "Run all ranks of a plan, simulated in this process, and compare results and every gradient with the model on one device. "
        "Exit status 1: they differ.",
        (
            "autoshard verify train.py:build plan.json",
            "autoshard verify train.py:build --mesh dp=2,tp=2 --dtype f64",
        ),
        _verify_options,
        run_verify,
    ),
)
ANSWERS_NO = (BudgetError,)  # errors that are an answer: what was asked exists for no plan
