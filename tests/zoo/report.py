"""Runs the whole zoo, one process per model, and writes docs/coverage.md.

    PYTHONPATH=tests python -m zoo.report [--jobs 2] [--kinds fsdp,ddp] [--only NAME ...]

Results lie in out/zoo, one file per model, and are kept while neither the library nor the zoo changes: a run that was
stopped goes on where it was. A model that takes too long is reported as such.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from autoshard.candidates import bound_rule
from autoshard.equations import strategies
from autoshard.program import Program, facts, op_name, producer
from zoo.comparison import KINDS, MESHES, Subject, describe
from zoo.models import ENTRIES, REFUSED, Entry, missing

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "out" / "zoo", ROOT / "docs" / "coverage.md"
LIMIT_S = 600


def library_hash() -> str:
    """Of everything that a result depends on, the installed packages too."""
    digest = hashlib.sha256(repr(sorted(versions().items())).encode())
    for path in sorted([*ROOT.glob("autoshard/**/*.py"), *ROOT.glob("passes/*.py"), *ROOT.glob("tests/zoo/**/*.py")]):
        if path.name not in ("report.py", "test_zoo.py"):
            digest.update(path.read_bytes())
    digest.update((ROOT / "tests" / "training_oracle.py").read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "timm", "diffusers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def flops(program: Program) -> tuple[int, int, int, dict[str, int]]:
    """Ops, FLOPs of all of them and of those that some rule can split on an axis of 2, and uses of ops without a row."""
    total = splittable = 0
    without: Counter[str] = Counter()
    ops = [node for node in program.nodes("op") if not facts(node).is_constant]
    for node in ops:
        equation = bound_rule(node)[1]
        if equation is None:
            without[op_name(node)] += 1
        count = _flops_of(node)
        total += count
        splittable += count if equation is not None and any(s.factor for s in strategies(equation, 2)) else 0
    return len(ops), total, splittable, dict(without)


def _flops_of(node: torch.fx.Node) -> int:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:

        def fake(operand: torch.fx.Node) -> torch.Tensor:
            source, index = producer(operand)
            value = facts(source).values[index]
            return torch.empty(value.shape, dtype=value.dtype)

        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), fake)
        node.target(*args, **kwargs)  # type: ignore[operator]
    return counter.get_total_flops()


def run_one(entry: Entry, kinds: list[str]) -> dict[str, Any]:
    """Every plan of every mode of one model, as data."""
    record: dict[str, Any] = {"name": entry.name, "library": library_hash(), "kinds": kinds, "outcomes": [], "refused": {}}
    for mode in entry.modes:
        try:
            subject = Subject.of(entry, mode)
        except Exception as error:
            record["refused"][mode] = describe(error)
            continue
        if "ops" not in record:
            record |= dict(zip(("ops", "flops", "splittable", "without"), flops(subject.program), strict=True))
            record["tolerance"] = subject.tolerance
        record["outcomes"] += [dataclasses.asdict(subject.check(mesh, kind)) for mesh in MESHES for kind in kinds]
    return record


def run_apart(name: str, kinds: list[str]) -> dict[str, Any]:
    """run_one in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "zoo.report", "--one", name, "--kinds", ",".join(kinds)]
    path = RESULTS / f"{name}.json"
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=LIMIT_S, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode == 0:
            return json.loads(path.read_text())
        why = f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"
    except subprocess.TimeoutExpired:
        why = f"took longer than {LIMIT_S} s"
    return {"name": name, "library": library_hash(), "kinds": kinds, "outcomes": [], "refused": {"both": why}}


def known_result(name: str, kinds: list[str]) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record["library"] == library_hash() and record["kinds"] == kinds else None


def result_of(record: dict[str, Any], entry: Entry) -> str:
    """What the table says; anything that failed comes first."""
    if entry.name in REFUSED:
        as_expected = record["refused"] and all(entry.refusal in why for why in record["refused"].values()) and not record["outcomes"]
        return f"refused, as it must be: {next(iter(record['refused'].values()))}" if as_expected else f"**FAILED**: {record['refused']}"
    failures = [f"{mode}: {why}" for mode, why in record["refused"].items()]
    failures += [f"{o['mode']} {o['mesh']} {o['kind']}: {o['status']}: {o['detail']}" for o in record["outcomes"] if o["status"] in ("different", "error")]
    counted = Counter(o["status"] for o in record["outcomes"])
    idle = sum(o["status"] == "equal" and not o["split"] for o in record["outcomes"])
    text = f"{counted['equal']} of {len(record['outcomes'])} plans equal"
    text += f" (tolerance {record['tolerance']:.0e})" if "tolerance" in record else ""
    text += f"; {counted['not applicable']} not applicable" if counted["not applicable"] else ""
    text += f"; {idle} of the equal ones split no op" if idle else ""
    return f"**FAILED**, {text}: {'; '.join(failures[:3])}{f'; and {len(failures) - 3} more' if len(failures) > 3 else ''}" if failures else text


def page(records: dict[str, dict[str, Any]], kinds: list[str]) -> str:
    entries = {name: entry for name, entry in {**ENTRIES, **REFUSED}.items() if name in records}
    passed = [n for n in entries if n in ENTRIES and not result_of(records[n], entries[n]).startswith("**")]
    tried = [n for n in entries if n in ENTRIES]
    skipped = sorted(n for n in ENTRIES if n not in records)
    lines = [
        "# Coverage", "",
        f"Made by `make zoo` on {datetime.date.today()}, with {', '.join(f'{k} {v}' for k, v in versions().items())}; CPU, library state",
        f"`{library_hash()}`.", "",
        f"**{len(passed)} of {len(tried)} models** compute under every plan tried what the eager model computes on one device; {len(tried) - len(passed)} fail, and",
        "say how below. Every model is small and has random weights. Compared on all simulated ranks, in train and eval mode, on the",
        f"meshes {' and '.join(f'`{m}`' for m in MESHES)}, under the plans {', '.join(kinds)}: results, all gradients (parameters and inputs), buffers. Errors are",
        "relative to the largest value of each tensor. Random ops are switched off on both sides.", "",
        "Ops are traced nodes after normalisation that are computed at every step. FLOPs are torch's count of contractions,",
        "convolutions and attention; custom ops count as nothing. An op can be split when it has a row and some strategy splits a factor on an axis of 2.",
        "Fallbacks are ops without a row, which every rank computes whole.", "",
        *([f"Not run: {', '.join(skipped)}.", ""] if skipped else []),
        "| model | family | ops | FLOPs that can be split | fallbacks | result |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, entry in entries.items():
        record = records[name]
        share = f"{record['splittable'] / record['flops']:.0%}" if record.get("flops") else "-"
        without = ", ".join(f"{op.removeprefix('aten.')} {count}" for op, count in sorted(record.get("without", {}).items())) or "none"
        cells = (name, entry.family, str(record.get("ops", "-")), share, without if "ops" in record else "-", result_of(record, entry))
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help="run this model here")
    parser.add_argument("--only", nargs="*", default=[*ENTRIES, *REFUSED])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    kinds = given.kinds.split(",")
    RESULTS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    everything = {**ENTRIES, **REFUSED}
    if given.one:
        warnings.filterwarnings("ignore")
        logging.disable(logging.CRITICAL)
        (RESULTS / f"{given.one}.json").write_text(json.dumps(run_one(everything[given.one], kinds)))
        return
    names = [name for name in given.only if not missing(everything[name])]
    records: dict[str, dict[str, Any]] = {}
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        tasks = {pool.submit(lambda n: known_result(n, kinds) or run_apart(n, kinds), name): name for name in names}
        for task in concurrent.futures.as_completed(tasks):
            record = records[tasks[task]] = task.result()
            print(f"{tasks[task]}: {result_of(record, everything[tasks[task]])}", flush=True)
    PAGE.write_text(page({name: records[name] for name in names}, kinds))
    failing = [name for name in names if result_of(records[name], everything[name]).startswith("**")]
    raise SystemExit(f"{len(failing)} models fail: {', '.join(failing)}" if failing else 0)


if __name__ == "__main__":
    main()
