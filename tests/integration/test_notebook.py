"""The notebook runs from top to bottom as in a kernel: cell by cell, with the value of each cell."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from minitf.interpretability.attention_maps import AttentionMaps

NOTEBOOK = Path(__file__).parents[2] / ".github/notebook.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Execute a cell; returns the value of its last line if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def test_the_notebook_runs_from_top_to_bottom(workdir: Path, tiny: list[str], capsys: Any) -> None:
    pytest.importorskip("matplotlib", reason="install the extra minitf[test]").use("Agg")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)  # no outputs in git
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        source = "".join(cell["source"])
        # as short as other trainings in the tests
        settings = [*tiny, "experiment=quick", "trainer.max_minutes=null", "model.context_length=128"]
        source = source.replace('["experiment=quick"]', repr(settings))
        own = [word for word in tiny if not word.startswith(("data", "tokenizer", "model"))]
        source = source.replace('["experiment=pronouns"]', repr(["experiment=pronouns", *own]))
        shown.append(run_cell(source, names))
    assert shown[0] == 0
    (maps,) = [value for value in shown if isinstance(value, AttentionMaps)]
    assert maps._repr_html_().startswith("<iframe")
    printed = capsys.readouterr().out
    assert "1.0" in printed or "0.99" in printed
    assert printed.count("bits_per_byte") == 2
    assert any(isinstance(value, list) and len(value) == 5 for value in shown)
    assert all(f"{word:>8}: [" in printed for word in ("nothing", "cat", "queen"))
    assert (workdir / "it.png").stat().st_size > 5000
    assert [len(axes.patches) for axes in shown[-1].axes] == [0, 3]
