"""A backend is believed only after it agrees with the reference: attention.py, model.py, loss.py, optim.py as written.

Compared are one block, the final norm, the loss and one update of the run's shapes, on seeded random weights: those of
a fresh model would hide attention, whose output projections are zero, and those of a run would let the verdict change
when it resumes.
"""

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitf.attention import AttentionContext
from minitf.backends import Backend, Reference, source
from minitf.backends.engine import TorchEngine
from minitf.model import ModelConfig, Transformer
from minitf.optim import OptimConfig, Optimizer
from minitf.system.threads import single_thread

# Largest relative error (norm of the difference over norm of the reference), about ten times what rounding gives.
OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
GRADIENT_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.05}
# Muon orthogonalises in the dtype of the activations, and its polynomials enlarge small directions 1,000 times.
UPDATE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# Tokens and words compared: enough to meet every block of queries, few enough to take no time.
MAX_TOKENS, MAX_WORDS = 1024, 2048


@dataclass(frozen=True)
class Difference:
    """A part of the model that a backend computes differently, and the relative error that is too large."""

    part: str
    error: float
    tolerance: float

    def __str__(self) -> str:
        return f"{self.part} is not finite" if math.isnan(self.error) else f"{self.part} differs by {self.error:.2g}"


@dataclass(frozen=True)
class Case:
    """What is compared: the run's shapes, its rows at a time, and whether texts are packed into rows."""

    config: ModelConfig
    optim: OptimConfig
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    num_rows: int
    packed: bool


def disagreement(backend: Backend, case: Case) -> str | None:
    """Why `backend` does not compute what the core says, or None: an edit it does not implement, or a number."""
    if names := source.edited(backend.replaces):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{names[0]} is edited{others}"
    found = [difference for difference in differences(backend, case) if not difference.error <= difference.tolerance]
    return str(found[0]) if found else None


def differences(backend: Backend, case: Case) -> Iterator[Difference]:
    """The parts in the order in which the data flows, each with its error."""
    follows = backend.name == "compile"  # one graph for the check and the run: the same rows, packed or not
    T = case.config.context_length
    num_rows = case.num_rows if follows else max(1, min(case.num_rows, 2, MAX_TOKENS // T))
    kinds = [case.packed] if follows else [True, False]
    vocab_size = case.vocab_size if follows else min(case.vocab_size, MAX_WORDS)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model = _seeded(case.config, vocab_size).to(case.device)
        model.compute_dtype = case.dtype
        for packed in kinds:
            batch = _random_batch(num_rows, T, model, packed)
            Reference().install(model)
            expected = _outputs_and_gradients(model, batch)
            backend.install(model)
            found = _outputs_and_gradients(model, batch)
            for part, tensors in expected.items():
                tolerance = (GRADIENT_TOLERANCE if "gradient" in part else OUTPUT_TOLERANCE)[case.dtype]
                errors = torch.tensor(list(map(relative_error, found[part], tensors)))
                yield Difference(part, float(errors.max()), tolerance)  # nan if one of them is
        if any(name.startswith("optim.") for name in backend.replaces):
            moves, moved = (_updates(model, one, case) for one in (Reference(), backend))
            # One matrix of each shape.
            for name in {move.shape: name for name, move in moves.items() if "layers" in name}.values():
                part = f"the update of {name.removeprefix('model.layers.0.')}"
                yield Difference(part, relative_error(moved[name], moves[name]), UPDATE_TOLERANCE[case.dtype])


def _seeded(config: ModelConfig, vocab_size: int) -> Transformer:
    """A model of one layer whose weights are all random, so that each of them matters."""
    torch.manual_seed(0)
    model = Transformer(replace(config, num_layers=1, dropout=0.0), vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model


class _Batch(NamedTuple):
    x_BTD: Tensor
    dy_BTD: Tensor
    targets_BT: Tensor
    segments_BT: Tensor | None


def _random_batch(num_rows: int, num_positions: int, model: Transformer, packed: bool) -> _Batch:
    shape = (num_rows, num_positions, model.config.hidden_size)
    x_BTD, dy_BTD = (torch.randn(shape).to(model.device, model.compute_dtype) for _ in range(2))
    targets_BT = torch.randint(model.vocab_size, shape[:2]).to(model.device)
    segments_BT = torch.arange(num_positions).expand(shape[:2]) // -(-2 * num_positions // 3)
    return _Batch(x_BTD, dy_BTD, targets_BT, segments_BT.to(model.device) if packed else None)


def _outputs_and_gradients(model: Transformer, batch: _Batch) -> dict[str, list[Tensor]]:
    """Of each part its outputs, and its gradients with respect to its input and weights."""
    context = AttentionContext(model.rotary[:, : batch.x_BTD.shape[1]], model.compute_dtype, batch.segments_BT)
    x_BTD, found = batch.x_BTD.detach().requires_grad_(), {}
    modules: list[Any] = [model.model.layers[0], model.model.norm]  # type: ignore[index]
    for part, module, others in zip(("a block", "the final norm"), modules, ((context, 0), ()), strict=True):
        y_BTD = module(x_BTD, *others)
        found[f"the output of {part}"] = [y_BTD]
        # Of a sum, since PyTorch imports half a second of symbolic algebra for a gradient that starts with a tensor.
        gradients = torch.autograd.grad((y_BTD * batch.dy_BTD).sum(), [x_BTD, *module.parameters()])
        found[f"the gradient of {part}"] = list(gradients)
    loss = model.cross_entropy(x_BTD, model.vocabulary_VD, batch.targets_BT)
    found["the loss"] = [loss]
    found["the gradient of the loss"] = list(torch.autograd.grad(loss, [x_BTD, model.vocabulary_VD]))
    return found


def _updates(model: Transformer, backend: Backend, case: Case) -> dict[str, Tensor]:
    """How the parameters move: the same weights by the same gradients."""
    torch.manual_seed(1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(model, case.optim, case.dtype)
    backend.install(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(case.device)
    # The C kernels give whole matrices to each thread, and leave fewer matrices than threads to PyTorch.
    with single_thread():
        optimizer.step()
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return moved


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected values; nan where either has values that are not finite."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def engine_disagreement(engine: type[TorchEngine], model: Transformer) -> str | None:
    """Why an engine that implements decoding anew does not compute what the core says, or None."""
    if not engine.replaces:
        return None
    if names := source.edited(engine.replaces):
        return f"{names[0]} is edited"
    return _engine_difference(engine, json.dumps(asdict(model.config)), min(model.vocab_size, MAX_WORDS))  # type: ignore[arg-type]


@functools.cache
def _engine_difference(engine: type[TorchEngine], config: str, vocab_size: int) -> str | None:
    """The first thing that `engine` computes differently for models of a shape (ModelConfig as JSON), or None."""
    with torch.random.fork_rng(devices=[]):
        model = _seeded(ModelConfig(**json.loads(config)), vocab_size)
    capacity = min(16, model.config.context_length)
    long = [token % vocab_size for token in range(max(1, capacity - 4))]
    short = long[: max(1, capacity // 2)]
    for texts in ([long, long[::-1]], [long, short]):
        found, expected = engine(model, 2, capacity), TorchEngine(model, 2, capacity)
        what = f"texts of {len(texts[0])} and {len(texts[1])} tokens"
        pairs = [(f"reading {what}", found.prefill(texts), expected.prefill(texts))]
        for token in range(capacity - len(long)):
            ids_B = torch.tensor([token, token + 1]) % vocab_size
            pairs.append((f"a token after {what}", found.decode(ids_B), expected.decode(ids_B)))
        for part, found_BV, expected_BV in pairs:
            difference = Difference(part, relative_error(found_BV, expected_BV), OUTPUT_TOLERANCE[torch.float32])
            if not difference.error <= difference.tolerance:
                return str(difference)
    return None
