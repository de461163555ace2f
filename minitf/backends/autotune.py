"""Which backend computes a run: candidates that agree with the reference, installed and timed in turn."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from minitf.backends import Backend, Reference
from minitf.backends.compile import Compile
from minitf.backends.cpu.kernels import CpuKernels
from minitf.backends.sdpa import Sdpa
from minitf.errors import RequestError, one_line, out_of_memory
from minitf.model import Transformer
from minitf.optim import Optimizer
from minitf.system.comparison import Comparison, compare

# Compiling takes 4 s (kept from an earlier run) to 30 s and makes a step about 1.5 times as fast: it pays from about
# this much training on.
COMPILE_PAYS_FROM_S = 45.0
# Our kernels take half of the reference's time and are used unless clearly slower: a toy's step is too short to tell.
KERNELS_WITHIN = 1.2
KERNELS = ("cpu", "triton")
# The values of trainer.compile, and the backends they stand for besides the one that needs no compiler.
WANTED = {"auto": (*KERNELS, "compile"), "native": KERNELS, "true": ("compile",), "false": ()}


@dataclass(frozen=True)
class Selection:
    """The backend that computes a run, the seconds of a step by it, and why it was chosen.

    `doubtful` is a pair (base, candidate) of which one was chosen by a thin margin; empty if the choice was clear.
    """

    backend: str
    step_s: float
    reason: str
    doubtful: tuple[str, ...] = ()


def backends(model: Transformer) -> dict[str, Backend]:
    """All backends for the device of `model`, by name."""
    found: list[Backend] = [Reference(), Sdpa(), Compile(), CpuKernels()]
    if model.device.type == "cuda" and find_spec("triton"):  # there is none for Windows
        from minitf.backends.cuda.triton_kernels import TritonKernels

        found.append(TritonKernels())
    return {backend.name: backend for backend in found}


def wanted_backends(wanted: str, model: Transformer) -> list[Backend]:
    """The backends to try for a value of `trainer.compile`, or for the name of the one a run was trained with."""
    known = backends(model)
    return [
        known[name] for name in WANTED.get(wanted, (wanted,)) if name in known and name not in ("reference", "sdpa")
    ]


def require_kernels(model: Transformer) -> None:
    """RequestError where `trainer.compile=native` cannot be met."""
    reasons = [backend.unsupported(model) for backend in wanted_backends("native", model)]
    if all(reasons):
        raise RequestError(f"trainer.compile=native: {reasons[-1]}")


def select(
    wanted: str,
    model: Transformer,
    optimizer: Optimizer,
    unsupported: Callable[[Backend], str | None],
    disagrees: Callable[[Backend], str | None],
    measure: Callable[[bool], float],
    seconds_left: Callable[[float], float],
) -> Selection:
    """Install the fastest backend that agrees with the reference.

    `wanted` is a value of `trainer.compile` or the name of a backend; one that is unavailable is skipped.
    `unsupported(backend)` and `disagrees(backend)` return the reason against it, or None. `measure(warm)` returns the
    seconds of a step as installed, after a warm-up unless `warm`; `seconds_left(step_s)` the training time left at
    that speed. All of them must give the same results in all processes.
    """
    notes: list[str] = []
    base = _base(unsupported, disagrees, notes)
    base.install(model, optimizer)
    doubtful: tuple[str, ...] = ()
    base_s = measure(base.name == "reference")
    for backend in wanted_backends(wanted, model):
        if backend.name == "compile" and wanted == "auto" and seconds_left(base_s) < COMPILE_PAYS_FROM_S:
            notes.append(f"torch.compile does not pay in {seconds_left(base_s):.0f} s of training")
            continue
        # Asked one by one, when its turn comes: to look for a C++ compiler, PyTorch imports inductor, 1 to 3 s.
        if reason := unsupported(backend):
            if wanted != "auto" or backend.name == "compile":
                notes.append(f"not by {backend.description}: {reason}")
            continue
        if reason := disagrees(backend):
            notes.append(f"not by {backend.description}: {reason}")
            continue
        try:
            found = race(base, backend, model, optimizer, measure, base_s, asked_for=wanted != "auto")
        except Exception as error:  # a broken compiler or driver surfaces as any of many classes: train without it
            if out_of_memory(error):
                raise
            notes.append(f"not by {backend.description}, which failed: {type(error).__name__}: {one_line(error, 120)}")
            model.zero_grad()
        else:
            base_s = found.one_s
            doubtful = (base.name, backend.name) if found.is_thin and wanted == "auto" else ()
            if wanted != "auto" or found.other_wins:
                return Selection(backend.name, found.other_s, _reason(backend, found, notes), doubtful)
            notes.append(f"by {backend.description} a step takes {found.other_s * 1000:.0f} ms")
        base.install(model, optimizer)
    reason = "; ".join([f"{base.description}, {base_s * 1000:.0f} ms a step", *notes])
    return Selection(base.name, base_s, reason, doubtful)


def race(
    base: Backend,
    candidate: Backend,
    model: Transformer,
    optimizer: Optimizer,
    measure: Callable[[bool], float],
    base_s: float | None = None,
    asked_for: bool = False,
) -> Comparison:
    """Time steps by two backends in turn, the candidate once if it is `asked_for`; it is left installed."""
    warm = set() if base_s is None else {base.name}

    def timed(backend: Backend) -> float:
        backend.install(model, optimizer)
        is_warm = backend.name in warm
        warm.add(backend.name)
        return measure(is_warm)

    limit = KERNELS_WITHIN if candidate.name in KERNELS else 1.0
    if asked_for and base_s is not None:
        return Comparison(base_s, timed(candidate), limit)
    return compare(lambda: timed(base), lambda: timed(candidate), limit, base_s)


def _base(
    unsupported: Callable[[Backend], str | None], disagrees: Callable[[Backend], str | None], notes: list[str]
) -> Backend:
    """The fastest backend that needs no compiler: PyTorch's fused attention where it suits and agrees."""
    sdpa = Sdpa()
    if unsupported(sdpa):
        return Reference()
    if reason := disagrees(sdpa):
        notes.append(f"not by {sdpa.description}: {reason}")
        return Reference()
    return sdpa


def _reason(backend: Backend, found: Comparison, notes: list[str]) -> str:
    times = f"a step takes {found.other_s * 1000:.0f} ms instead of {found.one_s * 1000:.0f} ms"
    return "; ".join([f"{backend.description}, {times}, {found.one_s / found.other_s:.2g} times as fast", *notes])
