"""What the code runs on, and how long and how large a piece of work was there."""

import os
import platform
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """The machine in plain JSON types, to stand beside every measured number.

    Args:
        device: also name this device.

    Returns:
        ``platform, cpu, cpu_capability, logical_cores, usable_cores, torch_threads, ram_bytes,
        python, torch``, and with a device ``device, device_name``. None where unknown.
    """
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "ram_bytes": _ram_bytes(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if device is not None:
        facts |= {"device": str(device), "device_name": device_name(device)}
    return facts


def device_name(device: torch.device) -> str:
    """The device's product name where its backend tells one, else the CPU's or its type."""
    if device.type == "cpu":
        return _cpu_name() or "cpu"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return get_name(device) if get_name else device.type


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on `device` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory since the start, or since :func:`reset_peak_memory`.

    On a CPU the resident memory of the whole process; elsewhere what torch allocated on the
    device. None where the platform does not tell.
    """
    if device.type != "cpu":
        peak = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return peak(device) if peak else None
    # Not resource.getrusage first: there a child starts with the peak of the process it came from.
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024


def reset_peak_memory(device: torch.device) -> bool:
    """Let :func:`peak_memory_bytes` start anew from what is in use now.

    Returns:
        False where the platform cannot; the peak then still covers the whole run.
    """
    if device.type != "cpu":
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset:
            reset(device)
        return reset is not None
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory that `device` has left for this process; None where the platform does not tell.

    On a CPU what programs can get without swapping, or what a container leaves of it.
    """
    if device.type != "cpu":
        info = getattr(torch.get_device_module(device), "mem_get_info", None)
        return info(device)[0] if info else None
    if not _MEMORY_INFO.exists():
        return _ram_bytes()
    values = dict(line.split(":") for line in _MEMORY_INFO.read_text().splitlines())
    available = int(values["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = ((_CGROUP / f"memory.{word}").read_text() for word in ("max", "current"))
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Files that the system keeps in memory make way.
        return min(available, int(limit) - int(used) + int(kept["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return available


class Timer:
    """Wall-clock time of a block, which includes the device's unfinished work.

    ``with Timer(device) as timer: ...``; then ``timer.elapsed_s``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elapsed_s = 0.0
        self._start_s = 0.0

    def __enter__(self) -> "Timer":
        synchronize(self.device)
        self._start_s = time.perf_counter()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            synchronize(self.device)
        self.elapsed_s = time.perf_counter() - self._start_s


def _cpu_name() -> str | None:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or None


def _usable_cores() -> int | None:
    """Cores that this process may run on, which a container can make fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
