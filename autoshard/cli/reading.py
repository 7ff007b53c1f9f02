"""The commands that read a plan: show, explain, diff, report, emit. Each takes a saved plan or plans a model at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import RenderableType

from autoshard.cli.command import FINE, NO, Command
from autoshard.cli.options import MODEL_HELP, add_plan_options, check_writable, named_layout, unwritable
from autoshard.cli.planning import plan_data
from autoshard.cli.screen import Screen
from autoshard.cli.sources import is_saved_plan, plan_of, saved_plan
from autoshard.errors import InputError
from autoshard.plan import Plan

_FORMATS = {".svg": "svg", ".png": "png", ".pdf": "pdf", ".gv": "", ".dot": ""}  # file name -> what dot makes; "": the text itself


def _source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PLAN", help=f"a saved plan.json; or a model to plan at once: {MODEL_HELP}")
    add_plan_options(parser)


# ---------------------------------------------------------------------------------------------------------------- show


def _show_options(parser: argparse.ArgumentParser) -> None:
    _source_options(parser)
    group = parser.add_argument_group("in place of the table")
    group.add_argument("--source", action="store_true", help="the text of the program that each rank runs (of all stages)")
    group.add_argument("--graph", metavar="FILE", help="draw the graph into a file: .svg, .png, .pdf (these need Graphviz), .gv")
    group.add_argument(
        "--level", choices=("modules", "layer", "ops"), default="modules", help="how much the graph shows (default: modules)"
    )
    group.add_argument("--memory", action="store_true", help="predicted bytes of a rank over a training step with AdamW")


def run_show(asked: argparse.Namespace, screen: Screen) -> int:
    """The table of a plan, its program, its picture or its memory."""
    if asked.graph:
        _check_picture(Path(asked.graph))
    plan = plan_of(asked, screen)
    data = plan_data(plan)
    shown: list[RenderableType] = []
    if asked.source:
        data["source"] = plan.program.source
        shown.append(plan.program.source)
    if asked.memory:
        with screen.working("predict memory"):
            memory = plan.memory("adamw" if plan.program.is_training else None)
        data["memory"] = {"peak_bytes": memory.peak_bytes, "reserved_bytes": memory.reserved_bytes, "at_peak": memory.at_peak}
        data["memory"] |= {"stage_rank": memory.stage_rank} if memory.stage_rank is not None else {}
        shown.append(memory.table())
    if asked.graph:
        with screen.working("draw the graph"):
            _draw(plan, Path(asked.graph), asked.level)
        data["graph"] = asked.graph
        shown.append(f"drawn as {asked.graph}")
    screen.answer(data, *(shown or [plan.table()]))
    return FINE


def _check_picture(path: Path) -> None:
    """Raise InputError where a picture could not be made."""
    if path.suffix not in _FORMATS:
        raise InputError(f"--graph {path}: what kind of picture is that? name a file that ends in {', '.join(_FORMATS)}")
    check_writable(path, "graph.svg")


def _draw(plan: Plan, path: Path, level: str) -> None:
    graph, kind = plan.graph(level), _FORMATS[path.suffix]
    try:
        path.write_bytes(graph.pipe(format=kind) if kind else graph.source.encode())
    except InputError as error:  # no dot
        raise InputError(
            f"drawing {path} takes Graphviz's program dot, which is not on PATH: apt-get install graphviz, or write "
            f"{path.with_suffix('.gv')}, which needs none"
        ) from error
    except OSError as error:
        raise unwritable(path, error) from error


# ------------------------------------------------------------------------------------------------------------- explain


def _explain_options(parser: argparse.ArgumentParser) -> None:
    _source_options(parser)
    parser.add_argument(
        "--why", type=named_layout, metavar="NAME=LAYOUT", help="instead: what it would cost if NAME lay so (a model, no saved plan)"
    )


def run_explain(asked: argparse.Namespace, screen: Screen) -> int:
    """Where time and memory go, in words; or what another layout would cost."""
    if asked.why and is_saved_plan(asked.model):
        raise InputError("--why solves the plan again, which takes the model: autoshard explain MODEL --mesh ... --why NAME=LAYOUT")
    plan = plan_of(asked, screen)
    if not asked.why:
        explanation = plan.explain()
        screen.answer(explanation, explanation)
        return FINE
    with screen.working("solve again"):
        answer = plan.why(*asked.why)
    screen.answer(answer, answer.text)
    return FINE


# ---------------------------------------------------------------------------------------------------------------- diff


def _diff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="BEFORE", help="a saved plan")
    parser.add_argument("after", metavar="AFTER", help="another")
    parser.add_argument("--exit-code", action="store_true", help="exit status 1 where any layout or the mesh differs")


def run_diff(asked: argparse.Namespace, screen: Screen) -> int:
    """What changed between two plans."""
    found = saved_plan(asked.before, screen).diff(saved_plan(asked.after, screen))
    screen.answer({"is_empty": found.is_empty, **vars(found)}, found)
    return NO if asked.exit_code and not found.is_empty else FINE


# -------------------------------------------------------------------------------------------------------- report, emit


def _report_options(parser: argparse.ArgumentParser) -> None:
    _source_options(parser)
    parser.add_argument("--out", metavar="FILE", default="report.html", help="where to write it (default: report.html)")


def run_report(asked: argparse.Namespace, screen: Screen) -> int:
    """Write a report of a plan."""
    check_writable(asked.out, "report.html")
    plan = plan_of(asked, screen)
    try:
        with screen.working("write the report"):
            path = plan.report(asked.out)
    except OSError as error:
        raise unwritable(asked.out, error) from error
    screen.answer({"report": path}, f"written as {path}")
    return FINE


def _emit_options(parser: argparse.ArgumentParser) -> None:
    _source_options(parser)
    parser.add_argument("folder", metavar="FOLDER", help="made if it is not there; files of the same names are replaced")


def run_emit(asked: argparse.Namespace, screen: Screen) -> int:
    """Write the folder that torchrun runs."""
    folder = Path(asked.folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write {folder}: {existing} is a file; choose another folder")
    plan = plan_of(asked, screen)
    try:
        plan.emit(folder)
    except OSError as error:
        raise unwritable(folder, error) from error
    command = f"torchrun --standalone --nproc-per-node {plan.program.whole_mesh.size} {folder / 'run.py'}"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file() and path.suffix in (".py", ".json"))
    screen.answer({"folder": folder, "files": files, "run": command}, f"written to {folder}; run it: {command}")
    return FINE


COMMANDS = (
    Command(
        "show",
        "the table of a plan, its program, its picture, its memory",
        "Show a plan: its parameters with their layouts and what a step sends; with --source the program, with --graph a picture.",
        (
            "autoshard show plan.json",
            "autoshard show plan.json --source | less",
            "autoshard show plan.json --graph plan.svg",
            "autoshard show train.py:build --mesh dp=2,tp=4 --hardware h100 --memory",
        ),
        _show_options,
        run_show,
    ),
    Command(
        "explain",
        "where time and memory of a plan go, and why",
        "Explain a plan on one screen: time and memory by module, the largest communications with their reasons, what fell back.",
        (
            "autoshard explain plan.json",
            "autoshard explain train.py:build --mesh dp=2,tp=4 --why 'head.weight=S(1)@tp'",
        ),
        _explain_options,
        run_explain,
    ),
    Command(
        "diff",
        "what changed between two saved plans",
        "Compare two saved plans: layouts, collectives, predicted step and memory. Meshes and models may differ.",
        ("autoshard diff before.json after.json", "autoshard diff before.json after.json --exit-code --quiet"),
        _diff_options,
        run_diff,
    ),
    Command(
        "report",
        "write a plan as one page to read",
        "Write a report of a plan as one file.",
        ("autoshard report plan.json --out plan.html",),
        _report_options,
        run_report,
    ),
    Command(
        "emit",
        "write the program of a plan as a folder that torchrun runs",
        "Write a folder with the program, its runtime, a launcher and the plan; it needs torch, and no autoshard, to run.",
        ("autoshard emit plan.json program/", "torchrun --standalone --nproc-per-node 8 program/run.py"),
        _emit_options,
        run_emit,
    ),
)
