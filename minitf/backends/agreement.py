"""A backend is believed only after it agrees with the reference: attention.py, model.py, loss.py, optim.py as written.

Compared are one block, the final norm, the loss and one update of the run's shapes, on seeded random weights: those of
a fresh model would hide attention, whose output projections are zero, and those of a run would let the verdict change
when it resumes.
"""

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from minitf.attention import AttentionContext
from minitf.backends import Backend, Reference, source
from minitf.backends.engine import DecodingEngine, TorchEngine
from minitf.model import ModelConfig, Transformer
from minitf.optim import OptimConfig, Optimizer

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
            batch = _Batch.random(num_rows, T, model, packed)
            found = {}
            for one in (Reference(), backend):
                one.install(model)
                found[one.name] = _outputs_and_gradients(model, batch)
            yield from _compare(found["reference"], found[backend.name], case.dtype)
        if any(name.startswith("optim.") for name in backend.replaces):
            yield from _updates(model, backend, case)


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


@dataclass(frozen=True)
class _Batch:
    x_BTD: Tensor
    dy_BTD: Tensor
    targets_BT: Tensor
    segments_BT: Tensor | None

    @staticmethod
    def random(num_rows: int, num_positions: int, model: Transformer, packed: bool) -> "_Batch":
        shape = (num_rows, num_positions, model.config.hidden_size)
        x_BTD, dy_BTD = (torch.randn(shape).to(model.device, model.compute_dtype) for _ in range(2))
        targets_BT = torch.randint(model.vocab_size, shape[:2]).to(model.device)
        segments_BT = torch.arange(num_positions).expand(shape[:2]) // -(-2 * num_positions // 3)
        return _Batch(x_BTD, dy_BTD, targets_BT, segments_BT.to(model.device) if packed else None)


def _outputs_and_gradients(model: Transformer, batch: _Batch) -> dict[str, list[Tensor]]:
    """Of each part its outputs, and its gradients with respect to its input and weights."""
    context = AttentionContext(model.rotary[:, : batch.x_BTD.shape[1]], model.compute_dtype, batch.segments_BT)
    x_BTD = batch.x_BTD.detach().requires_grad_()
    found = {}
    for part, module, others in (
        ("a block", model.model.layers[0], (context, 0)),  # type: ignore[index]
        ("the final norm", model.model.norm, ()),
    ):
        assert isinstance(module, torch.nn.Module)
        y_BTD = module(x_BTD, *others)
        found[f"the output of {part}"] = [y_BTD]
        inputs = [x_BTD, *module.parameters()]
        # Of a sum, since PyTorch imports half a second of symbolic algebra for a gradient that starts with a tensor.
        found[f"the gradient of {part}"] = list(torch.autograd.grad((y_BTD * batch.dy_BTD).sum(), inputs))
    loss = model.cross_entropy(x_BTD, model.vocabulary_VD, batch.targets_BT)
    found["the loss"] = [loss]
    found["the gradient of the loss"] = list(torch.autograd.grad(loss, [x_BTD, model.vocabulary_VD]))
    return found


def _compare(
    expected: dict[str, list[Tensor]], found: dict[str, list[Tensor]], dtype: torch.dtype
) -> Iterator[Difference]:
    for part, tensors in expected.items():
        tolerance = (GRADIENT_TOLERANCE if "gradient" in part else OUTPUT_TOLERANCE)[dtype]
        error = max(relative_error(a, b) for a, b in zip(found[part], tensors, strict=True))
        yield Difference(part, error, tolerance)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected values; nan where either has values that are not finite."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@contextmanager
def _single_thread() -> Iterator[None]:
    """The C kernels give whole matrices to each thread, and leave fewer matrices than threads to PyTorch."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _updates(model: Transformer, backend: Backend, case: Case) -> Iterator[Difference]:
    """The update of each shape of matrix, from the same gradients and weights."""
    named = {name: parameter for name, parameter in model.named_parameters() if "layers" in name}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    gradients = {name: torch.randn(parameter.shape).to(case.device) for name, parameter in named.items()}
    moved: dict[str, dict[str, Tensor]] = {}
    norms = {}
    for one in (Reference(), backend):
        optimizer = Optimizer(model, case.optim, case.dtype)
        one.install(model, optimizer)
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(before[name])
                parameter.grad = gradients[name].clone()
        with _single_thread():
            norms[one.name] = optimizer.step()
        moved[one.name] = {name: parameter.detach() - before[name] for name, parameter in named.items()}
    yield Difference(
        "the gradient's norm", relative_error(norms[backend.name], norms["reference"]), OUTPUT_TOLERANCE[case.dtype]
    )
    shapes: set[torch.Size] = set()
    for name, expected in moved["reference"].items():
        if expected.shape not in shapes:
            shapes.add(expected.shape)
            part = f"the update of {name.removeprefix('model.layers.0.')}"
            yield Difference(part, relative_error(moved[backend.name][name], expected), UPDATE_TOLERANCE[case.dtype])


def engine_disagreement(engine: type[DecodingEngine], model: Transformer) -> str | None:
    """Why an engine that implements decoding anew does not compute what the core says, or None."""
    if not engine.replaces:
        return None
    if names := source.edited(engine.replaces):
        return f"{names[0]} is edited"
    return _engine_difference(engine, json.dumps(asdict(model.config)), min(model.vocab_size, MAX_WORDS))


@functools.cache
def _engine_difference(engine: type[DecodingEngine], config: str, vocab_size: int) -> str | None:
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
