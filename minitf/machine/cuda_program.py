"""CUDA C++ compiled at run time for the GPU that is there, by NVRTC, which comes with PyTorch, and kept.

A kernel needs no compiler on the machine; what NVRTC makes in a second or two lies beside the C libraries.
"""

import ctypes
import functools
import hashlib
import os
import secrets
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from minitf.machine.storage import cache_root

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...


class CudaError(Exception):
    """What the compiler or the driver says."""


@dataclass(frozen=True)
class CudaProgram:
    """A source, the names defined for it, and the function in it that is launched; headers lie beside it."""

    source: Path
    definitions: tuple[tuple[str, str], ...]
    function: str

    def load(self, device: torch.device) -> "CudaKernel | str":
        """The kernel for this device, compiled now or earlier, or why there is none."""
        try:
            return CudaKernel(self._binary(device), self.function, device)
        except CudaError as error:
            return str(error)
        except OSError as error:
            return f"{self.source.name} could not be compiled: {str(error).splitlines()[0]}"

    def _binary(self, device: torch.device) -> bytes:
        major, minor = torch.cuda.get_device_capability(device)
        options = [
            f"--gpu-architecture=sm_{major}{minor}",
            "--std=c++17",
            *[f"-D{name}={value}" for name, value in self.definitions],
        ]
        files = [self.source, *sorted(self.source.parent.glob("*.cuh"))]
        identity = repr([[path.read_bytes() for path in files], options, torch.version.cuda])
        built = cache_root() / f"{self.source.stem}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.cubin"
        if built.exists():
            return built.read_bytes()
        binary = compile_cuda(self.source, [*options, f"-I{self.source.parent}"])
        built.parent.mkdir(parents=True, exist_ok=True)
        partial = built.with_name(f".{built.name}.{secrets.token_hex(6)}")
        try:
            partial.write_bytes(binary)
            os.replace(partial, built)
        finally:
            partial.unlink(missing_ok=True)
        return binary


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The compiler as PyTorch's packages bring it, or the machine's own."""
    major = (torch.version.cuda or "0").partition(".")[0]
    nvidia = find_spec("nvidia")
    packages = [Path(folder) for folder in (nvidia and nvidia.submodule_search_locations) or []]
    folders = [folder / part / "lib" for folder in packages for part in (f"cu{major}", "cuda_nvrtc")]
    for folder in [*folders, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"]:
        for builtins in folder.glob("libnvrtc-builtins.so.*"):  # it asks for them by name alone
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        for library in folder.glob(f"libnvrtc.so.{major}*"):
            return ctypes.CDLL(str(library))
    try:
        return ctypes.CDLL(f"libnvrtc.so.{major}")
    except OSError:
        raise CudaError("NVRTC, CUDA's compiler at run time, is not there: pip install nvidia-cuda-nvrtc") from None


def compile_cuda(source: Path, options: list[str]) -> bytes:
    """The source as machine code; CudaError with the compiler's first error."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()

    def text(kind: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
        return buffer.raw

    code, name = source.read_bytes(), source.name.encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, name, 0, None, None):
        raise CudaError("NVRTC does not start")
    try:
        words = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        if nvrtc.nvrtcCompileProgram(program, len(options), words):
            lines = text("ProgramLog").rstrip(b"\0").decode(errors="replace").splitlines()
            error = next((line for line in lines if "error" in line), "unknown error")
            raise CudaError(f"NVRTC did not compile {source.name}: {error.strip()[:200]}")
        return text("CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _driver() -> ctypes.CDLL:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError("the driver's library (libcuda) is not there")


def _check(status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise CudaError(f"{what}: {(name.value or b'unknown error').decode()}")


class CudaKernel:
    """A function of a compiled program, in PyTorch's context of a device."""

    def __init__(self, binary: bytes, function: str, device: torch.device) -> None:
        driver, self.device = _driver(), device
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.empty(1, device=device)  # from now on PyTorch has a context
            _check(driver.cuModuleLoadData(ctypes.byref(self.module), binary), "the driver does not load the kernel")
            named = driver.cuModuleGetFunction(ctypes.byref(self.function), self.module, function.encode())
        _check(named, f"the kernel has no function {function}")
        self.launch_cooperative = driver.cuLaunchCooperativeKernel

    def prepare(self, blocks: int, threads: int, shared_bytes: int, arguments: ctypes.Structure) -> None:
        """Fix all of a launch but what the structure `arguments`, its one parameter, holds at the time."""
        kind = ctypes.c_int(MAX_DYNAMIC_SHARED_SIZE_BYTES)
        _check(
            _driver().cuFuncSetAttribute(self.function, kind, shared_bytes), f"{shared_bytes} bytes of shared memory"
        )
        self.arguments = arguments  # must not go away
        self.parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        one = ctypes.c_uint(1)
        self.sizes = (ctypes.c_uint(blocks), one, one, ctypes.c_uint(threads), one, one, ctypes.c_uint(shared_bytes))

    def launch(self) -> None:
        """On PyTorch's current stream; all blocks are there at once, so they may wait for each other."""
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        _check(
            self.launch_cooperative(self.function, *self.sizes, stream, self.parameters), "the kernel was not launched"
        )
