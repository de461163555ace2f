"""The package stays readable: short functions, few dependencies of the start, a core free of speed machinery."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "minitf"
MAX_FUNCTION_LINES = 50
MAX_CORE_LINES = 480  # of attention.py and model.py together
MAX_START_MODULES = 12
CORE = ("attention.py", "model.py", "loss.py", "optim.py")
SPEED = re.compile(r"kernel|compile|triton|fsdp|cuda", re.IGNORECASE)
# Lines of the core that may hold one of those words: which device a tensor is on, and how much memory that has.
DEVICE_CHECK = re.compile(r"""is_cuda|device\.type\b.*["']cuda["']|torch\.cuda\.get_device_properties""")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions() -> Iterator[tuple[int, str]]:
    """Length in lines and place of every function, decorators and nested functions included."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                assert node.end_lineno is not None
                yield node.end_lineno - first + 1, f"{path.relative_to(PACKAGE)}:{first} {node.name}"


def test_functions_are_short() -> None:
    long = sorted((found for found in functions() if found[0] > MAX_FUNCTION_LINES), reverse=True)
    assert not long, f"{len(long)} functions of more than {MAX_FUNCTION_LINES} lines: {long}"


def test_a_run_starts_from_few_modules() -> None:
    imported = {
        node.module
        for node in ast.walk(tree_of(PACKAGE / "runs/start.py"))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minitf.")
    }
    assert len(imported) <= MAX_START_MODULES, sorted(imported)


def test_attention_and_model_fit_on_a_few_pages() -> None:
    lines = [line for name in CORE[:2] for line in (PACKAGE / name).read_text(encoding="utf-8").splitlines()]
    assert len(lines) <= MAX_CORE_LINES
    assert max(map(len, lines)) <= 120  # the limit is not met by packing
    assert not [line for line in lines if "fmt: skip" in line]


@pytest.mark.parametrize("name", CORE)
def test_the_core_does_not_mention_what_makes_it_fast(name: str) -> None:
    lines = enumerate((PACKAGE / name).read_text(encoding="utf-8").splitlines(), start=1)
    found = [f"{number}: {line.strip()}" for number, line in lines if SPEED.search(line)]
    assert not [line for line in found if not DEVICE_CHECK.search(line)]
