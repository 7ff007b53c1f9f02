"""What emitted programs call: conversions between placements, lowered ops, seeded random ops. Imports torch alone.

The folder is copied beside emitted programs as `autoshard_runtime`. Each family of ops has a file of lowerings: functions that replace
an op where some of its factors are split, named by rows of autoshard.ops.
"""

from .attention import *  # noqa: F403
from .axes import Axis as Axis
from .axes import Collective as Collective
from .axes import Started as Started
from .axes import change_padding as change_padding
from .axes import cut as cut
from .axes import join as join
from .axes import lengthen as lengthen
from .axes import pad_cut as pad_cut
from .axes import position as position
from .axes import run as run
from .axes import trim_joined as trim_joined
from .branches import *  # noqa: F403
from .conversions import *  # noqa: F403
from .convolution import *  # noqa: F403
from .embedding import *  # noqa: F403
from .expert_dispatch import *  # noqa: F403
from .halo import *  # noqa: F403
from .indexing import *  # noqa: F403
from .loss import *  # noqa: F403
from .normalization import *  # noqa: F403
from .padding import *  # noqa: F403
from .program import Program as Program
from .program import mix as mix
from .program import seeded as seeded
from .recurrent import *  # noqa: F403
from .reduction import *  # noqa: F403
from .regather import *  # noqa: F403
from .selection import *  # noqa: F403
