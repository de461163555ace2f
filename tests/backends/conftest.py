"""Fixtures that run a test with each set of kernels."""

from collections.abc import Iterator

import pytest
import torch
from backends.kernel_sets import C_SETS, SLOW, TRITON_SETS, Kernels, compile_kernels, triton_kernels

from minitf.backends.cpu import bindings


def sets(*names: str) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.backends if name in SLOW else ()) for name in names]


@pytest.fixture(scope="module", params=sets(*C_SETS, *TRITON_SETS))
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Every set of kernels."""
    with pytest.MonkeyPatch.context() as patch:
        yield triton_kernels(request.param) if request.param in TRITON_SETS else compile_kernels(request.param, patch)
    bindings.library.cache_clear()


@pytest.fixture(scope="module", params=sets(*[name for name, (dtype, _) in C_SETS.items() if dtype == torch.bfloat16]))
def bf16_kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The sets in C that compute in bfloat16, which alone have products of weights and Muon."""
    with pytest.MonkeyPatch.context() as patch:
        yield compile_kernels(request.param, patch)
    bindings.library.cache_clear()


@pytest.fixture
def with_threads() -> Iterator[None]:
    """The test may set the number of PyTorch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
