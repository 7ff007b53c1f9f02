"""The errors that running programs raise; the planner's others are in autoshard.errors."""


class AutoshardError(Exception):
    """Base of every error below; the text says what went wrong, where, and what would work."""


class PlanError(AutoshardError):
    """A plan that cannot be read, was altered, or belongs to another model or mesh."""


class StageError(AutoshardError):
    """A stage of a pipeline failed while it ran, on this rank or another, or a rank of the pipeline was lost."""
