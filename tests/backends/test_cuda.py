"""On a CUDA device: the same losses, gradients and texts as everywhere, however the device is made fast."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import train_here
from torch import Tensor

from minitf.backends import Backend, Reference
from minitf.backends.cuda.triton_kernels import TritonKernels
from minitf.data.batches import Batches
from minitf.model import ModelConfig, Transformer
from minitf.optim import OptimConfig, Optimizer
from minitf.system.hardware import choose_hardware
from minitf.training.parallel import Parallel
from minitf.training.tuned_step import TunedStep

pytestmark = [
    pytest.mark.hardware,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES: list[dict[str, Any]] = [
    {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "intermediate_size": 200},
    {"hidden_size": 128, "num_heads": 2, "qk_norm": False, "tie_embeddings": False},
    {"hidden_size": 768, "num_heads": 12},
]


def model_of(shape: dict[str, Any], dtype: torch.dtype) -> Transformer:
    model = Transformer(ModelConfig(num_layers=2, context_length=72, **shape), 331)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.to("cuda").compute_dtype = dtype
    return model


def gradients(model: Transformer, backend: Backend, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    backend.install(model)
    model.zero_grad()
    loss = model.loss(*batch)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {"loss": loss.detach()}


def off(values: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return max(float((values[name] - exact[name]).norm() / exact[name].norm()) for name in exact)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_kernels_compute_what_the_plain_functions_do(shape: dict[str, Any], packed: bool) -> None:
    model = model_of(shape, torch.float32)
    batch = tuple(torch.randint(331, (2, 5, 72), device="cuda").unbind())
    batch += (torch.arange(72, device="cuda").expand(5, 72) // 20,) if packed else ()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        exact = gradients(model, Reference(), batch)
        assert off(gradients(model, TritonKernels(), batch), exact) < 1e-4
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    model.compute_dtype = torch.bfloat16
    rounded = off(gradients(model, Reference(), batch), exact)
    assert off(gradients(model, TritonKernels(), batch), exact) < 1.2 * rounded < 0.2


def step_of(cuda_graph: str, shape: dict[str, Any]) -> TunedStep:
    torch.manual_seed(0)
    model, hardware = model_of(shape, torch.bfloat16), choose_hardware("cuda", "bf16")
    tokens = np.random.default_rng(0).integers(331, size=20_000).astype(np.uint16)
    optimizer = Optimizer(model, OptimConfig(), hardware.dtype)
    batches = Batches(tokens, 72, 4, 0)
    return TunedStep(Parallel(model), optimizer, batches, hardware, cuda_graph=cuda_graph)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_step_as_a_graph_is_the_same_step(shape: dict[str, Any]) -> None:
    found = []
    for cuda_graph in ("false", "true"):
        step = step_of(cuda_graph, shape)
        selection = step.warm_up("native", lambda step_s: 1e9)
        assert selection.backend == "triton"
        assert ("as a CUDA graph, " in selection.reason) == (step.captured is not None) == (cuda_graph == "true")
        found.append(torch.stack([torch.stack(step.run(index, 1.0)) for index in range(20)]).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    assert found[0].std(0).min() > 1e-3  # each step has another loss and another gradient


def test_a_run_ends_as_the_one_it_resumes(tiny: list[str], workdir: Path) -> None:
    settings = [
        word for word in tiny if not word.startswith(("trainer.device", "trainer.compile", "trainer.precision"))
    ]
    settings += ["trainer.device=cuda", "trainer.max_steps=12", "trainer.save_every=6", "trainer.sample_tokens=8"]
    assert train_here(*settings, "run_dir=whole") == 0
    assert train_here(*settings, "run_dir=halved", "trainer.max_steps=6", "optim.schedule=constant") == 0
    assert train_here("resume=halved", "trainer.max_steps=12") == 0
    environment = json.loads(Path("whole/environment.json").read_text(encoding="utf-8"))
    assert "Triton kernels" in json.dumps(environment)
    rows = [json.loads(line) for line in Path("halved/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 12


def test_a_loss_that_cannot_be_recorded_is_computed_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of("auto", SHAPES[1])
    loss = step.parallel.loss

    def asking(*batch: Tensor | None) -> Tensor:
        value = loss(*batch)
        assert float(value.detach()) > 0  # waits for the device, which a recording cannot
        return value

    monkeypatch.setattr(step.parallel, "loss", asking)
    assert "not as a CUDA graph" in step.warm_up("false", lambda step_s: 1e9).reason
    assert step.captured is None
    first = copy.copy(step.run(0, 1.0)[0])
    assert torch.isfinite(first)
