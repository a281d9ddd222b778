"""How many threads OpenMP starts and how they wait: it reads that when torch is loaded, so it is chosen before.

Waiting threads spin for 30 ms by default; beside other work each spin takes a core from the thread that is waited for
(bench/LOG.md). What the user's environment says stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}  # some 30 us (libgomp), 1 ms (Intel's, LLVM's)
TRAINING = {**SPINS, "GOMP_SPINCOUNT": "500"}  # some 2 us: 6 % of a quiet nano step, half of one beside other work


def prepare(spins: Mapping[str, str] = SPINS) -> None:
    """Set what the environment leaves open; too late once torch is there."""
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in WAITS):
        os.environ.update(spins)
    quota = cpu_quota()
    if quota is not None and quota < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The CPUs that a container may use at a time, rounded up, which OpenMP does not ask for; None: all."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup v2, v1
        try:
            quota, period, *_ = " ".join((root / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        return None if quota in ("max", "-1") else max(1, -(-int(quota) // int(period)))
    return None
