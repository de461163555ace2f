"""What the system says of the processor, without PyTorch."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")  # Linux


def name() -> str:
    """The processor as its maker calls it."""
    return _first("model name") or platform.processor() or platform.machine()


def flags() -> set[str]:
    """What it can do beyond the least, in Linux's words; empty elsewhere."""
    return set(_first("flags").split())


def _first(entry: str) -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(entry)), "")
