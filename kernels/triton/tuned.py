"""Launch configurations that a measurement found faster than the table of `configs`, by device.

Written by `python -m benchmarks.tune`; `pick()` looks here first. No row: nothing was measured that beat the table.
"""

from __future__ import annotations

from typing import Any

ROWS: tuple[dict[str, Any], ...] = ()
