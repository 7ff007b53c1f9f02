"""The op table against torch's own operator database: every call that a sample is traced to, if it has a row, is proved.

tests/golden/op_db.txt has a line per entry of the database: the aten ops of its samples that are proved, or why none is. An
entry that is neither run nor skipped, and a skip that is no longer needed, fail; --update-golden writes the file anew, and
`pytest tests/test_op_db.py -m slow -s` runs all samples and counts. Axes have the sizes that divide most dims of a sample.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from conftest import GOLDEN
from op_db import OpCall, calls, entries, samples
from torch import Tensor
from torch.nn import Buffer
from torch.utils import _pytree as pytree

from autoshard.errors import RuleError
from autoshard.mesh import MeshSpec
from autoshard.rules import RULES, rule_of
from autoshard.testing import OpCase, UnsoundRuleError, check_rule

FEW = 3  # samples of an entry that every run takes, from all over its list
LISTING = GOLDEN / "op_db.txt"
VERSION = torch.__version__.partition("+")[0]

# Calls of ops with a row that nothing can be proved of, by what check_rule or torch says.
EXCUSES = {
    "draws random numbers": "draws random numbers",
    "check_random_bounds handles only": "complex numbers",
    "SparseCPU": "sparse gradient",
    "not supported with sparse gradients": "sparse gradient",
}

pytestmark = pytest.mark.filterwarnings("ignore")


class Outcome(NamedTuple):
    """What came of the samples of one entry: counts, the ops proved, and why other calls were not."""

    counts: Counter[str]
    proved: list[str]
    reasons: list[str]
    failures: list[str]

    @property
    def line(self) -> str:
        if self.proved:
            return f"proved: {' '.join(self.proved)}"
        return f"skipped, {'; '.join(self.reasons) or 'its samples call no aten op'}"


def prove(name: str, most: int | None) -> Outcome:
    """Every distinct call of an entry's samples."""
    counts, found, reasons = Counter[str](), {}, Counter[str]()
    given = samples(entries()[name], most)
    if not given:
        reasons["no sample in float64, int64 or bool"] += 1
    for sample in given:
        counts["samples"] += 1
        try:
            found |= {str(call): call for call in calls(entries()[name], sample)}
        except Exception as error:  # data-dependent, sparse or for a GPU: torch.export would not take it either
            reasons[f"not traced: {type(error).__name__}"] += 1
    without = sorted({call.name.removeprefix("aten.") for call in found.values() if rule_of(call.name) is None})
    if without:
        reasons[f"no row: {' '.join(without)}"] += 1
    proved, failures = set[str](), []
    for number, call in enumerate(call for call in found.values() if rule_of(call.name) is not None):
        try:
            case = differentiable(call)
            for mesh in meshes(case, is_joint=number == 0 or most is None, most=None if most is None else 2):
                strategies = check_rule(case.op, *case.args, mesh=mesh, **case.kwargs)
                split = sum(any(strategy.factor for strategy in joint) for joint in strategies)
                counts.update({"proofs": 1, "strategies": len(strategies), "proofs in which nothing can be split": not split})
            proved.add(call.name.removeprefix("aten."))
        except UnsoundRuleError as error:
            failures.append(f"{call}: {error}")
        except Exception as error:  # a row must raise nothing else, whatever the call
            known = next((reason for text, reason in EXCUSES.items() if text in str(error)), None)
            excuse = known or ("row does not fit" if isinstance(error, RuleError) else None)  # such a call stays whole
            if excuse is None or not isinstance(error, (RuleError, RuntimeError)):
                failures.append(f"{call}: raises {type(error).__name__}: {error}")
            else:
                reasons[f"{excuse}: {call.name.removeprefix('aten.')}"] += 1
    counts.update({"calls": len(found), "calls with a row": len(found) - sum(rule_of(call.name) is None for call in found.values())})
    return Outcome(counts, sorted(proved), sorted(reasons), failures)


def differentiable(call: OpCall) -> OpCall:
    """The call with buffers in place of tensors that torch has no gradient for, or an infinite one."""
    arguments = [argument.name for argument in call.op._schema.arguments]
    for _ in range(len(arguments) + 1):
        try:
            case = OpCase(call.op, call.args, call.kwargs, MeshSpec.of("a=2"))
        except RuntimeError as error:
            refused = [k for k, name in enumerate(arguments) if f"'{name}'" in str(error)]
            if "not differentiable" not in str(error) and "derivative for" not in str(error):
                raise
            args = tuple(_still(x) if k in refused or not refused else x for k, x in enumerate(call.args))
            call = OpCall(call.op, args, call.kwargs if refused else _still(call.kwargs))
            continue
        if all(gradient is None or gradient.isfinite().all() for gradient in case.gradients):
            return call
        return OpCall(call.op, _still(call.args), _still(call.kwargs))  # the terms of an infinite gradient have no sum
    raise AssertionError(f"{call} cannot be made differentiable")


def _still(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: Buffer(x.detach()) if x.is_floating_point() else x, tree)


def meshes(call: OpCall, is_joint: bool, most: int | None) -> list[str]:
    """Axes of the sizes that divide most dims; and two axes jointly."""
    tensors = [*call.tensors(), *OpCase(call.op, call.args, call.kwargs, MeshSpec.of("a=2")).outputs]
    fitting = Counter(n for x in tensors for size in x.shape for n in (2, 3, 5, 7) if size and not size % n)
    sizes = sorted(fitting, key=lambda n: (-fitting[n], n))[:most] or [2]
    return [f"a={n}" for n in sizes] + ([f"a={sizes[0]},b={sizes[0]}"] if is_joint and sizes[0] < 4 else [])


def listed() -> dict[str, str]:
    lines = LISTING.read_text().splitlines() if LISTING.exists() else []
    return {name: text for name, tab, text in (line.partition("\t") for line in lines) if tab}


def listing(lines: dict[str, str]) -> str:
    """The text of the file: how many entries, and each."""
    kinds = Counter(text.partition(":")[0].partition(",")[0] + (text.partition(",")[2].partition(":")[0]) for text in lines.values())
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
    head = [f"# torch {VERSION}, {len(lines)} entries: {counted}", "# written by: pytest tests/test_op_db.py --update-golden", ""]
    return "\n".join([*head, *(f"{name}\t{text}" for name, text in sorted(lines.items()))]) + "\n"


def test_every_entry_is_listed(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-golden"):
        LISTING.write_text(listing({name: prove(name, FEW).line for name in entries()}))
    if f"# torch {VERSION}," not in LISTING.read_text():
        pytest.skip("the list is of another torch")
    assert listed().keys() == entries().keys()
    assert LISTING.read_text() == listing(listed()), "edited by hand: pytest tests/test_op_db.py --update-golden writes it"


@pytest.mark.parametrize("name", listed())
def test_entry(name: str) -> None:
    if name not in entries():
        pytest.skip("this torch has no such entry")
    outcome = prove(name, FEW)
    assert not outcome.failures, "\n".join(outcome.failures)
    if f"# torch {VERSION}," in LISTING.read_text():
        assert outcome.line == listed()[name], "if the table has changed: pytest tests/test_op_db.py --update-golden"


@pytest.mark.slow
def test_all_samples() -> None:
    """All samples, all sizes that divide, and two axes jointly for every call."""
    outcomes = {name: prove(name, None) for name in entries()}
    totals = sum((outcome.counts for outcome in outcomes.values()), Counter[str]())
    ops = {op for outcome in outcomes.values() for op in outcome.proved}
    why = Counter(reason.partition(":")[0] for outcome in outcomes.values() for reason in outcome.reasons)
    print(f"\n{len(ops)} ops of the table; {dict(totals)}\nentries with calls that are not proved: {dict(why)}")
    print(f"rows that no sample reaches: {' '.join(sorted(op for op in RULES if op.removeprefix('aten.') not in ops))}")
    assert not (failures := [text for outcome in outcomes.values() for text in outcome.failures]), "\n".join(failures)
