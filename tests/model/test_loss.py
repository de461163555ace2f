"""The loss in chunks is the textbook's, in value, gradient and memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitf import loss as loss_module
from minitf.loss import IGNORED, LinearCrossEntropy, linear_cross_entropy


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(3, 11, 8, generator=generator).to(dtype).requires_grad_()
    vocabulary_VD = torch.randn(50, 8, generator=generator).requires_grad_()
    targets_BT = torch.randint(50, (3, 11), generator=generator)
    targets_BT[0, :4] = IGNORED
    return x_BTD, vocabulary_VD, targets_BT


def naive(x_BTD: Tensor, vocabulary_VD: Tensor, targets_BT: Tensor) -> Tensor:
    logits_BTV = (x_BTD @ vocabulary_VD.to(x_BTD.dtype).T).float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("rows", [1, 4, 33, 1000])
def test_value_and_gradients_are_those_of_the_full_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", rows * 50)
    x_BTD, vocabulary_VD, targets_BT = inputs()
    expected = naive(x_BTD, vocabulary_VD, targets_BT)
    wanted = torch.autograd.grad(expected * 3, (x_BTD, vocabulary_VD))
    result = linear_cross_entropy(x_BTD, vocabulary_VD, targets_BT)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result * 3, (x_BTD, vocabulary_VD)), wanted)


def test_bfloat16_differs_by_rounding_only() -> None:
    x_BTD, vocabulary_VD, targets_BT = inputs(torch.bfloat16)
    exact = naive(x_BTD.float(), vocabulary_VD, targets_BT)
    result = linear_cross_entropy(x_BTD, vocabulary_VD, targets_BT)
    assert float(result.detach()) == pytest.approx(float(exact.detach()), rel=0.01)
    dx_BTD, dvocabulary_VD = torch.autograd.grad(result, (x_BTD, vocabulary_VD))
    assert dx_BTD.dtype == torch.bfloat16
    assert dvocabulary_VD.dtype == torch.float32
    wanted = torch.autograd.grad(exact, vocabulary_VD)[0]
    assert (dvocabulary_VD - wanted).norm() < 0.02 * wanted.norm()


def test_ignored_targets_count_neither_in_the_mean_nor_in_the_gradient() -> None:
    x_BTD, vocabulary_VD, targets_BT = inputs()
    result = linear_cross_entropy(x_BTD, vocabulary_VD, targets_BT)
    counted = linear_cross_entropy(x_BTD.flatten(0, 1)[None, 4:], vocabulary_VD, targets_BT.flatten()[None, 4:])
    torch.testing.assert_close(result, counted)
    gradient = torch.autograd.grad(result, x_BTD)[0]
    assert not gradient[0, :4].any()
    assert gradient[0, 4:].abs().sum(-1).min() > 0


def test_only_ignored_targets_give_zero() -> None:
    x_BTD, vocabulary_VD, targets_BT = inputs()
    assert float(linear_cross_entropy(x_BTD, vocabulary_VD, torch.full_like(targets_BT, IGNORED)).detach()) == 0


def test_a_model_that_knows_nothing_loses_the_logarithm_of_the_vocabulary() -> None:
    x_BTD, vocabulary_VD, targets_BT = inputs()
    result = linear_cross_entropy(x_BTD, torch.zeros_like(vocabulary_VD), targets_BT)
    assert float(result.detach()) == pytest.approx(math.log(50))


def test_at_most_a_chunk_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    class Recording(LinearCrossEntropy):
        def chunk_loss(self, logits_NV: Tensor, targets_N: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
            shapes.append(tuple(logits_NV.shape))
            return super().chunk_loss(logits_NV, targets_N, scales_N)

    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 500)
    Recording()(*inputs())
    assert shapes == [(9, 50), (9, 50), (9, 50), (6, 50)]


def test_chunks_are_of_one_size_where_that_is_possible() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert loss_module.rows_at_a_time(2048, 4096, cpu) == 512
    assert loss_module.rows_at_a_time(32 * 1024, 50_304, meta) == 4096  # seven of 5,336 would do, and leave a rest
    assert loss_module.rows_at_a_time(31, 1 << 19, cpu) == 4  # a prime number leaves one
    assert loss_module.rows_at_a_time(8, 1 << 22, cpu) == 1
