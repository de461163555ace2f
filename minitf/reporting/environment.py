"""environment.json: hardware, versions and command of a run, enough to repeat it."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from minitf.backends import source
from minitf.system.files import write_whole
from minitf.system.hardware import Hardware, describe_processor

PACKAGES = ("minitf", "torch", "numpy", "datasets", "tokenizers", "hydra-core", "tensorboard", "safetensors")


def record_environment(run_dir: Path, hardware: Hardware, setup: Mapping[str, str]) -> None:
    """Write environment.json; `setup` describes how the run computes, by topic. Raises OSError."""
    environment = {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": describe_processor(),
        "device": torch.cuda.get_device_name() if hardware.device.type == "cuda" else hardware.device.type,
        "matmul_flops": round(hardware.peak_flops),
        "setup": dict(setup),
        "packages": {package: _version(package) for package in PACKAGES},
        "git_commit": _git_commit(),
        "core": source.core_hash(),
        "edited": source.edited(source.CORE),
    }
    write_whole(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _git_commit() -> str | None:
    """The commit of the source tree; None for an installed wheel, or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
