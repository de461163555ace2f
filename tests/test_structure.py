"""The house is built as designed: modules import only what is above them, and importing does nothing."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minitf"
# From the bottom of the house up, room by room; a module may import only what stands before it.
ORDER = [
    "errors", "untrusted",
    "machine.storage", "machine.distributed", "machine.sharded", "machine.random_state",
    "machine.processor", "machine.hardware", "machine.c_library", "machine.cuda_program",
    "c_sources", "loss", "tokenizer",
    "data.books", "data.exercises", "data.data_config", "data.reading", "data.formats", "data.hub_data", "data.corpus",
    "data.pairs", "data.prepared", "data.preparation", "data.batches", "data.packing",
    "rope_scaling", "attention", "model", "optim", "kernels",
    "checkpoints.run_directory", "checkpoints.hugging_face", "checkpoints.runs", "checkpoints.train_state",
    "checkpoints.checkpoint", "checkpoints.saving", "checkpoints.model_card", "checkpoints.export",
    "decoding", "answer", "generate", "viewer",
    "interpretability.heads", "interpretability.alignment", "interpretability.attention_maps",
    "interpretability.attention_picture", "interpretability.attention_page",
    "tensorboard", "answer_scores", "evaluate", "language_model",
    "training.choices", "training.event_files", "training.monitor", "training.parallel",
    "training.captured", "training.training_step",
    "training.task", "training.looks", "training.resumption", "training.signals", "training.trainer_config",
    "training.trainer", "training.model_size", "training.narration",
    "help_page", "completion", "config", "dry_run", "run", "sweep", "train", "commands",
]  # fmt: skip
ROOMS = {name.partition(".")[0] for name in ORDER if "." in name}  # whose modules are ordered among themselves
# Beside the house: the commands that measure and torment it. They may import anything; nothing imports it.
BESIDE = {"benchmark", "faults"}
HEAVY = ("datasets", "tensorboard", "torch._dynamo", "torch.utils.tensorboard", "transformers", "hydra", "matplotlib")


def place(module: str) -> str:
    """What `module` (without "minitf.") stands as in the order: a module of a room, or its first name."""
    first, _, rest = module.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ROOMS and rest else first


def module_names() -> list[str]:
    files = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    places = {place(".".join(path.parts).removesuffix(".__init__")) for path in files}
    return sorted(places - {"__init__"} - ROOMS - BESIDE)


def is_test_of(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.If) and name in ast.unparse(node.test)


def imports(node: ast.AST) -> Iterator[str]:
    """Modules of minitf that are imported anywhere below `node`, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and (is_test_of(child, "TYPE_CHECKING") or is_test_of(child, "__main__")):
            continue
        if isinstance(child, ast.Import):
            yield from (place(alias.name[7:]) for alias in child.names if alias.name.startswith("minitf."))
        elif isinstance(child, ast.ImportFrom) and child.module and child.module.split(".")[0] == "minitf":
            _, _, name = child.module.partition(".")
            whole = not name or name in ROOMS  # `from minitf.data import corpus`: what is imported is a module
            yield from [place(f"{name}.{a.name}".strip(".")) for a in child.names] if whole else [place(name)]
        else:
            yield from imports(child)


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == module_names()


def test_the_readme_lists_the_modules_in_this_order() -> None:
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (    )?(\w+)(?:\.py|/) +\S", readme, flags=re.MULTILINE)
    listed, room = [], ""
    for inside, name in lines:
        room = room if inside else name
        listed.append(f"{room}.{name}" if inside else name)
    assert [name for name in listed if name not in ROOMS] == ORDER
    assert [name for name in listed if name in ROOMS] == list(
        dict.fromkeys(n.partition(".")[0] for n in ORDER if "." in n)
    )


@pytest.mark.parametrize("module", module_names())
def test_a_module_imports_only_those_before_it(module: str) -> None:
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    above = ORDER[ORDER.index(module) + 1 :] if module in ORDER else []
    for part in [path] if path.is_file() else sorted((PACKAGE / module).glob("*.py")):
        tree = ast.parse(part.read_text(encoding="utf-8"))
        assert not sorted(set(imports(tree)) & {*above, *BESIDE}), part.name
        assert ast.get_docstring(tree), f"{part.name} of {module} does not say what it is responsible for"


def test_the_check_sees_imports_wherever_they_are() -> None:
    source = """
from typing import TYPE_CHECKING
import minitf.data.corpus
from minitf import train
from minitf.data import batches
from minitf.model import Transformer
if TYPE_CHECKING:
    from minitf.training.monitor import Monitor
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
        "data.corpus",
        "model",
        "optim",
        "train",
        "training.trainer",
    ]


def test_importing_says_nothing_and_loads_nothing_heavy() -> None:
    """One process, module by module: the heavy ones are for those who use them."""
    code = f"""
import os, sys, importlib
os.environ.pop("MINITF_CACHE", None)
before = set(os.listdir("."))
import torch
for name in {ORDER!r}:
    importlib.import_module("minitf." + name)
    heavy = [h for h in {HEAVY!r} if h in sys.modules]
    heavy = [h for h in heavy if h != "hydra" or name not in ("config", "dry_run", "run", "sweep", "train", "commands")]
    assert not heavy, (name, heavy)
assert set(os.listdir(".")) == before
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_neither_training_nor_writing_imports_the_compiler(workdir: Path, tiny: list[str]) -> None:
    """A second or three of every start; some of PyTorch's functions import it in passing."""
    code = f"""
import sys
from minitf import generate, train
train.main({[*tiny, "trainer.max_steps=1", "trainer.sample_tokens=2", "trainer.attention_every=1"]!r})
generate.main(["The cat", "--max-tokens", "2"])
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_benchmark_loads_nothing_before_it_measures() -> None:
    """Its children are measured: what the parent imports must not be in them, nor slow `--list` down."""
    names = [path.stem for path in sorted((PACKAGE / "benchmark").glob("*.py")) if path.stem != "__init__"]
    code = f"""
import sys, importlib
for name in {names!r}:
    importlib.import_module("minitf.benchmark." + name)
    heavy = [h for h in {("torch", "numpy", *HEAVY)!r} if h in sys.modules]
    assert not heavy, (name, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for path in (PACKAGE / "benchmark").glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.name


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, minitf; assert 'torch' not in sys.modules; assert minitf.load; assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_scripts_are_thin() -> None:
    scripts = sorted((PACKAGE.parent / "scripts").glob("*.py"))
    assert {"attention.py", "benchmark.py", "evaluate.py", "generate.py"} <= {path.name for path in scripts}
    for path in scripts:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 15, path.name


def test_nothing_is_called_utils() -> None:
    assert not {"utils", "util", "common", "helpers", "misc"} & {path.stem for path in PACKAGE.rglob("*.py")}


def test_no_pickle_anywhere() -> None:
    others = PACKAGE / "benchmark/nanogpt.py"  # whose own files are pickles
    for path in set(PACKAGE.rglob("*.py")) - {others}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert "pickle" not in names, path.name
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.save", "torch.load"):
                pytest.fail(f"{path.name}:{node.lineno} uses pickle through {ast.unparse(node.func)}")
