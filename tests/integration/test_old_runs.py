"""Runs, checkpoints and a token cache of an earlier version (commit 7c33a0d): readable, resumable, a cache hit.

`old_runs/runs.tar.xz` holds a finished run, the same run stopped after step 10, and their token cache: one layer, byte
tokenizer, dropout, the explicit path in float32 on one thread. `old_runs/expected.json` holds what that version itself
made of them: the losses and tensors of the interrupted run after it was resumed, a greedy text, a held-out loss.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import losses, tensors, train_here

import minitf
from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.config.schema import load_config
from minitf.interpretability.attention_maps import attention_maps

FOLDER = Path(__file__).parent / "old_runs"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def old(workdir: Path) -> Path:
    """The current directory of the old version, unpacked."""
    with tarfile.open(FOLDER / "runs.tar.xz") as archive:
        archive.extractall(workdir, filter="data")
    return workdir


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def arithmetic() -> str:
    """Digest of some operations of PyTorch. Processors and builds of PyTorch that round differently differ in it."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator, requires_grad=True) for size in ((64, 8), (257, 8)))
    hidden = torch.nn.functional.silu(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    (hidden @ weight.T).log_softmax(-1).diagonal().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return digest(torch.cat([x.grad.flatten(), weight.grad.flatten(), (x @ x.T).softmax(-1).detach().flatten()]))


def test_an_old_run_is_resumed_as_the_old_version_resumed_it(old: Path) -> None:
    assert train_here("resume=runs/old/interrupted") == 0
    found, expected = losses("runs/old/interrupted"), [tuple(row) for row in EXPECTED["losses"]]
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-3)
    if arithmetic() == EXPECTED["arithmetic"]:  # this machine rounds as the one that recorded: then not a bit differs
        assert found == expected
        assert {name: digest(value) for name, value in tensors("runs/old/interrupted").items()} == EXPECTED["tensors"]


def test_an_old_token_cache_is_a_hit(old: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*")}
    assert len(before) > 1
    assert train_here("resume=runs/old/interrupted") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*")} == before


def test_an_old_finished_run_loads_generates_and_evaluates(old: Path) -> None:
    lm = minitf.load("runs/old/finished", "cpu")
    assert lm.generate(EXPECTED["prompt"], max_tokens=8, temperature=0) == EXPECTED["text"]
    held_out = lm.evaluate(Path("text.txt").read_text(encoding="utf-8")[-1000:])
    assert held_out.loss == pytest.approx(EXPECTED["held_out_loss"], rel=1e-4)
    assert attention_maps(lm.model, lm.tokenizer, "The cat").weights_LHTS.shape == (1, 2, 7, 7)


def test_an_old_finished_run_is_complete_and_can_be_trained_further(old: Path) -> None:
    assert load_config(Path("runs/old/finished/config.yaml")).trainer.max_steps == 24
    assert train_here("resume=runs/old/finished") == 2
    assert train_here("resume=runs/old/finished", "trainer.max_steps=26") == 0
    assert load_checkpoint("runs/old/finished").step == 26
    assert Path("runs/old/finished/attention.html").is_file()
