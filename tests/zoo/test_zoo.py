"""Every model of the zoo computes under every plan what the eager model computes on one device.

A few models run with every test run; `make zoo` runs all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autoshard import runtime
from autoshard.errors import TraceError
from zoo.comparison import KINDS, MESHES, Subject, describe
from zoo.models import ENTRIES, REFUSED, Entry, build, missing

# Libraries of models warn of their own plans; what they warn of is not tested here.
pytestmark = pytest.mark.filterwarnings("ignore")


# Few, fast and unlike each other; nothing that needs more than the test dependencies.
IN_CI = (
    *("mlp", "nanogpt", "convnet_batchnorm", "two_tower", "mlp_mixer", "moe_dense"),
    *("unet_plain", "recommender", "linear_attention", "bert", "vit", "t5_decoder_ids"),
)


def _cases() -> list:
    marks = (pytest.mark.slow, pytest.mark.zoo)
    return [
        pytest.param(entry, mode, marks=() if entry.name in IN_CI else marks, id=f"{entry.name}-{mode}")
        for entry in ENTRIES.values()
        for mode in entry.modes
    ]


def _refused() -> list:
    marks = (pytest.mark.slow, pytest.mark.zoo)
    return [pytest.param(entry, marks=marks if entry.package else ()) for entry in REFUSED.values()]


def _skip_without_package(entry: Entry) -> None:
    if missing(entry):
        pytest.skip(f"{missing(entry)} is not installed; make zoo installs it")


@pytest.mark.parametrize(("entry", "mode"), _cases())
def test_every_plan_computes_what_one_device_computes(entry: Entry, mode: str, record_property: Callable[[str, object], None]) -> None:
    _skip_without_package(entry)
    subject = Subject.of(entry, mode)
    found = [subject.check(mesh, kind) for mesh in MESHES for kind in KINDS]
    for outcome in found:
        record_property(f"{outcome.mesh} {outcome.kind}", f"{outcome.status}, {outcome.split:.0%} of ops split; {outcome.detail}")
    failed = [f"{o.mesh} {o.kind}: {o.status}: {o.detail}" for o in found if o.status in ("different", "error")]
    assert not failed, "\n".join(failed)
    assert any(o.split for o in found if o.status == "equal"), "no plan split any op: nothing is proved"


@pytest.mark.parametrize("entry", _refused(), ids=lambda entry: entry.name)
def test_what_cannot_be_traced_is_refused_with_one_error(entry: Entry) -> None:
    _skip_without_package(entry)
    for mode in entry.modes:
        with pytest.raises(TraceError) as caught:
            Subject.of(entry, mode)
        assert entry.refusal in str(caught.value)
        assert "Traceback" not in str(caught.value)
        assert ".py:" in str(caught.value), "the user's line is missing"


def test_the_comparison_notices_a_conversion_that_does_something_else() -> None:
    """The all-reduces of DDP's gradients left out, one by one; each must be seen."""
    subject = Subject.of(ENTRIES["nanogpt"], "eval")
    unseen, count = [], len([n for n in subject.plan("a=2", "ddp").nodes("conversion") if n.target is runtime.vary])
    assert count > 10
    for k in range(count):
        program = subject.plan("a=2", "ddp")
        node = [n for n in program.nodes("conversion") if n.target is runtime.vary][k]
        node.target = runtime.unvary
        simulation = _run_graph(subject, program)
        if max(subject.differences(simulation, program).values()) <= subject.tolerance:
            unseen.append(node.name)
    assert not unseen


def _run_graph(subject, program):
    from autoshard.simulator import run_program

    held = {name: tensor.clone() for name, tensor in subject.held.items()}
    simulation = run_program(program, held, subject.arguments, is_random=False)
    simulation.backward(subject.expected.cotangents)
    return simulation


def test_training_changes_buffers_and_the_comparison_reads_them() -> None:
    subject = Subject.of(ENTRIES["convnet_batchnorm"], "train")
    changed = [name for name, buffer in subject.expected.buffers.items() if not (buffer == subject.held[name]).all()]
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(changed)
    program = subject.plan("a=2", "ddp")
    simulation = subject.run(program)
    for value in simulation.leaves["1.running_mean"].values:
        value.copy_(subject.held["1.running_mean"])
    assert subject.differences(simulation, program)["buffer 1.running_mean"] > subject.tolerance


def test_models_are_the_same_at_every_build() -> None:
    for name in ("mlp", "nanogpt"):
        first, second = (dict(build(ENTRIES[name], "train")[0].named_parameters()) for _ in range(2))
        assert all((first[key] == second[key]).all() for key in first)
        assert not any((parameter == 0).all() for parameter in first.values())


def test_errors_are_described_in_one_line() -> None:
    assert describe(TraceError("first\n  second\n third")) == "TraceError: first | second | third"
