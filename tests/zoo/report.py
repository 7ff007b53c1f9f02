"""Runs the whole zoo, one process per model, and writes docs/coverage.md.

    PYTHONPATH=tests python -m zoo.report [--jobs 2] [--minutes 60] [--only NAME ...]

Results lie in out/zoo, one file per model and mesh, and are kept while neither the library, the zoo nor the installed packages
change: a run that was stopped goes on where it was. With --keep they are kept whatever has changed, and the page says of which
state each is. What takes too long, or was not begun in time, is reported as such.
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
import multiprocessing
import platform
import re
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils.flop_counter import FlopCounterMode

from autoshard.candidates import bound_rule
from autoshard.equations import strategies
from autoshard.program import Program, call_of, facts, op_name, producer
from zoo.comparison import KINDS, MESHES, Subject, describe
from zoo.models import ENTRIES, REFUSED, Entry, missing

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "out" / "zoo", ROOT / "docs" / "coverage.md"
MODELS_A_POOL = 12  # so that memory does not grow; max_tasks_per_child may hang (python/cpython#115634)


@cache
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
        try:
            node.target(*args, **kwargs)  # type: ignore[operator]
        except DataDependentOutputException:  # a mixture of experts: the sizes of its products depend on the router
            rule, equation = bound_rule(node)
            call = call_of(node)
            return int(2 * rule.products(equation.sizes, (*call.inputs, *call.outputs))) if rule and equation else 0
    return counter.get_total_flops()


def run_one(entry: Entry, meshes: Sequence[str]) -> list[dict[str, Any]]:
    """Every plan on every mesh, in every mode of one model, as data: one record per mesh."""
    records: list[dict[str, Any]] = [{"library": library_hash(), "mesh": mesh, "outcomes": [], "refused": {}} for mesh in meshes]
    for mode in entry.modes:
        try:
            subject = Subject.of(entry, mode)
            measured = dict(zip(("ops", "flops", "splittable", "without"), flops(subject.program), strict=True))
        except Exception as error:
            for record in records:
                record["refused"][mode] = describe(error)
            continue
        for record in records:
            record.update({"tolerance": subject.tolerance, **measured} if "ops" not in record else {})
            record["outcomes"] += [dataclasses.asdict(subject.check(record["mesh"], kind)) for kind in KINDS]
    return records


def prepare_worker() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)


def run_and_keep(name: str, meshes: Sequence[str]) -> None:
    """run_one in a worker; its records are left in files."""
    for mesh, record in zip(meshes, run_one({**ENTRIES, **REFUSED}[name], meshes), strict=True):
        path_of(name, mesh).write_text(json.dumps(record).replace(f"{ROOT}/", ""))  # results may be kept elsewhere than they were made


def keep_failure(name: str, meshes: Sequence[str], why: str) -> None:
    for mesh in meshes:
        record = {"library": library_hash(), "mesh": mesh, "outcomes": [], "refused": {"both modes": why}}
        path_of(name, mesh).write_text(json.dumps(record))


def path_of(name: str, mesh: str) -> Path:
    return RESULTS / f"{name}@{mesh.replace(',', '_')}.json"


def known_result(name: str, mesh: str, of_any_state: bool = False) -> dict[str, Any] | None:
    if not path_of(name, mesh).exists():
        return None
    record = json.loads(path_of(name, mesh).read_text())
    return record if of_any_state or record["library"] == library_hash() else None


def failures_of(records: list[dict[str, Any]]) -> list[str]:
    """One line for everything that failed; the same failure of several meshes once."""
    refused = [f"{mode}: {why}" for record in records for mode, why in record["refused"].items()]
    outcomes = [o for record in records for o in record["outcomes"] if o["status"] in ("different", "error")]
    return list(dict.fromkeys([*refused, *(f"{o['mode']} {o['mesh']} {o['kind']}: {o['status']}: {o['detail']}" for o in outcomes)]))


def result_of(records: list[dict[str, Any]], entry: Entry) -> str:
    """What the table says; anything that failed comes first."""
    if entry.name in REFUSED:
        reasons = [why for record in records for why in record["refused"].values()]
        is_refused = bool(reasons) and all(entry.refusal in why for why in reasons) and not any(r["outcomes"] for r in records)
        return f"refused, as it must be: {reasons[0]}" if is_refused else f"**FAILED**: not refused as expected: {reasons}"
    parts = [counts_of(record) for record in records] + [f"`{m}` not run" for m in MESHES if m not in {r["mesh"] for r in records}]
    text, failures = "; ".join(parts), failures_of(records)
    more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
    return f"**FAILED**: {'; '.join(failures[:3])}{more}. {text}" if failures else text


def counts_of(record: dict[str, Any]) -> str:
    outcomes = record["outcomes"]
    counted = Counter(o["status"] for o in outcomes)
    idle = sum(o["status"] == "equal" and not o["split"] for o in outcomes)
    text = f"`{record['mesh']}` {counted['equal']} of {len(outcomes)} equal"
    text += f" to {record['tolerance']:.0e}" if "tolerance" in record else ""
    text += f", {counted['not applicable']} not applicable" if counted["not applicable"] else ""
    return text + (f" ({idle} of them split no op)" if idle else "")


def page(found: dict[str, list[dict[str, Any]]]) -> str:
    entries = {name: entry for name, entry in {**ENTRIES, **REFUSED}.items() if found.get(name)}
    tried = [name for name in entries if name in ENTRIES]
    failed = [name for name in tried if failures_of(found[name])]
    whole = [name for name in tried if name not in failed and len(found[name]) == len(MESHES)]
    partly = [name for name in tried if name not in failed and name not in whole]
    skipped = [
        f"{name} ({missing(entry) + ' is missing' if missing(entry) else 'no time'})"
        for name, entry in ENTRIES.items()
        if name not in entries
    ]
    lines = [
        "# Coverage", "",
        f"Made by `tests/zoo/report.py` on {datetime.date.today()}, with {', '.join(f'{k} {v}' for k, v in versions().items())};",
        f"on the CPU, of library state {_states(found)}.", "",
        f"Of {len(ENTRIES)} models that should be partitioned, {len(whole)} compute under every plan, on all meshes, what the eager model",
        f"computes on one device; {len(partly)} more do on the meshes that were run; "
        + (f"**{len(failed)} fail**, and say how below;" if failed else "none fails;"),
        f"{len(skipped)} were not run. {len(REFUSED)} more must be refused.", "",
        "Every model is small and has random weights. Compared on all simulated ranks, in train and eval mode, on the",
        f"meshes {' and '.join(f'`{m}`' for m in MESHES)}, under the plans {', '.join(KINDS)}: results, all gradients (of parameters",
        "and of inputs that ask for one), buffers. Errors are relative to the largest value of each tensor; the tolerance is 1e-9 where",
        "everything is computed in float64, wider where the model itself computes in less. Random ops are switched off on both sides.",
        "A plan that splits no op computes everything on every rank, and its being equal says little: such plans are counted.", "",
        "Ops are traced nodes after normalisation that are computed at every step. FLOPs are torch's count of contractions,",
        "convolutions and attention; custom ops count as nothing. An op can be split when it has a row and some strategy splits a factor",
        "on an axis of 2. Fallbacks are ops without a row, which every rank computes whole.", "",
        *([f"Not run: {', '.join(skipped)}.", ""] if skipped else []),
        "| model | family | ops | FLOPs that can be split | fallbacks | result |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, entry in entries.items():
        record = next((r for r in found[name] if "ops" in r), found[name][0])
        share = f"{record['splittable'] / record['flops']:.0%}" if record.get("flops") else "-"
        without = ", ".join(f"{op.removeprefix('aten.')} {count}" for op, count in sorted(record.get("without", {}).items())) or "none"
        cells = (name, entry.family, str(record.get("ops", "-")), share, without if "ops" in record else "-", result_of(found[name], entry))
        lines.append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _states(found: dict[str, list[dict[str, Any]]]) -> str:
    """Hashes of the library that models were run with, the one of most models first; of the others their models."""
    models: dict[str, list[str]] = {}
    for name, records in found.items():
        for state in dict.fromkeys(record["library"] for record in records):
            models.setdefault(state, []).append(name)
    first, *rest = sorted(models, key=lambda state: -len(models[state]))
    return "; ".join([f"`{first}`", *(f"`{state}` for {', '.join(models[state])}" for state in rest)])


def _plain(text: str) -> str:
    """A cell of a table: without bars, and with file names from the package's folder on, and no addresses."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return re.sub(r"/\S*/site-packages/", "", text).replace("|", "/").replace("\n", " ")


def run_some(names: Sequence[str], waiting: dict[str, list[str]], jobs: int, until: float, keep: bool) -> None:
    """Run `waiting` in processes of their own, and say how each of `names` did."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, prepare_worker) as pool:
        began = {name: pool.submit(run_and_keep, name, meshes) for name, meshes in waiting.items()}
        for name in names:
            if name in began:
                try:
                    began[name].result(max(1.0, until - time.monotonic()))
                except TimeoutError:
                    pool.shutdown(wait=False, cancel_futures=True)
                    return
                except Exception as error:
                    keep_failure(name, waiting[name], f"the run ended with {type(error).__name__}: {error}")
            records = [record for mesh in MESHES if (record := known_result(name, mesh, keep)) is not None]
            print(f"{name}: {result_of(records, {**ENTRIES, **REFUSED}[name])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*ENTRIES, *REFUSED])
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing after this time")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep results of other states of the library")
    given, everything = parser.parse_args(), {**ENTRIES, **REFUSED}
    RESULTS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    names, until = [name for name in given.only if not missing(everything[name])], time.monotonic() + 60 * given.minutes
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    def missing_meshes(name: str) -> list[str]:
        return [mesh for mesh in (MESHES if name in ENTRIES else MESHES[:1]) if known_result(name, mesh, given.keep) is None]

    for start in range(0, len(names), MODELS_A_POOL):
        some = names[start : start + MODELS_A_POOL]
        run_some(some, {name: meshes for name in some if (meshes := missing_meshes(name))}, given.jobs, until, given.keep)
        for name in some:
            found[name] = [record for mesh in MESHES if (record := known_result(name, mesh, given.keep)) is not None]
    PAGE.write_text(page(found))
    failing = [name for name in names if name in ENTRIES and failures_of(found[name])]
    failing += [name for name in names if name in REFUSED and found[name] and result_of(found[name], everything[name]).startswith("**")]
    raise SystemExit(f"{len(failing)} models fail: {', '.join(failing)}" if failing else 0)


if __name__ == "__main__":
    main()
