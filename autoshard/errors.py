"""The one family of errors that autoshard raises for a caller's mistake or a model it cannot partition."""

from autoshard.runtime.errors import AutoshardError as AutoshardError
from autoshard.runtime.errors import PlanError as PlanError
from autoshard.runtime.errors import StageError as StageError


class MeshError(AutoshardError):
    """A mesh without axis names, with a size that disagrees with the world, or with an axis that is not supported."""


class ConstraintError(AutoshardError):
    """Constraints that contradict each other, match nothing, or that no sound layout satisfies."""


class TraceError(AutoshardError):
    """The model could not be traced, or tracing would lose part of what it computes."""


class RuleError(AutoshardError):
    """An op rule that does not parse or does not fit the op it is registered for."""


class PlacementError(AutoshardError):
    """A program whose layouts do not follow from the op rules and the conversion table."""


class InputError(AutoshardError):
    """Arguments that do not fit the plan: wrong structure, indivisible batch, different values on different ranks."""


class BudgetError(AutoshardError):
    """No plan fits the memory budget."""


class HardwareError(AutoshardError):
    """Hardware that is unknown or described by impossible numbers, or a measured profile that cannot be used."""
