"""What all tests share: hypothesis profiles, one torch thread, golden files, the gpu marker, and what simulated axes send."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from autoshard.runtime import Collective
from autoshard.simulator import SimulatedAxis

GOLDEN = Path(__file__).parent / "golden"

# A failing case prints the blob that reproduces it. Slowness is no fault here: one case traces, plans and trains a model.
_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=100, **_COMMON)
settings.register_profile("full", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the texts under tests/golden/ anew instead of comparing with them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: `text` must be what tests/golden/<name> holds; --update-golden writes it there."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"there is no tests/golden/{name}: run pytest --update-golden, read what it wrote, and commit it"
        assert text == path.read_text(), f"differs from tests/golden/{name}; if that is wanted: pytest --update-golden, and read the diff"

    return compare


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every collective that moves data: its name and how many numbers each rank gives."""
    sent: list[tuple[str, int]] = []
    run, maximum = SimulatedAxis.run, SimulatedAxis.maximum

    def counting_run(self: SimulatedAxis, collective: Collective, values: Sequence[Tensor]) -> list[Tensor]:
        if collective.name != "identity":
            sent.append((collective.name, values[0].numel()))
        return run(self, collective, values)

    def counting_maximum(self: SimulatedAxis, x: object) -> object:
        sent.append(("maximum", x.values[0].numel()))  # type: ignore[attr-defined]
        return maximum(self, x)  # type: ignore[arg-type]

    monkeypatch.setattr(SimulatedAxis, "run", counting_run)
    monkeypatch.setattr(SimulatedAxis, "maximum", counting_maximum)
    return sent
