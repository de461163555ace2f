"""Shared helpers of the tests: a tiny model and text, training in this process, comparisons of runs."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.errors import run_command
from minitf.interpretability.attention_maps import AttentionMaps
from minitf.viewer import FOLDER, MODULES

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "context_length": 32}


EXERCISE = ["experiment=pronouns", "trainer.batch_size=16", "trainer.device=cpu", "trainer.compile=false",
            "trainer.precision=fp32", "trainer.eval_every=1000", "trainer.sample_tokens=0"]  # fmt: skip
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


class NotApplicable(pytest.skip.Exception):
    """A skip that says nothing about this machine: one combination of parameters has no test."""


def not_applicable(reason: str) -> NoReturn:
    """Skip, also with MINITF_CI=1, which makes a failure of a skip for want of a tool."""
    raise NotApplicable(reason)


def run_node(code: str, tmp_path: Path) -> Any:
    """What a script prints, as JSON, with the viewer's modules next to it in `tmp_path`."""
    assert NODE is not None
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for name in MODULES:
        shutil.copy(FOLDER / name, tmp_path / name)
    (tmp_path / "main.js").write_text(code, encoding="utf-8")
    done = subprocess.run([NODE, "main.js"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def data_of(page: str) -> dict[str, Any]:
    """The data of a page with maps."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def make_text(num_sentences: int, seed: int = 0) -> str:
    """Simple sentences, about 33 characters each."""
    choose = random.Random(seed).choice
    sentences = (
        f"The {choose(['cat', 'dog', 'bird', 'old man'])} {choose(['sat', 'slept', 'sang'])} on the "
        f"{choose(['mat', 'road', 'roof'])}{choose(['.', ' again.', ', it was tired.'])}" + choose(" \n")
        for _ in range(num_sentences)
    )
    return "".join(sentences)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Set all parameters to random values. At zero or one, as some start, errors in their use would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.3 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5))


def train_here(*arguments: str) -> int:
    """Run `python -m minitf.train ARGUMENTS` in this process; return the exit status."""
    from minitf.train import main

    return run_command(lambda: main(list(arguments)))


def rows(run: Path | str, split: str | None = None) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, of all splits or of one ("train", "val")."""
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if split in (None, row["split"])]


def losses(run: Path | str) -> list[tuple[int, str, float]]:
    """(step, split, loss) of every row."""
    return [(row["step"], row["split"], row["loss"]) for row in rows(run)]


def tensors(run: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of the latest checkpoint: weights, optimizer state, random state."""
    latest = Path(run) / "checkpoints/latest"
    return {**load_file(latest / "model.safetensors"), **load_file(latest / "trainer_state.safetensors")}


def assert_one_line(err: str, *words: str) -> None:
    """The last line of stderr is an error message of minitf with these words, and there is no traceback."""
    last = err.splitlines()[-1]
    assert last.startswith("minitf: "), err
    assert "Traceback" not in err
    for word in words:
        assert word in last


def assert_same_run(run: str, expected: str) -> None:
    """Two runs have the same losses, weights, optimizer state and random state, bit for bit."""
    assert losses(run) == losses(expected)
    found, wanted = tensors(run), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Set the flag that Ctrl-C sets, at the end of this step."""
    from minitf.training.trainer import Trainer

    original = Trainer.train_one_step

    def train_one_step(self: Trainer) -> None:
        original(self)
        if self.state.step == step:
            self.interrupted = True

    monkeypatch.setattr(Trainer, "train_one_step", train_one_step)


def maps_of(tokens: list[str], num_layers: int = 2, num_heads: int = 3) -> AttentionMaps:
    """Maps of random causal attention over `tokens`."""
    size = len(tokens)
    scores = torch.randn(num_layers, num_heads, size, size, generator=torch.Generator().manual_seed(0))
    weights = scores.masked_fill(torch.ones(size, size).triu(1).bool(), float("-inf")).softmax(-1)
    return AttentionMaps(" ".join(tokens), tokens, list(range(size)), weights, [[("a", 0.5)]] * size, 10)


# Tokens that end scripts, open comments or are no valid text.
NASTY = ["</script><script>alert(1)</script>", "<!--", "]]>", "\u2028", "\ud800", '"', "&amp;"]


class WordTokenizer:
    """A word-level tokenizer with the methods that `attention_maps` calls."""

    start_ids: ClassVar[list[int]] = []

    def __init__(self, words: str = "the cat sat on mat dog it was") -> None:
        self.words = words.split()

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.split()]

    def pieces(self, ids: list[int]) -> list[str]:
        return [" " + self.words[id_] for id_ in ids]


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def recorded_weights(model: torch.nn.Module, ids_BT: Tensor) -> list[Tensor]:
    """Each layer's weights_BHTS of a forward pass."""
    record: list[AttentionRecord] = []
    model(ids_BT, record=record)
    return [layer.weights_BHTS for layer in record]
