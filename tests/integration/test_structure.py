"""The order of the modules, what importing them may do, and what no file may contain."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "minitf"
TESTS = Path(__file__).parents[1]
# From the bottom up. A module has the place of the longest of these names that is a prefix of its own, and imports only
# modules of an earlier or the same place.
ORDER = [
    "errors", "system.cgroups", "system.memory", "system.safe_io", "system.files", "system.cpuinfo",
    "distributed", "training.rng", "system",
    "loss", "tokenizer", "data", "rope", "attention", "variants", "model", "edits", "optim", "distributed.optimizer",
    "backends", "checkpoints", "export", "inference", "generate", "viewer", "interpretability", "tensorboard",
    "evaluate", "evaluation", "api",
    "reporting", "training", "config", "completion", "runs", "cli", "train", "__main__",
]  # fmt: skip
# The benchmark may import anything; nothing imports it.
OUTSIDE = {"benchmark"}
HEAVY = ("datasets", "tensorboard", "torch._dynamo", "torch.utils.tensorboard", "transformers", "hydra", "matplotlib")


def place(module: str) -> int:
    """Index of `module` (without "minitf.") in the order."""
    found = [name for name in ORDER if f"{module}.".startswith(f"{name}.")]
    assert found, f"{module} has no place in the order"
    return ORDER.index(max(found, key=len))


def module_names() -> list[str]:
    files = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    names = (".".join(path.parts).removesuffix("__init__").rstrip(".") for path in files)
    return sorted(name for name in names if name and name.partition(".")[0] not in OUTSIDE)


def is_test_of(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.If) and name in ast.unparse(node.test)


def imports(node: ast.AST) -> Iterator[str]:
    """Modules of minitf imported anywhere below `node`, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and (is_test_of(child, "TYPE_CHECKING") or is_test_of(child, "__main__")):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name[7:] for alias in child.names if alias.name.startswith("minitf."))
        elif isinstance(child, ast.ImportFrom) and child.module and child.module.split(".")[0] == "minitf":
            _, _, name = child.module.partition(".")
            for alias in child.names:
                whole = f"{name}.{alias.name}".strip(".")
                path = PACKAGE / whole.replace(".", "/")
                yield whole if path.is_dir() or path.with_suffix(".py").is_file() else name
        else:
            yield from imports(child)


@pytest.mark.parametrize("module", module_names())
def test_a_module_imports_only_those_before_it(module: str) -> None:
    path = PACKAGE / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for imported in set(imports(tree)):
        assert imported.partition(".")[0] not in OUTSIDE
        assert place(imported) <= place(module), f"{module} imports {imported}"


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
import minitf.data.sources.text
from minitf import train
from minitf.data import batches
from minitf.model import Transformer
if TYPE_CHECKING:
    from minitf.reporting.reporter import RunReporter
def f():
    from minitf.training.trainer import Trainer
    try:
        import minitf.optim
    except ImportError:
        pass
if __name__ == "__main__":
    from minitf.errors import run_command
"""
    assert sorted(imports(ast.parse(source))) == [
        "data.batches",
        "data.sources.text",
        "model",
        "optim",
        "train",
        "training.trainer",
    ]


def test_importing_prints_nothing_and_loads_no_heavy_package() -> None:
    """Module by module in one process: a heavy package is imported where it is used, PyTorch not by `import minitf`."""
    names = [name for name in module_names() if not name.startswith("tensorboard.")]  # imported by TensorBoard only
    code = f"""
import os, sys, importlib
os.environ.pop("MINITF_CACHE", None)
before = set(os.listdir("."))
import minitf
assert "torch" not in sys.modules and minitf.load and "torch" in sys.modules
import torch
for name in {sorted(names, key=place)!r}:
    importlib.import_module("minitf." + name)
    heavy = [h for h in {HEAVY!r} if h in sys.modules]
    with_hydra = name.split(".")[0] in ("config", "completion", "runs", "train", "cli", "__main__")
    heavy = [h for h in heavy if h != "hydra" or not with_hydra]
    assert not heavy, (name, heavy)
assert set(os.listdir(".")) == before
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_training_and_generating_do_not_import_the_compiler(workdir: Path, tiny: list[str]) -> None:
    """It takes 1 to 3 s of every start, and some functions of PyTorch import it in passing."""
    code = f"""
import sys
from minitf import train
from minitf.cli import generate
train.main({[*tiny, "trainer.max_steps=1", "trainer.sample_tokens=2", "trainer.attention_every=1"]!r})
generate.main(["The cat", "--max-tokens", "2"])
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_benchmark_imports_nothing_heavy_before_it_measures() -> None:
    """It measures child processes, which inherit the memory of what the parent imports; and `--list` stays quick."""
    names = [path.stem for path in sorted((PACKAGE / "benchmark").glob("*.py")) if path.stem != "__init__"]
    code = f"""
import sys, importlib
for name in {names!r}:
    importlib.import_module("minitf.benchmark." + name)
    heavy = [h for h in {("torch", "numpy", *HEAVY)!r} if h in sys.modules]
    assert not heavy, (name, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for path in (PACKAGE / "benchmark").glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.name


def test_scripts_are_thin() -> None:
    scripts = sorted((PACKAGE.parent / "scripts").glob("*.py"))
    assert {"attention.py", "benchmark.py", "evaluate.py", "generate.py"} <= {path.name for path in scripts}
    for path in scripts:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 15, path.name


def test_no_test_module_imports_from_another() -> None:
    """Shared helpers and fixtures stand in modules of their own: helpers.py, conftest.py, the stand-ins."""
    modules = {path.stem for path in TESTS.rglob("test_*.py")} | {"conftest"}
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not modules.intersection(name.split(".")[-1] for name in names), path.name


def test_nothing_is_called_utils() -> None:
    assert not {"utils", "util", "common", "helpers", "misc"} & {path.stem for path in PACKAGE.rglob("*.py")}


def test_no_pickle_anywhere() -> None:
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "benchmark/nanogpt.py"}:  # nanoGPT's own files are pickles
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert "pickle" not in names, path.name
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.save", "torch.load"):
                pytest.fail(f"{path.name}:{node.lineno} uses pickle through {ast.unparse(node.func)}")
