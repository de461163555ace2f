"""The device and the precision to compute in, chosen by measurement."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from minitf.distributed.process_group import SINGLE, ProcessGroup
from minitf.errors import DeviceError, RequestError
from minitf.system import cpuinfo
from minitf.system.comparison import Comparison, compare
from minitf.system.memory import keep_freed_memory
from minitf.system.threads import set_threads

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# bfloat16 must be clearly faster to be worth its rounding; processors without bf16 units run it slower than float32.
BF16_MIN_SPEEDUP = 1.3
COMPARED_SIZE = 256  # of the matrices that compare precisions: in bf16 without units, 512 take a quarter of a second
BURST_S = 3.0  # until precisions that were about as fast are compared again

Result = TypeVar("Result")


@dataclass(frozen=True)
class Hardware:
    """A device and the dtype of its activations; `peak_flops` is the measured speed of matrix products in that dtype.

    `reason` explains the dtype; `threads_set` says whether the user chose the number of threads.
    """

    device: torch.device
    dtype: torch.dtype
    peak_flops: float
    reason: str
    threads_set: bool = False

    def synchronize(self) -> None:
        """Wait until the device has finished its queue, so that a clock measures the work itself."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()


def choose_device(name: str) -> torch.device:
    """`auto` takes the first available of cuda, mps and cpu; DeviceError if a named device does not exist."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, exists in available.items() if exists))
    kind = name.split(":")[0]
    if kind not in DEVICES:
        raise DeviceError(f"device {name} must be one of {', '.join(DEVICES)}")
    if not available[kind]:
        raise DeviceError(f"device {name}: PyTorch finds no such device; cpu always works")
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        raise DeviceError(f"device {name}: {str(error).splitlines()[0]}") from None


def choose_hardware(device_name: str, precision: str, group: ProcessGroup = SINGLE, threads: int = 0) -> Hardware:
    """Resolve `trainer.device`, `trainer.precision` (auto | bf16 | fp32) and `trainer.threads` (0: automatic).

    With several processes, each takes the CUDA device of its local rank; rank 0 chooses the precision for all.
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
    speeds = _compare_precisions(device)
    if speeds.is_thin:
        time.sleep(BURST_S)  # other work that decided a close comparison may be over
        speeds = speeds.with_shorter(_compare_precisions(device))
    dtype = torch.bfloat16 if group.broadcast(speeds.other_wins) else torch.float32
    where = "a core" if device.type == "cpu" else "the device"
    reason = (
        f"{where} does {1 / speeds.other_s / 1e9:,.0f} GFLOP/s in bf16 and {1 / speeds.one_s / 1e9:,.0f} in fp32: "
        f"{speeds.one_s / speeds.other_s:.2g} times, and bf16 pays from {BF16_MIN_SPEEDUP}"
    )
    return Hardware(device, dtype, measure_matmul(device, dtype), reason, threads_set)


def _compare_precisions(device: torch.device) -> Comparison:
    """Seconds of an operation in fp32 and in bf16, on one CPU thread: on a busy machine threads wait for each other."""

    def seconds(dtype: torch.dtype) -> float:
        try:
            return 1 / measure_matmul(device, dtype, size=COMPARED_SIZE)
        except RuntimeError:  # a device without bfloat16
            if dtype == torch.float32:
                raise
            return math.inf

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compare(lambda: seconds(torch.float32), lambda: seconds(torch.bfloat16), limit=1 / BF16_MIN_SPEEDUP)
    finally:
        torch.set_num_threads(num_threads)


def measure_matmul(device: torch.device, dtype: torch.dtype, budget_s: float = 0.05, size: int = 512) -> float:
    """FLOP/s of a product of two square matrices, the best of a few tries; `size` is that on a CPU."""
    size, count = (size, 1) if device.type == "cpu" else (4096, 3)  # one would not fill a device's queue
    # Random numbers, as in training: products of ones draw less power, and a GPU does them an eighth faster.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    hardware = Hardware(device, dtype, 0.0, "")
    a @ b  # the first call initialises the library
    hardware.synchronize()
    best_s, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < budget_s or best_s == float("inf"):
        tick = time.perf_counter()
        for _ in range(count):
            a @ b
        hardware.synchronize()
        best_s = min(best_s, (time.perf_counter() - tick) / count)
    return 2 * size**3 / best_s


def measure_quiet_matmul(hardware: Hardware) -> float:
    """`hardware.peak_flops`; on a CPU, one thread's speed times the number of threads.

    That estimates an idle machine: on a busy one, threads waiting for each other can take ten times as long.
    """
    if hardware.device.type != "cpu":
        return hardware.peak_flops
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flops = measure_matmul(hardware.device, hardware.dtype)
    torch.set_num_threads(num_threads)
    return num_threads * flops


class Peak:
    """The largest speed of matrix products seen on a machine, a limit for everything that is computed by them.

    A measurement while other programs are busy finds too small a one.
    """

    def __init__(self, flops: float, measure: Callable[[], float]) -> None:
        """`flops` a second were measured; `measure` measures again."""
        self.flops, self.measure = flops, measure

    def share(self, flops: float) -> float:
        """The share of the limit that `flops` a second are, at most 1; where they are more, it is measured again."""
        if flops > self.flops:
            self.flops = max(self.flops, flops, self.measure())
        return flops / self.flops


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this machine, or None."""
    if device.type == "mps":
        return "torch.compile is not used on mps"
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            compiler = get_cpp_compiler()
        except Exception:  # inductor raises an error class of its own, named differently from version to version
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
    """The processor's name and PyTorch's number of threads, as recorded with a run."""
    return f"{cpuinfo.name()}, {torch.get_num_threads()} threads"
