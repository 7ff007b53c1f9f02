"""The compiler: passes in order. Each is a frozen dataclass, valid program in, valid program out, one per file."""

from autoshard.passes.annotate_shardings import AnnotateShardings
from autoshard.passes.cut_stages import CutStages
from autoshard.passes.draw_whole import DrawWhole
from autoshard.passes.emit_programs import EmitPrograms
from autoshard.passes.fold_constants import FoldConstants
from autoshard.passes.insert_collectives import InsertCollectives
from autoshard.passes.localize_shapes import LocalizeShapes
from autoshard.passes.normalize_graph import NormalizeGraph
from autoshard.passes.overlap_collectives import OverlapCollectives
from autoshard.passes.split_microbatches import SplitMicrobatches
from autoshard.passes.trace_model import TraceModel

PASSES = (
    TraceModel,
    NormalizeGraph,
    DrawWhole,
    FoldConstants,
    SplitMicrobatches,
    AnnotateShardings,
    InsertCollectives,
    LocalizeShapes,
    CutStages,
    OverlapCollectives,
    EmitPrograms,
)

__all__ = ["PASSES", *(cls.__name__ for cls in PASSES)]
