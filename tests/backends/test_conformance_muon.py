"""The update by the C kernels is that of optim.py, as exactly as bfloat16 allows."""

import pytest
import torch
from backends.kernel_sets import Kernels
from helpers import random_tensor as random
from helpers import relative_error as off
from torch import Tensor, nn

from minitf.backends.cpu import bindings
from minitf.backends.cpu.muon import CpuMuon
from minitf.optim import Muon, orthogonalise

BF16 = torch.bfloat16
ONE = [nn.Parameter(torch.ones(1, 1))]
PLAIN = Muon(ONE, lr=1.0, momentum=0.9, weight_decay=0.0, dtype=torch.float32)
IN_C = CpuMuon(ONE, lr=1.0, momentum=0.9, weight_decay=0.0, dtype=BF16)
pytestmark = pytest.mark.usefixtures("bf16_kernels")


@pytest.mark.parametrize("shape", [(1, 1), (40, 17), (96, 64), (3, 4099)])
def test_gradients_are_averaged_and_weights_move(shape: tuple[int, int]) -> None:
    gradients = [random(*shape, seed=1), random(*shape[::-1], seed=2).mT]  # the second is not contiguous
    averages = [random(2, *shape, seed=3) for _ in range(2)]
    ahead = IN_C.average_gradients(list(gradients), averages[0], 0.9)
    expected = PLAIN.average_gradients(gradients, averages[1], 0.9)
    torch.testing.assert_close(ahead.float(), expected, rtol=0.005, atol=0.005)
    torch.testing.assert_close(*averages)
    weights = [[random(*shape, seed=seed) for seed in (4, 5)] for _ in range(2)]
    IN_C.move_weights(weights[0], ahead, 0.99, 0.3)
    PLAIN.move_weights(weights[1], ahead, 0.99, 0.3)
    torch.testing.assert_close(weights[0], weights[1])


def matrices_of(kind: str, N: int, R: int, C: int) -> Tensor:
    """Matrices with random singular vectors and singular values of a kind; "flat" are random numbers."""
    if kind == "flat":
        return random(N, R, C)
    K = min(R, C)
    U, V = torch.linalg.qr(random(N, R, K, seed=1))[0], torch.linalg.qr(random(N, C, K, seed=2))[0]
    first = torch.arange(K) == 0
    singular_values = {
        "steep": torch.logspace(0, -4, K),
        "low rank": (torch.arange(K) < max(1, K // 8)).float(),
        "one direction rules": torch.where(first, 1, 0.2 * torch.logspace(0, -2, K)),  # early gradients
    }[kind]
    return 1e-3 * (U * singular_values) @ V.mT


@pytest.mark.parametrize("kind", ["flat", "steep", "low rank", "one direction rules"])
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (128, 200), (150, 144), (100, 70), (7, 100), (1, 40), (5, 1)])
def test_orthogonalisation_is_as_good_as_by_full_products(shape: tuple[int, int], kind: str) -> None:
    matrices = matrices_of(kind, max(3, torch.get_num_threads()), *shape).to(BF16)
    exact = orthogonalise(matrices, torch.float64)
    native, plain = IN_C.orthogonalise(matrices), orthogonalise(matrices, BF16)
    if kind != "low rank":  # with few directions each counts much, and any value from 0.79 to 1.21 is as good
        assert off(native, exact) < (0.03 if kind == "flat" else 0.07) + off(plain, exact)
    # Rounding gives directions without a gradient a little of one; it must not grow. The polynomials end below 1.21.
    assert torch.linalg.matrix_norm(native.double(), 2).max() < 1.27
    if kind == "flat":  # how close it comes to U V^T, the purpose of it
        U, _, Vh = torch.linalg.svd(matrices.double(), full_matrices=False)
        close = [torch.cosine_similarity(x.double().flatten(1), (U @ Vh).flatten(1)).min() for x in (native, exact)]
        assert close[0] > close[1] - 0.003


def test_matrices_are_independent_and_zero_stays_zero() -> None:
    count = max(3, torch.get_num_threads())
    matrices = random(count, 48, 80).to(BF16)
    before = IN_C.orthogonalise(matrices)
    matrices[0], matrices[1] = 0, float("nan")
    after = IN_C.orthogonalise(matrices)
    assert torch.equal(after[2:], before[2:])
    assert not after[0].any()
    assert after[1].isnan().all()


@pytest.mark.usefixtures("with_threads")
def test_with_more_threads_than_matrices_pytorch_orthogonalises() -> None:
    matrices = random(2, 24, 40)
    torch.set_num_threads(3)
    assert torch.equal(IN_C.orthogonalise(matrices), orthogonalise(matrices, BF16))


@pytest.mark.usefixtures("with_threads")
def test_orthogonalisation_gives_the_same_bits_with_any_number_of_threads() -> None:
    outcomes = []
    for num_threads in (1, 2, 3, 1):
        torch.set_num_threads(num_threads)
        outcomes.append(IN_C.orthogonalise(random(3, 70, 40)))
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


@pytest.mark.usefixtures("with_threads")
def test_weight_gradients_are_the_same_bits_whoever_packs_the_operands() -> None:
    """With AMX, up to four threads pack for themselves; more share the work."""
    outcomes = []
    dy, x, out = random(600, 70).to(BF16), random(600, 96, seed=1).to(BF16), torch.empty(70, 96)
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        bindings.call("weight_gradient", BF16, 600, 70, 96, dy, x, 0, False, out)
        outcomes.append(out.clone())
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_products_are_taken_over_where_there_is_amx(bf16_kernels: Kernels) -> None:
    expected = {"bf16-amx-emulated": True, "bf16-amx-refused": False, "bf16-vectors": False}
    if bf16_kernels.name in expected:
        assert bindings.has_fast_products() == expected[bf16_kernels.name]
