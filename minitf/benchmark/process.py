"""Measurements in a fresh Python process, unaffected by anything compiled, cached or allocated before."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitf.errors import MinitfError

ROOT = Path(__file__).parents[2]  # goes into PYTHONPATH, so that children import this minitf


def in_child(
    function: str, arguments: Mapping[str, Any], environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> dict[str, Any]:
    """The result of `module:function` of this package for these arguments, called in a fresh process.

    Adds `wall_s`, the lifetime of the process in seconds, and `peak_mb`, its peak resident memory. MinitfError with the
    last line of the process's output if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="minitf-benchmark-") as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "minitf.benchmark.process", function, json.dumps(arguments), str(answer)]
        wall_s, _ = run_command_line(command, environment or {}, cwd or Path(scratch))
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return {**result, "wall_s": wall_s}


def run_command_line(command: list[str], environment: Mapping[str, str], cwd: Path) -> tuple[float, str]:
    """The seconds and the output of a command; MinitfError with its last line if it fails."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **quiet, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    wall_s = time.perf_counter() - start
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise MinitfError(f"{' '.join(command[:4])} ...: {lines[-1]}")
    return wall_s, done.stdout


def memory_mb(entry: str) -> float:
    """An entry of /proc/self/status in MB: VmHWM is the peak resident memory, VmRSS the current one.

    Without /proc, `getrusage`, which also counts the peak of the parent that a child was forked from.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e6 if sys.platform == "darwin" else 1e3)
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith(entry))
    return int(kilobytes) * 1024 / 1e6


def _answer(function: str, arguments: str, answer: str) -> None:
    module, name = function.split(":")
    result = getattr(importlib.import_module(f"minitf.benchmark.{module}"), name)(**json.loads(arguments))
    Path(answer).write_text(json.dumps({**result, "peak_mb": memory_mb("VmHWM")}), encoding="utf-8")


if __name__ == "__main__":
    _answer(*sys.argv[1:])
