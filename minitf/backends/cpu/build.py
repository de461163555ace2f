"""Which C sources make which library. It imports no PyTorch, so that compilers can work while that is imported."""

import os
import shutil
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from minitf.backends.cpu.compiler import CLibrary
from minitf.errors import Unavailable
from minitf.system import cpuinfo as processor

SOURCES = Path(__file__).parent / "src"
KERNELS = {
    "fp32": ("rowwise.c", "attention.c"),
    "bf16": ("rowwise.c", "attention.c", "linear.c", "feed_forward.c", "muon.c"),
}
DEFINED = {"fp32": (), "bf16": ("-DBFLOAT16",)}


def kernels(precision: str) -> CLibrary:
    """The training kernels of `bf16` (on a processor with AVX-512 BF16) or `fp32` (on any); raises Unavailable."""
    if precision == "bf16" and "avx512_bf16" not in processor.flags():
        raise Unavailable(
            "the processor has no AVX-512 BF16, with which the C kernels compute in bf16; set trainer.precision=fp32"
        )
    if not (threads := _threads_of_pytorch()):
        raise Unavailable("this PyTorch does not bring gcc's threads (libgomp), which the C kernels share with it")
    sources = tuple(SOURCES / name for name in KERNELS[precision])
    return CLibrary(sources, (*DEFINED[precision], *threads), "gcc")


def decoding() -> CLibrary:
    """The decoding step, multi-threaded where gcc and its threads are available."""
    threads, sources = _threads_of_pytorch(), (SOURCES / "decode/decode.c",)
    by_gcc = threads and shutil.which("gcc") and not os.environ.get("CC")
    return CLibrary(sources, threads, "gcc") if by_gcc else CLibrary(sources)


def _threads_of_pytorch() -> tuple[str, ...]:
    """Compiler arguments to use the threads of PyTorch's libgomp; empty where it has another OpenMP library.

    Two thread pools would compete for the same cores.
    """
    torch = find_spec("torch")
    shared = sorted((Path(torch.origin).parent / "lib").glob("libgomp*")) if torch and torch.origin else []
    return ("-fopenmp", "-Wl,--as-needed", *map(str, shared)) if shared else ()


def compile_ahead() -> None:
    """Start to compile the libraries that training will most likely load."""
    for precision in ("bf16", "fp32"):
        with suppress(Unavailable):
            kernels(precision).compile_ahead()
            break
    decoding().compile_ahead()
