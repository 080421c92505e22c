"""What this machine lets a process have: arithmetic and cores.

Belongs here: reading that from the operating system, within a container's limits.
Does not belong here: GPUs, and what is done with any of it.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from embedder.engines import BF16, F32


def fast_precision() -> str:
    """bf16 where the CPU multiplies it in hardware, else f32: elsewhere bf16 is emulated and slower."""
    if platform.system() != "Linux":
        return F32
    flags = _cpu_flags(Path("/proc/cpuinfo"))
    return BF16 if flags & {"avx512_bf16", "amx_bf16"} else F32


def physical_cores() -> int:
    """Physical cores this process may use; hyper-threads share the units that multiply matrices."""
    if platform.system() != "Linux":
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {_core_of(cpu) for cpu in allowed}
    return max(1, min(len(cores), cpu_quota(Path("/sys/fs/cgroup/cpu.max")) or len(cores)))


def usable_cores() -> int:
    """Cores this process may use; hyper-threads count, for tokenising waits for memory more than for arithmetic."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, cpu_quota(Path("/sys/fs/cgroup/cpu.max")) or allowed))


def cpu_quota(path: Path) -> int | None:
    """Whole CPUs a container may use, None where nothing limits it."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))


def _core_of(cpu: int) -> tuple[str, str]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return "cpu", str(cpu)


def _cpu_flags(path: Path) -> set[str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
