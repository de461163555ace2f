"""What this machine can do: device, threads, precision and compilation, measured or asked for instead of guessed."""

import ctypes
import gc
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from minitf.distributed.process_group import SINGLE, ProcessGroup
from minitf.errors import RequestError
from minitf.system import cpuinfo as processor

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# bfloat16 must be clearly faster to be worth its rounding; machines without bf16 units run it slower than float32.
BF16_MIN_SPEEDUP = 1.3
# Where Linux says what a process may have.
PROC, CONTROL_GROUPS, MEMBERSHIP = Path("/proc"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Hardware:
    """A device and the dtype of its activations; `peak_flops` is the matrix product speed measured in that dtype.

    `reason` is why this dtype; `threads_set` is whether somebody has said how many threads there are to be.
    """

    device: torch.device
    dtype: torch.dtype
    peak_flops: float
    reason: str
    threads_set: bool = False

    def synchronize(self) -> None:
        """Wait for the device's queue, so that a clock reads what the work took."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()


def choose_device(name: str) -> torch.device:
    """`auto` takes the first of cuda, mps and cpu that is there; a named device that is not is a RequestError."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    kind = name.split(":")[0]
    if kind not in DEVICES:
        raise RequestError(f"device {name} must be one of {', '.join(DEVICES)}")
    if not there[kind]:
        raise RequestError(f"device {name}: PyTorch finds no such device here; cpu always works")
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        raise RequestError(f"device {name}: {str(error).splitlines()[0]}") from None


def usable_cores(root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores this process may keep busy: those it may run on, or fewer where its container has a share of their time.

    PyTorch asks for neither: with 2 of 64 cores' time it would start a thread for each of the 64. A share is written as
    microseconds in a period (Linux, control groups of version 2 and 1).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    for quota, period in _limits("cpu", *names, root, membership):
        if quota > 0 and period > 0:
            cores = min(cores, max(1, quota // period))
    return cores


def free_memory(root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP, proc: Path = PROC) -> int | None:
    """Bytes this process may still take, of the system's and its container's; None where nobody says (not Linux)."""
    left, own = _kilobytes(proc / "meminfo", "MemAvailable"), _kilobytes(proc / "self/status", "VmRSS")
    if left is None or own is None:
        return None
    for (most,) in _limits("memory", ["memory.max"], ["memory.limit_in_bytes"], root, membership):
        left = min(left, max(0, most - own))
    return left


def growth_of(work: Callable[[], Any], proc: Path = PROC) -> int | None:
    """Bytes by which this process grew at most while it did `work`; None where that cannot be told (not Linux)."""
    gc.collect()  # what is given back meanwhile would hide as much growth
    try:
        (proc / "self/clear_refs").write_text("5", encoding="utf-8")  # the peak is forgotten
    except OSError:
        return None
    before = _kilobytes(proc / "self/status", "VmRSS")
    work()
    peak = _kilobytes(proc / "self/status", "VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _kilobytes(path: Path, name: str) -> int | None:
    """The entry `name` of a file of the kernel's, in bytes."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _limits(controller: str, new: list[str], old: list[str], root: Path, membership: Path) -> Iterator[list[int]]:
    """The numbers in these files (version 2, version 1) of this process's control group and of each around it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        group = top / path.strip("/")
        for folder in [group, *group.parents]:
            try:
                texts = [(folder / name).read_text(encoding="utf-8") for name in (old if controllers else new)]
                yield [int(number) for number in " ".join(texts).split()]
            except (OSError, ValueError):  # not there, or "max"
                pass
            if folder == top:
                break


def set_threads(wanted: int = 0, group: ProcessGroup = SINGLE) -> bool:
    """Have PyTorch compute on so many threads in each process; returns whether that was wished for.

    0: as $OMP_NUM_THREADS says, else one for each core (PyTorch leaves out a core's second thread) that this process
    can have. Raises RequestError for more than the machine has.
    """
    most = os.cpu_count() or 1
    if wanted > most:
        raise RequestError(f"trainer.threads={wanted} is more than this machine's {most} cores; leave it out")
    told = os.environ.get("OMP_NUM_THREADS", "")
    if wanted:
        torch.set_num_threads(wanted)
    elif group.size > 1 and told in ("", "1"):  # torchrun has set it to 1
        torch.set_num_threads(max(1, usable_cores() // group.local_size))
        return False
    elif not told:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    return bool(wanted or told)


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one, instead of giving it back to the system.

    A step takes and frees its activations in large blocks. Given back, each page is cleared and mapped anew at the next
    step: with 6 layers of 256 and 4,096 tokens 28,000 page faults and 50 of 345 ms.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25)  # the most for older ones
        mallopt(trim_threshold, (1 << 31) - 1)


def measure_matmul(device: torch.device, dtype: torch.dtype, budget_s: float = 0.05) -> float:
    """Floating point operations a second of a square matrix product, the best of a few tries."""
    # Without bf16 units a processor takes a third of a second for one; a device's queue would not be filled by one.
    size, count = (512, 1) if device.type == "cpu" else (4096, 3)
    # Of random numbers, as in training: products of ones take less power, and a GPU is an eighth faster at them.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    hardware = Hardware(device, dtype, 0.0, "")
    a @ b  # the first call sets the library up
    hardware.synchronize()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < budget_s or best == float("inf"):
        tick = time.perf_counter()
        for _ in range(count):
            a @ b
        hardware.synchronize()
        best = min(best, (time.perf_counter() - tick) / count)
    return 2 * size**3 / best


def measure_quiet_matmul(hardware: Hardware) -> float:
    """What `measure_matmul` finds, or on a CPU what its threads would do if other programs left them alone.

    Threads that wait for each other on a busy machine can take ten times as long.
    """
    if hardware.device.type != "cpu":
        return hardware.peak_flops
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = measure_matmul(hardware.device, hardware.dtype)
    torch.set_num_threads(num_threads)
    return num_threads * one


def choose_hardware(device_name: str, precision: str, group: ProcessGroup = SINGLE, threads: int = 0) -> Hardware:
    """Resolve `trainer.device`, `trainer.precision` (auto | bf16 | fp32) and `trainer.threads` (0: all that help).

    Of several processes each gets the device of its number on its machine; the precision is the first one's choice.
    """
    device, threads_set = choose_device(device_name), set_threads(threads, group)
    if group.size > 1:
        if device.type not in ("cpu", "cuda"):
            raise RequestError(f"device {device}: several processes train on cpu or cuda; set trainer.device=cpu")
        if device.type == "cuda":
            device = choose_device(f"cuda:{group.local_rank}")
    if device.type == "cpu":
        keep_freed_memory()
    if precision != "auto" and precision not in PRECISIONS:
        raise RequestError(f"trainer.precision={precision} must be one of auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    if precision != "auto":
        dtype = PRECISIONS[precision]
        return Hardware(device, dtype, measure_matmul(device, dtype), "as set", threads_set)
    # The choice is made on one thread: threads that wait for each other on a busy machine would decide it by chance.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bf16 = measure_matmul(device, torch.bfloat16)
    except RuntimeError:  # a device without bfloat16
        bf16 = 0.0
    fp32 = measure_matmul(device, torch.float32)
    torch.set_num_threads(num_threads)
    dtype = torch.bfloat16 if group.broadcast(bf16 > BF16_MIN_SPEEDUP * fp32) else torch.float32
    where = "a core" if device.type == "cpu" else "the device"
    reason = f"{where} does {bf16 / 1e9:,.0f} GFLOP/s in bf16 and {fp32 / 1e9:,.0f} in fp32"
    return Hardware(device, dtype, measure_matmul(device, dtype), reason, threads_set)


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "mps":
        return "torch.compile is not used on mps"
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            compiler = get_cpp_compiler()
        except Exception:  # inductor raises its own error class, differently named from version to version
            return "no C++ compiler found"
        if shutil.which(compiler) is None:
            return f"no C++ compiler found ({compiler})"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
    return None


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """`torch.compile` for fixed shapes."""
    return torch.compile(function, dynamic=False)


def describe_processor() -> str:
    """The processor's name and the threads used of it, as recorded with a run."""
    return f"{processor.name()}, {torch.get_num_threads()} threads"
