"""The Triton kernels compute what the model computes, here by Triton's interpreter, which needs no GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minitf.loss import IGNORED
from minitf.model import ModelConfig, TrainingFunctions, Transformer

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.backends,
    pytest.mark.hardware,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="on a GPU test_cuda.py runs the compiled kernels"),
]

from minitf.backends.cpu.blocks import cuda  # noqa: E402


def model_of(dtype: torch.dtype, **shape: Any) -> Transformer:
    config = ModelConfig(num_layers=2, hidden_size=48, intermediate_size=80, context_length=40, **shape)
    model = Transformer(config, 61)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(std=0.3) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.2)
    model.compute_dtype = dtype
    return model


def gradients(model: Transformer, functions: TrainingFunctions, *batch: Tensor | None) -> dict[str, Tensor]:
    """Of every parameter, and the loss."""
    model.functions = functions
    assert model.usable_functions is functions
    model.zero_grad()
    loss = model.loss(*batch)  # type: ignore[arg-type]
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        {"num_heads": 2, "head_dim": 8, "qk_norm": False},
        {"num_heads": 3, "head_dim": 32, "tie_embeddings": False},
    ],
)
def test_losses_and_gradients_are_those_of_the_plain_functions(shape: dict[str, Any], packed: bool) -> None:
    model = model_of(torch.float32, **shape)
    ids_BT, targets_BT = torch.randint(61, (2, 2, 27)).unbind()
    targets_BT[0, :5] = IGNORED
    segments_BT = torch.arange(27).expand(2, 27) // 10 if packed else None
    weights_BT = torch.rand(2, 27) if packed else None
    batch = ids_BT, targets_BT, segments_BT, weights_BT
    wanted = gradients(model, TrainingFunctions(), *batch)
    found = gradients(model, cuda.FUNCTIONS[torch.float32], *batch)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm() + 1e-6, name


def test_bfloat16_is_off_by_rounding_alone() -> None:
    model = model_of(torch.float32, num_heads=4, head_dim=16)
    batch = torch.randint(61, (2, 2, 27)).unbind()
    exact = gradients(model, TrainingFunctions(), *batch)
    model.compute_dtype = torch.bfloat16
    rounded = gradients(model, TrainingFunctions(), *batch)
    found = gradients(model, cuda.FUNCTIONS[torch.bfloat16], *batch)

    def off(values: dict[str, Tensor]) -> float:
        return max(float((values[name] - exact[name]).norm() / exact[name].norm()) for name in exact)

    assert off(found) < 1.5 * off(rounded) < 0.15


def test_dropout_and_activation_checkpointing_go_with_them() -> None:
    model, batch = (
        model_of(torch.float32, num_heads=4, head_dim=16, dropout=0.3),
        torch.randint(61, (2, 1, 16)).unbind(),
    )
    found = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        found.append(gradients(model, cuda.FUNCTIONS[torch.float32], *batch))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_nan_shows_in_the_loss_and_in_its_gradient() -> None:
    logits_NV, targets_N, scales_N = torch.randn(3, 70), torch.tensor([1, 2, 3]), torch.ones(3)
    logits_NV[1, 5] = float("nan")
    loss, gradient_NV = cuda.chunk_loss(logits_NV, targets_N, scales_N)
    assert loss.isnan()
    assert gradient_NV.isnan().any(1).tolist() == [False, True, False]


def test_words_that_are_ruled_out_cost_nothing() -> None:
    logits_NV = torch.full((1, 9000), float("-inf"))
    logits_NV[0, [3, 8000]] = 0.0
    loss, gradient_NV = cuda.chunk_loss(logits_NV, torch.tensor([3]), torch.ones(1))
    assert float(loss) == pytest.approx(0.6931472)
    assert gradient_NV[0, [2, 3, 8000]].tolist() == pytest.approx([0.0, -0.5, 0.5])
