"""torch.compile as a backend: one graph serves all blocks, evaluation too, and it follows an edit."""

import pytest
import torch
from helpers import SHAPE, randomise

from minitf.backends import Reference
from minitf.backends.agreement import Case, disagreement
from minitf.backends.compile import Compile
from minitf.model import ModelConfig, Transformer
from minitf.optim import OptimConfig

pytestmark = pytest.mark.backends


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if reason := Compile().unsupported(Transformer(ModelConfig(**SHAPE), 50)):
        pytest.skip(reason)


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_one_graph_serves_all_blocks_and_evaluation(attention: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Transformer(ModelConfig(**{**SHAPE, "num_layers": 4, "attention": attention}), 50)
    randomise(model)
    ids_BT = torch.randint(50, (3, 32))
    expected = model.loss(ids_BT, ids_BT.roll(-1, 1))
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    Compile().install(model)
    model.zero_grad()
    found = model.loss(ids_BT, ids_BT.roll(-1, 1))
    found.backward()
    torch.testing.assert_close(found, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert num_graphs() == 3  # a block, the norm, the loss

    model.eval()
    with torch.no_grad():
        evaluated = model.loss(ids_BT, ids_BT.roll(-1, 1))
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, expected.detach())
    assert not any(module.training for module in model.modules())
    assert num_graphs() == 3

    with torch.no_grad():  # nor is there one for each length of a prompt
        for length in (7, 20):
            model(ids_BT[:1, :length])
    assert num_graphs() == 3

    cache = model.new_cache(3, 32)
    with torch.no_grad():
        logits_BTV = torch.cat([model(part, cache) for part in ids_BT.split([20, 12], dim=1)], dim=1)
    Reference().install(model)
    torch.testing.assert_close(logits_BTV, model(ids_BT), rtol=1e-4, atol=1e-4)


def test_what_is_compiled_follows_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("minitf.attention.weigh", lambda scores: torch.softmax(0.1 * scores, -1))
    case = Case(ModelConfig(**SHAPE), OptimConfig(), 50, torch.float32, torch.device("cpu"), 3, False)
    assert disagreement(Compile(), case) is None
    torch._dynamo.reset()
