"""The C kernels in bfloat16 that this processor does not choose: by AMX, emulated; where it is refused; without."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_cpu_kernels import (
    BF16,
    random,
    test_a_model_learns_the_same_by_them,
    test_attention_and_its_gradients,
    test_layers_of_one_input_and_their_gradients,
    test_the_feed_forward_layer_and_its_gradients,
    test_the_loss_and_its_gradients,
    test_what_is_no_number_shows,
)
from test_cpu_muon import test_matrices_are_orthogonalised_as_well_as_by_full_products

from minitf.backends.cpu import bindings as calls
from minitf.backends.cpu.compiler import FLAGS
from minitf.system import cpuinfo as processor

__all__ = [
    "test_a_model_learns_the_same_by_them",
    "test_attention_and_its_gradients",
    "test_layers_of_one_input_and_their_gradients",
    "test_matrices_are_orthogonalised_as_well_as_by_full_products",
    "test_the_feed_forward_layer_and_its_gradients",
    "test_the_loss_and_its_gradients",
    "test_what_is_no_number_shows",
]


pytestmark = [pytest.mark.backends, pytest.mark.hardware]

DEFINED = {"tiles": ["-DEMULATED_TILES"], "refused": ["-DEMULATED_TILES", "-DREFUSED_TILES"], "vectors": ["-DEMULATED"]}


@pytest.fixture(scope="module", params=DEFINED, autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "vectors" and "amx_bf16" not in processor.flags():
        pytest.skip("test_cpu_kernels.py has tested these")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPATH", str(Path(__file__).parents[0] / "avx512"))
        patch.setattr("minitf.backends.cpu.compiler.FLAGS", ("-O2", *FLAGS[1:], *DEFINED[request.param]))
        patch.setattr(processor, "flags", lambda: {"avx512_bf16"})
        calls.library.cache_clear()
        if isinstance(missing := calls.library(BF16), str):
            pytest.skip(missing)
        yield request.param
    calls.library.cache_clear()


@pytest.fixture
def dtype() -> torch.dtype:
    return BF16


def test_products_by_tiles_are_chosen_where_there_are_any(kernels: str) -> None:
    assert calls.has_fast_products() == (kernels == "tiles")


def test_by_tiles_a_sum_is_the_same_whoever_makes_the_operands(kernels: str) -> None:
    """With five threads they share them."""
    before, outcomes = torch.get_num_threads(), []
    dy, x, out = random(600, 70).to(BF16), random(600, 96, seed=1).to(BF16), torch.empty(70, 96)
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            calls.call("weight_gradient", BF16, 600, 70, 96, dy, x, 0, False, out)
            outcomes.append(out.clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
