"""The processor as the operating system describes it, without importing PyTorch."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")  # Linux


def name() -> str:
    """The processor's model name."""
    return _first("model name") or platform.processor() or platform.machine()


def flags() -> set[str]:
    """Instruction set extensions, by Linux's names; empty on other systems."""
    return set(_first("flags").split())


def _first(entry: str) -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(entry)), "")
