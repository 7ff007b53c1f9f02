"""autoshard: a compiler-style graph partitioner for PyTorch."""

from autoshard.api import Options, compile, plan, simulate, verify
from autoshard.checkpoint import checkpointable
from autoshard.errors import AutoshardError
from autoshard.hardware import Device, Hardware, Link
from autoshard.mesh import MeshSpec
from autoshard.mesh_search import search
from autoshard.op_coverage import coverage
from autoshard.pipeline import Pipelining
from autoshard.plan import Plan
from autoshard.profile_file import Profile
from autoshard.profile_measuring import profile
from autoshard.profile_plan import measure_ops
from autoshard.rules import register_rule

__version__ = "0.1.0"
__all__ = [
    "AutoshardError",
    "Device",
    "Hardware",
    "Link",
    "MeshSpec",
    "Options",
    "Pipelining",
    "Plan",
    "Profile",
    "checkpointable",
    "compile",
    "coverage",
    "measure_ops",
    "plan",
    "profile",
    "register_rule",
    "search",
    "simulate",
    "verify",
]
