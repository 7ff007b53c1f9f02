"""What this machine has free."""

from __future__ import annotations

import os
import re
from pathlib import Path


def available_memory_bytes() -> int:
    """Main memory that new work can take without swapping, in bytes."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
