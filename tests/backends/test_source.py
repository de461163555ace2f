"""The hashes of the core: an edit of what a file says shows, an edit of how it looks does not."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from minitf.backends import source
from minitf.backends.autotune import backends
from minitf.backends.cuda.triton_kernels import TritonKernels
from minitf.model import ModelConfig, Transformer


def copy_with(tmp_path: Path, module: str, old: str, new: str) -> Path:
    """The core in a folder of its own, with one edit."""
    package = tmp_path / f"edited_{len(list(tmp_path.iterdir()))}"
    package.mkdir()
    for name in source.MODULES:
        shutil.copy(source.PACKAGE / f"{name}.py", package)
    text = (package / f"{module}.py").read_text(encoding="utf-8")
    assert old in text
    (package / f"{module}.py").write_text(text.replace(old, new, 1), encoding="utf-8")
    return package


def test_the_record_is_of_the_core_as_it_is() -> None:
    """After an edit that the backends follow: `python -m minitf.backends.source`."""
    record = json.loads(source.RECORD.read_text(encoding="utf-8"))
    assert record["definitions"] == {name: one.digest for name, one in source.definitions().items()}
    assert record["text"] == source.text_hash()
    assert record["core"] == source.core_hash() == source.parsed_core_hash() in record["forward"]
    model = Transformer(ModelConfig(num_layers=1, hidden_size=8, num_heads=1), 5)
    for backend in [*backends(model).values(), TritonKernels()]:
        known = {*source.definitions(), *(name.rsplit(".", 1)[0] for name in source.definitions())}
        assert set(backend.replaces) <= known, backend.name
        assert source.edited(backend.replaces) == []


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (
            "attention",
            "    return torch.softmax(scores_BHTS, dim=-1)",
            "    # why\n\n    return torch.softmax( scores_BHTS, dim=-1)",
        ),
        ("attention", '"""Turn each query\'s scores into', '"""Turn the scores of each query into'),
        ("attention", "    scores = torch.bmm(", "    scores = torch.bmm(\n        "),
        ("model", "class Block(nn.Module):", "class Block(nn.Module):  # one layer"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(tmp_path: Path, module: str, old: str, new: str) -> None:
    package = copy_with(tmp_path, module, old, new)
    assert source.edited(["model.Block"], package) == []
    assert source.core_hash(package) == source.core_hash()


@pytest.mark.parametrize(
    ("module", "old", "new", "names"),
    [
        (
            "attention",
            "torch.softmax(scores_BHTS, dim=-1)",
            "torch.softmax(0.99 * scores_BHTS, dim=-1)",
            ["attention.weigh"],
        ),
        ("attention", "math.sqrt(K)).reshape", "K).reshape", ["attention.match"]),
        ("attention", "F.rms_norm(x,", "F.layer_norm(x,", ["attention.RMSNorm.forward"]),
        (
            "attention",
            "return gather(weights_BHTS, v_BHSK)",
            "return 2 * gather(weights_BHTS, v_BHSK)",
            ["attention.Attention.gather"],
        ),
        ("rope", "second * cos + first * sin", "second * cos - first * sin", ["rope.rotate"]),
        ("model", "F.silu(gate_BTF)", "F.gelu(gate_BTF)", ["model.FeedForward.forward"]),
        (
            "model",
            "return x_BTD + self.dropout(self.mlp",
            "return 2 * x_BTD + self.dropout(self.mlp",
            ["model.Block.forward"],
        ),
        (
            "model",
            'attention: str = "auto"',
            'scale: float = 1.0\n    attention: str = "auto"',
            ["model.ModelConfig.class"],
        ),
    ],
)
def test_an_edit_is_named(tmp_path: Path, module: str, old: str, new: str, names: list[str]) -> None:
    package = copy_with(tmp_path, module, old, new)
    assert source.edited(["model.Block"], package) == names
    assert source.core_hash(package) != source.core_hash()


def test_functions_and_constants_are_followed_across_modules() -> None:
    assert {"rope.rotate", "attention.weigh", "attention.QUERY_BLOCK"} <= set(source.reached(["model.Block"]))
    assert {"optim.POLAR_EXPRESS", "optim._orthogonalise_by_factors"} <= set(source.reached(["optim.Muon"]))
    assert "loss.chunk_loss" not in source.reached(["model.Block"])


def test_nesting_counts_and_formatted_strings_are_text() -> None:
    def content(text: str) -> str:
        return source.content(ast.parse(text).body, text)

    assert content("if a:\n    b\nc\n") != content("if a:\n    b\n    c\n")
    assert (
        content('x = f"{a}  # {b!r:>{c}}"\n')
        == """[Assign(targets=[Name(id='x', ctx=Store())], value=f"{a}  # {b!r:>{c}}")]"""
    )
    assert content('def f():\n    """What."""\n    return 1, 2\n') == content(
        "def f():\n    'How.'\n    return (1,\n 2)\n"
    )
    assert content("x = 1") != content("x = 1.0") != content("x = True")


def test_checkpoints_of_another_core_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    standard, other = source.core_hash(), "0123456789abcdef"
    assert source.other_core(None) is None
    assert source.other_core(["damaged"]) is source.other_core("no hash") is None
    assert source.other_core(standard) is None
    assert f"with an edited forward pass ({other}), and here it is the standard one" in str(source.other_core(other))
    monkeypatch.setattr(source, "core_hash", lambda: other)
    monkeypatch.setattr(source, "edited", lambda roots: ["attention.weigh"])
    assert source.other_core(other) is None
    assert "standard forward pass, and attention.weigh is edited here" in str(source.other_core(standard))
