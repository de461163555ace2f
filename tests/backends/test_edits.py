"""Whoever edits the block trains with the edit, sees it in the maps and generates with it, whatever makes it fast.

A copy of the package in a temporary folder, one edit each, and a run by every backend this machine has: as a learner
would find out.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, make_text, not_applicable

from minitf.backends.cpu.kernels import CpuKernels
from minitf.model import ModelConfig, Transformer

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("edited_run.py")
EDITS: dict[str, list[tuple[str, str, str]]] = {
    "match": [("attention", "q_BHTK / math.sqrt(K)", "q_BHTK / (3 * math.sqrt(K))")],
    "weigh": [("attention", "torch.softmax(scores_BHTS", "torch.softmax(0.1 * scores_BHTS")],
    "weigh a little": [("attention", "torch.softmax(scores_BHTS", "torch.softmax(0.99 * scores_BHTS")],
    "gather": [("attention", "return mixed.view(B, H, T, K)", "return 0.5 * mixed.view(B, H, T, K)")],
    "rotate": [("rope", "second * cos + first * sin", "second * cos - first * sin")],
    "norm": [("attention", "return F.rms_norm(", "return 0.8 * F.rms_norm(")],
    "SwiGLU": [("model", "F.silu(gate_BTF)", "F.relu(gate_BTF)")],
    "residual": [("model", "return x_BTD + self.dropout(self.mlp", "return 0.8 * x_BTD + self.dropout(self.mlp")],
    "loss": [("loss", "losses_N1 = log_sum_N1 -", "losses_N1 = 1.5 * log_sum_N1 -")],
    "Muon": [("optim", "return x.mT if transposed else x", "return 0.2 * (x.mT if transposed else x)")],
    "a new setting": [
        ("model", "    dropout: float", "    score_scale: float = 0.2  # of the scores\n    dropout: float"),
        ("model", "self.mlp = Feed", "self.self_attn.score_scale = c.score_scale\n        self.mlp = Feed"),
        ("attention", "return weigh(scores_BHTS)", "return weigh(self.score_scale * scores_BHTS)"),
    ],
}  # fmt: skip
# The definition each edit is named by, and whether the attention weights or the standard formula tell of it.
NAMED = {"norm": "attention.RMSNorm", "rotate": "rope.rotate", "SwiGLU": "model.FeedForward", "residual": "model.Block",
         "loss": "loss.chunk_loss", "Muon": "optim.orthogonalise"}  # fmt: skip
IN_THE_FORMULA = ("match", "weigh", "gather", "a new setting")
NOT_IN_THE_FORWARD_PASS = ("loss", "Muon")
# torch.compile generates C++ for these, which takes most of a minute. For the others it traces the same graphs and runs
# them by PyTorch's operations: which code it traces is ours, how that becomes C++ is PyTorch's.
TO_CPP = ("weigh", "loss", "a new setting")
TRACED = ("system/hardware", "torch.compile(function, dynamic=False)",
          'torch.compile(function, dynamic=False, backend="aot_eager")')  # fmt: skip
UNEDITED: dict[tuple[int, str], dict[str, Any]] = {}  # what runs without an edit give, by context and precision


def settings(text: Path, context: int, precision: str, *more: str) -> list[str]:
    shape = {**SHAPE, "context_length": context, "num_layers": 1}
    return [
        "data=text", f"data.files=[{text}]", f"data.cache_dir={text.parent}", "tokenizer=byte",
        *(f"model.{key}={value}" for key, value in shape.items()),
        f"trainer.batch_size={2 if context > 100 else 8}", "trainer.max_steps=6", "trainer.log_every=1",
        "trainer.eval_every=6", "trainer.eval_tokens=4096", "trainer.attention_every=-1", "trainer.sample_tokens=0",
        "trainer.device=cpu", f"trainer.precision={precision}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(make_text(3000), encoding="utf-8")
    return file


def edited_package(folder: Path, edits: list[tuple[str, str, str]]) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "minitf", folder / "minitf", ignore=ignored)
    shutil.copytree(ROOT / "conf", folder / "conf", ignore=ignored)
    for module, old, new in edits:
        file = folder / "minitf" / f"{module}.py"
        source = file.read_text(encoding="utf-8")
        assert source.count(old) >= 1, (module, old)
        file.write_text(source.replace(old, new, 1), encoding="utf-8")
    return folder


def run(package: Path, workdir: Path, request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(DRIVER), json.dumps(request)], cwd=workdir, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(package)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def kernel_precisions() -> list[str]:
    """The precisions in which this processor trains by the C kernels."""
    model = Transformer(ModelConfig(**SHAPE), 50)
    found = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model.compute_dtype = dtype
        if CpuKernels().unsupported(model) is None:
            found.append(name)
    return found


def check(edit: str, context: int, precision: str, compiled: bool, text: Path, tmp_path: Path) -> None:
    ways = {
        "as written": ["trainer.compile=false", "model.attention=explicit"],
        "kernels": ["trainer.compile=native"],
        "fused": ["trainer.compile=false", "model.attention=sdpa"],
        "compiled": ["trainer.compile=true"],
    }
    runs = {name: settings(text, context, precision, *more) for name, more in ways.items() if name != "compiled"}
    plain_runs = {name: runs[name] for name in ("as written", "kernels")}
    if compiled:
        runs["compiled"] = settings(text, context, precision, *ways["compiled"])
    package = edited_package(tmp_path / "edited", [*EDITS[edit], *([] if edit in TO_CPP else [TRACED])])
    after = tmp_path / "after"
    after.mkdir()
    if (context, precision) not in UNEDITED:
        UNEDITED[context, precision] = run(ROOT, tmp_path, {"train": plain_runs})
    plain = UNEDITED[context, precision]
    assert "is edited" not in plain["kernels"]["backend"]
    assert plain["kernels"]["backend"].startswith("backend    our C kernels")
    found = run(package, after, {"train": runs, "inspect": ["as written"]})
    assert all(found[name]["status"] == 0 for name in runs)

    expected = found["as written"]["losses"]
    name = NAMED.get(edit, "attention.")
    assert f"not by our C kernels: {name}" in found["kernels"]["backend"], found["kernels"]["backend"]
    others = [*runs][2:]
    if "attention.py as written" in found["kernels"]["backend"]:
        assert found["kernels"]["losses"] == expected  # the reference trained: not a bit differs
    else:  # in a long context an edit elsewhere leaves PyTorch's fused attention
        others.append("kernels")
    if edit != "weigh a little":
        assert plain["as written"]["losses"] != expected
    for way in others:
        tolerance = 1e-3 if precision == "fp32" else 0.03
        for (split, loss), (also, other) in zip(found[way]["losses"], expected, strict=True):
            assert split == also
            assert loss == pytest.approx(other, rel=tolerance), way

    inspected = found["inspect as written"]
    assert inspected["texts"]["native"] == inspected["texts"]["auto"] == inspected["texts"]["torch"]
    assert inspected["standard"] != (edit in IN_THE_FORMULA or edit == "weigh a little")

    undone = run(ROOT, after, {"inspect": ["as written"]})["inspect as written"]
    if edit in NOT_IN_THE_FORWARD_PASS:
        assert "forward pass" not in undone["said"]
    else:
        assert "was trained with an edited forward pass" in undone["said"]
        assert undone["said"].count("\n") == 1
    if edit in ("match", "weigh", "rotate", "norm", "a new setting"):
        difference = torch.tensor(undone["weights"]) - torch.tensor(inspected["weights"])
        assert difference.abs().max() > 1e-3


def test_an_edit_of_weigh_trains_shows_and_generates(text: Path, tmp_path: Path) -> None:
    if "fp32" not in kernel_precisions():
        pytest.skip("this machine has no C kernels")
    check("weigh", 64, "fp32", False, text, tmp_path)


@pytest.mark.backends
@pytest.mark.parametrize("context", [64, 1024])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_trains_shows_and_generates(
    edit: str, precision: str, context: int, text: Path, tmp_path: Path
) -> None:
    if precision not in kernel_precisions():
        not_applicable(f"this processor has no C kernels in {precision}")
    # Compiled in one precision, at one length.
    check(edit, context, precision, (precision, context) == ("fp32", 64), text, tmp_path)
