"""The machine: matrix product speed, memory bandwidth, and the environment of a measurement."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from typing import Any

from minitf.benchmark.comparison import Row
from minitf.benchmark.library import ENVIRONMENT
from minitf.benchmark.process import ROOT, in_child
from minitf.benchmark.report import Report, Request
from minitf.system import cpuinfo

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
PACKAGES = ("minitf", "torch", "transformers", "accelerate", "numpy", "tokenizers")


def measure(device: str, sizes: list[int], budget_s: float) -> dict[str, Any]:
    """Best speeds: FLOP/s of square matrix products by dtype and size, bytes/s of a copy (reads plus writes)."""
    import torch

    def best_s(work: Callable[[], Any]) -> float:
        work()
        best, end = float("inf"), time.perf_counter() + budget_s
        while time.perf_counter() < end:
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    flops: dict[str, dict[str, float]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        flops[name] = {}
        for size in sizes:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = best_s(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
            flops[name][str(size)] = 2 * size**3 / seconds
            if seconds > 0.5:  # emulated: the next size would take eight times as long
                break
    num_bytes = (1 << 28) // (16 if budget_s < 0.1 else 1)  # larger than any cache
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / best_s(lambda: target.copy_(source))
    peaks = {name: max(speeds.values()) for name, speeds in flops.items()}
    return {"flops": flops, "peaks": peaks, "bytes_per_s": bandwidth, "threads": torch.get_num_threads()}


def peak(request: Request, device: str = "cpu", environment: dict[str, str] = ENVIRONMENT) -> dict[str, Any]:
    """`measure` in a child process with the environment of training."""
    sizes = [256] if request.quick else list(SIZES[device])
    arguments = {"device": device, "sizes": sizes, "budget_s": 0.02 if request.quick else 0.7}
    return in_child("machine:measure", arguments, environment)


def faster_precision() -> str:
    """The precision with the faster matrix products, by a short measurement."""
    result = in_child("machine:measure", {"device": "cpu", "sizes": [256], "budget_s": 0.02}, ENVIRONMENT)
    return best_peak([result])


def shares_of_peak(flops_per_s: list[float], peaks: list[dict[str, Any]], precision: str) -> list[float]:
    """Shares of the largest speed seen, in products or else: a peak measured while others were busy is too small."""
    largest = max(*flops_per_s, *(result["peaks"][precision] for result in peaks))
    return [speed / largest for speed in flops_per_s]


def best_peak(results: list[dict[str, Any]]) -> str:
    """The precision with the faster matrix products: bf16, or fp32 where the processor only emulates bf16."""
    return max(("bf16", "fp32"), key=lambda name: max(result["peaks"][name] for result in results))


def machine(request: Request, report: Report) -> None:
    """The benchmark of this name."""
    results = []
    for number in range(request.repeats):
        report.progress(f"round {number + 1} of {request.repeats}")
        results.append(peak(request))
    for name in ("fp32", "bf16"):
        raw = {"flops_by_size": [result["flops"][name] for result in results]}
        speeds = results[-1]["flops"][name]
        values = [result["peaks"][name] / 1e9 for result in results]
        note = f"size {max(speeds, key=lambda size: speeds[size])}, the best of {', '.join(speeds)}"
        report.add(Row(f"matrix product {name}", "GFLOP/s", values, note=note, raw=raw))
    bandwidth = [result["bytes_per_s"] / 1e9 for result in results]
    report.add(Row("memory copy", "GB/s", bandwidth, note="reads plus writes"))
    threads = [float(result["threads"]) for result in results]
    report.add(Row("threads", "used by torch", threads, note=f"of {os.cpu_count()} cores, {cpuinfo.name()}"))


def environment() -> dict[str, Any]:
    """The description of machine and software in every JSON file."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "environment": {
            "processor": cpuinfo.name(),
            "cores": os.cpu_count(),
            "threads": int(os.environ.get("OMP_NUM_THREADS") or 0) or None,
            "load_before": load,
            "platform": platform.platform(),
            "python": platform.python_version(),
            "packages": versions,
            "git_commit": commit,
        },
    }
