"""The page .github/variants.md: its example trains, and its tables name what exists."""

import re
from pathlib import Path

import pytest
from helpers import train_here

import minitf
from minitf.variants import attention_class, formula, names

PAGE = (Path(__file__).parents[2] / ".github/variants.md").read_text(encoding="utf-8")


def test_the_example_of_ones_own_attention_trains(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands themselves are run by tests/integration/test_readme.py."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workdir / "config"))
    (source,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    name = source.splitlines()[0].removeprefix("# ")
    (workdir / name).write_text(source)
    assert f"model.attention_class={name}:MyAttention" in PAGE
    settings = [f"model.attention_class={name}:MyAttention", "trainer.max_steps=2", "run_dir=own"]
    assert train_here(*tiny, *settings) == 0
    maps = minitf.load("own").attention("The cat sat")
    assert maps.formula == "weigh: weights = softmax(scores / 2)"


def test_the_table_has_every_variant_and_the_step_it_changes() -> None:
    found = dict(re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \|", PAGE, flags=re.MULTILINE))
    expected = {name: formula(attention_class(name)).partition(":")[0] for name in names() if name != "softmax"}
    assert found == expected


def test_its_measured_table_has_every_variant() -> None:
    assert set(re.findall(r"^\| (\w+) \| [\d.]+ \|", PAGE, flags=re.MULTILINE)) == set(names())
