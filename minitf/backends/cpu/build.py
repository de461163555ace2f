"""Which C sources there are and how each becomes a library, without PyTorch: compilers work while it is imported."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from minitf.backends.cpu.compiler import CLibrary
from minitf.system import cpuinfo as processor

SOURCES = Path(__file__).parent / "src"
KERNELS = {
    # with AVX-512 BF16
    "bf16": [f"bfloat16/{name}.c" for name in ("linear", "feed_forward", "rows", "attention", "update")],
    "fp32": [f"float32/{name}.c" for name in ("rows", "attention")],  # on any processor
}


def kernels(precision: str) -> CLibrary | str:
    """The kernels that train in `bf16` or `fp32`, or why they cannot be had here."""
    if precision == "bf16" and "avx512_bf16" not in processor.flags():
        return "the processor has no AVX-512 BF16, with which the C kernels compute in bf16; set trainer.precision=fp32"
    if not (threads := _threads_of_pytorch()):
        return "this PyTorch does not bring gcc's threads (libgomp), which the C kernels share with it"
    sources = tuple(SOURCES / name for name in KERNELS[precision])
    return CLibrary(sources, threads, "gcc")


def decoding() -> CLibrary:
    """The decoding step; by several threads where that can be had."""
    threads, sources = _threads_of_pytorch(), (SOURCES / "decode/decode.c",)
    by_gcc = threads and shutil.which("gcc") and not os.environ.get("CC")
    return CLibrary(sources, threads, "gcc") if by_gcc else CLibrary(sources)


def _threads_of_pytorch() -> tuple[str, ...]:
    """What the compiler is told for threads to be those PyTorch has, which are gcc's; nothing where they are others'.

    Two sets of them would wait for work on the same cores.
    """
    torch = find_spec("torch")
    shared = sorted((Path(torch.origin).parent / "lib").glob("libgomp*")) if torch and torch.origin else []
    return ("-fopenmp", "-Wl,--as-needed", *map(str, shared)) if shared else ()


def compile_ahead() -> None:
    """Have compiled what training will most likely ask for."""
    trained = kernels("bf16")
    trained = kernels("fp32") if isinstance(trained, str) else trained
    for library in (trained, decoding()):
        if isinstance(library, CLibrary):
            library.compile_ahead()
