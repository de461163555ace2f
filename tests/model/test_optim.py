"""The optimiser: the schedule's shape, Muon against its formula, AdamW against PyTorch's, nothing lost on resume."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minitf.errors import RequestError
from minitf.model import ModelConfig, Transformer
from minitf.optim import POLAR_EXPRESS, Muon, OptimConfig, Optimizer, orthogonalise, schedule_factor


def factors(num_steps: int, **settings: Any) -> list[float]:
    config = OptimConfig(**settings)
    return [schedule_factor(config, step, num_steps) for step in range(1, num_steps + 1)]


# The schedule


def test_wsd_rises_stays_and_falls() -> None:
    rates = factors(1000, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.3)
    assert rates[:100] == pytest.approx([step / 100 for step in range(1, 101)])
    assert rates[99:700] == [1.0] * 601
    falling = rates[700:]
    assert all(a - b == pytest.approx(1 / 300) for a, b in itertools.pairwise(falling))
    assert falling[-1] == pytest.approx(1 / 300)


def test_cosine_is_half_a_wave_after_the_warm_up() -> None:
    rates = factors(1000, schedule="cosine", warmup_fraction=0.1)
    assert rates[:100] == pytest.approx([step / 100 for step in range(1, 101)])
    assert rates[549] == pytest.approx(0.5, abs=0.01)
    assert rates[324] == pytest.approx((1 + math.cos(math.pi / 4)) / 2, abs=0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))


def test_constant_stays() -> None:
    assert factors(50, schedule="constant", warmup_fraction=0.1)[4:] == [1.0] * 46
    assert factors(50, schedule="constant", warmup_fraction=0.0) == [1.0] * 50


def test_warm_up_and_decay_longer_than_the_run_are_refused() -> None:
    with pytest.raises(RequestError, match=r"optim\.warmup_fraction=0\.7 and optim\.decay_fraction=0\.4"):
        OptimConfig(warmup_fraction=0.7, decay_fraction=0.4)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 100, 12345])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.02, 0.5, 1.0])
def test_every_step_learns_and_none_more_than_the_peak(schedule: str, num_steps: int, warmup_fraction: float) -> None:
    shares = {"warmup_fraction": warmup_fraction, "decay_fraction": min(0.4, 1 - warmup_fraction)}
    rates = factors(num_steps, schedule=schedule, **shares)
    assert min(rates) > 0
    assert max(rates) <= 1
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    # A function of the step alone: asked again, in another order, the same.
    config = OptimConfig(schedule=schedule, **shares)
    assert [schedule_factor(config, step, num_steps) for step in range(num_steps, 0, -1)] == rates[::-1]


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_rate_ends_at_its_final_fraction(schedule: str) -> None:
    rates = factors(1000, schedule=schedule, final_fraction=0.25)
    assert rates[-1] == pytest.approx(0.25, abs=0.005)
    assert min(rates[100:]) >= 0.25


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kind": "sgd"}, "optim.kind=sgd"),
        ({"schedule": "linear"}, "optim.schedule=linear"),
        ({"betas": [0.9]}, "optim.betas"),
        ({"betas": [0.9, 1.0]}, "optim.betas"),
        ({"momentum": 1.0}, "optim.momentum"),
        ({"learning_rate": -1.0}, "optim.learning_rate"),
        ({"matrix_learning_rate": math.inf}, "optim.matrix_learning_rate"),
        ({"grad_clip": math.nan}, "optim.grad_clip"),
        ({"warmup_fraction": 1.5}, "optim.warmup_fraction"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(RequestError, match=key):
        OptimConfig(**settings)


# Muon


@pytest.mark.parametrize("shape", [(40, 40), (40, 79), (40, 80), (300, 40), (1, 7)])
@pytest.mark.parametrize("falling", [0.0, 3.0, 7.0])  # the smallest singular value is 10^-falling of the largest
def test_each_singular_value_goes_through_the_polynomials(shape: tuple[int, int], falling: float) -> None:
    U, _, Vh = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -falling, min(shape), dtype=torch.float64).expand(3, -1)
    found = orthogonalise(U * values[:, None] @ Vh, torch.float32)
    values = values / (values.norm(dim=1, keepdim=True) * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(found.double(), U * values[:, None] @ Vh, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (48, 48), (3, 128), (128, 128)])
def test_orthogonalised_matrices_have_singular_values_near_1(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrices_NRC = torch.randn(4, *shape)
    result = orthogonalise(matrices_NRC, dtype).float()
    U, S, Vh = torch.linalg.svd(matrices_NRC, full_matrices=False)
    # In the directions of the matrix itself; those it hardly has (1/1000 of the largest, if square) may stay small.
    values = torch.einsum("nrk,nrc,nkc->nk", U, result, Vh)
    large = S / S[:, :1] > 0.02
    assert large.float().mean() > 0.9
    assert values[large].min() > 0.7
    assert values.max() < 1.3
    cosine = torch.cosine_similarity(result.flatten(1), (U @ Vh).flatten(1))
    assert cosine.min() > 0.98


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalising_forgets_the_scale(scale: float) -> None:
    matrices_NRC = torch.randn(2, 24, 16)
    expected = orthogonalise(matrices_NRC, torch.float32)
    torch.testing.assert_close(orthogonalise(matrices_NRC * scale, torch.float32), expected, rtol=0.02, atol=0.02)


def test_a_zero_gradient_stays_zero() -> None:
    assert not orthogonalise(torch.zeros(2, 8, 4), torch.float32).any()


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (48, 48)])
def test_stacked_is_one_by_one(shape: tuple[int, int]) -> None:
    matrices_NRC = torch.randn(5, *shape)
    one_by_one = torch.cat([orthogonalise(matrix[None], torch.float32) for matrix in matrices_NRC])
    torch.testing.assert_close(orthogonalise(matrices_NRC, torch.float32), one_by_one, rtol=1e-4, atol=1e-5)


def naive_muon(
    weight: Tensor, gradients: list[Tensor], lr: float, momentum: float, decay: float, exact: bool
) -> Tensor:
    """One matrix, step after step, as Jordan et al. write it; `exact`: with U V^T in place of the polynomials."""
    weight, average = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient.double()
        ahead = momentum * average + (1 - momentum) * gradient.double()
        U, _, Vh = torch.linalg.svd(ahead, full_matrices=False)
        direction = U @ Vh if exact else orthogonalise(ahead[None], torch.float64)[0]
        weight = weight * (1 - lr * decay) - lr * math.sqrt(max(1, weight.shape[0] / weight.shape[1])) * direction
    return weight.float()


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_muon_steps_are_the_formula(shape: tuple[int, int]) -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for _ in range(3)] + [nn.Parameter(torch.randn(8, 30))]
    before = [parameter.detach().clone() for parameter in parameters]
    gradients = [[torch.randn_like(parameter) for parameter in parameters] for _ in range(4)]
    muon = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float32)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        muon.step()
    for i, parameter in enumerate(parameters):
        expected = naive_muon(before[i], [step[i] for step in gradients], 0.1, 0.9, 0.5, exact=False)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)
        expected = naive_muon(before[i], [step[i] for step in gradients], 0.1, 0.9, 0.5, exact=True)
        assert (parameter.detach() - expected).norm() < 0.1 * (expected - before[i]).norm()


# Both


def small_model() -> Transformer:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "context_length": 8, "tie_embeddings": False}
    return Transformer(ModelConfig(**shape), 20)  # type: ignore[arg-type]


def take_steps(model: Transformer, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids_BT = torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(step)) // 2
        loss = model.loss(ids_BT[:, :-1], ids_BT[:, 1:])
        loss.backward()
        optimizer.set_factor(1 / (1 + step))
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_kind_adamw_is_pytorch_adamw_with_decay_on_the_matrices_alone() -> None:
    model, reference = small_model(), small_model()
    config = OptimConfig(kind="adamw", learning_rate=0.01, weight_decay=0.3, betas=[0.8, 0.9], grad_clip=0.0)
    optimizer = Optimizer(model, config, torch.float32)
    named = dict(reference.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and "layers" in name]
    others = [p for name, p in named.items() if p.dim() != 2 or "layers" not in name]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        lr=0.01, betas=(0.8, 0.9), eps=1e-10, foreach=False,
    )  # fmt: skip
    assert len(matrices) == 2 * 7
    for step in range(5):
        ids_BT = torch.randint(20, (4, 9))
        for one, update in ((model, optimizer.step), (reference, theirs.step)):
            one.zero_grad()
            one.loss(ids_BT[:, :-1], ids_BT[:, 1:]).backward()
            for group in theirs.param_groups:
                group["lr"] = 0.01 / (step + 1)
            optimizer.set_factor(1 / (step + 1))
            update()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-4, atol=1e-6, msg=name)


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = small_model()
    optimizer = Optimizer(model, OptimConfig(), torch.float32)
    muon, adamw = optimizer.optimizers
    names = {parameter: name for name, parameter in model.named_parameters()}
    by = [{names[p] for group in one.param_groups for p in group["params"]} for one in (muon, adamw)]
    assert by[0] == {name for name, p in model.named_parameters() if "layers" in name and p.dim() == 2}
    assert by[0] | by[1] == set(names.values())
    assert not by[0] & by[1]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < by[1]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_restored_optimiser_takes_the_same_further_steps(kind: str) -> None:
    config = OptimConfig(kind=kind)
    model = small_model()
    optimizer = Optimizer(model, config, torch.float32)
    take_steps(model, optimizer, range(4))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    assert all(isinstance(value, Tensor) for value in state.values())
    expected = take_steps(model, optimizer, range(4, 8))

    again = small_model()
    again.load_state_dict(weights)
    restored = Optimizer(again, config, torch.float32)
    take_steps(again, restored, range(2))  # what it did before leaves no trace
    again.load_state_dict(weights)
    restored.load_state_dict(state)
    assert take_steps(again, restored, range(4, 8)) == expected
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    for name, value in restored.state_dict().items():
        assert torch.equal(value, optimizer.state_dict()[name]), name


def test_a_reset_optimiser_is_a_new_one() -> None:
    losses = []
    for num_before in (0, 3):
        model = small_model()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = Optimizer(model, OptimConfig(), torch.float32)
        take_steps(model, optimizer, range(num_before))
        model.load_state_dict(weights)
        optimizer.reset()
        losses.append(take_steps(model, optimizer, range(3)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("other", ["another shape", "another kind"])
def test_a_state_that_does_not_fit_is_refused(other: str) -> None:
    model = small_model()
    optimizer = Optimizer(model, OptimConfig(), torch.float32)
    take_steps(model, optimizer, range(1))
    wider = Transformer(ModelConfig(num_layers=2, hidden_size=32, num_heads=2, context_length=8), 20)
    target = Optimizer(wider, OptimConfig(), torch.float32)
    if other == "another kind":
        target = Optimizer(small_model(), OptimConfig(kind="adamw"), torch.float32)
    with pytest.raises((ValueError, RequestError)):
        target.load_state_dict(optimizer.state_dict())


def test_clipping_scales_the_whole_gradient_to_its_largest_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    for clip, expected in ((0.5, 0.5), (1e6, None), (0.0, None)):
        model = small_model()
        optimizer = Optimizer(model, OptimConfig(kind="adamw", grad_clip=clip), torch.float32)
        seen: dict[str, Tensor] = {}
        (model.loss(*torch.randint(20, (2, 4, 8))) * 100).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        names = {p: name for name, p in model.named_parameters()}
        adamw, take_step = optimizer.optimizers[0], optimizer.optimizers[0].step
        monkeypatch.setattr(
            adamw, "step",
            lambda names=names, seen=seen, step=take_step: (
                seen.update({name: p.grad.clone() for p, name in names.items()}), step()
            ),
        )  # fmt: skip
        norm = float(optimizer.step())
        true_norm = math.sqrt(sum(float((g * g).sum()) for g in before.values()))
        assert norm == pytest.approx(true_norm, rel=1e-5)
        assert norm > 10
        for name, gradient in before.items():
            scaled = gradient * (expected / true_norm if expected else 1.0)
            torch.testing.assert_close(seen[name], scaled, rtol=1e-4, atol=1e-7, msg=name)
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_regression_converges(kind: str) -> None:
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(8, 12))
            self.bias = nn.Parameter(torch.zeros(12))

    model, target, bias = Regression(), torch.randn(8, 12), torch.randn(12)
    settings = {"learning_rate": 0.1, "matrix_learning_rate": 0.2, "weight_decay": 0.0, "betas": [0.9, 0.99]}
    optimizer = Optimizer(model, OptimConfig(kind=kind, **settings), torch.float32)  # type: ignore[arg-type]
    losses = []
    for step in range(1, 301):
        x = torch.randn(64, 8)
        loss = (x @ model.matrix + model.bias - x @ target - bias).pow(2).mean()
        loss.backward()
        optimizer.set_factor(schedule_factor(OptimConfig(decay_fraction=0.8), step, 300))
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3
    assert losses[-1] < 1e-3
