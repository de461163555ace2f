"""The pages on variants: their example trains, and their tables name what exists."""

import re
from pathlib import Path

import pytest
from helpers import train_here

import minitf
from minitf.variants import attention_class, formula, names

FOLDER = Path(__file__).parents[2] / ".github"
PAGE = (FOLDER / "variants.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("page", ["what-if.md", "what-if.zh.md"])
def test_the_measured_tables_name_variants_that_exist(page: str) -> None:
    """A new variant need not be measured."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    named = re.findall(r"^\| (\w+) \| \d \|", text, flags=re.MULTILINE)
    assert set(named) <= set(names())
    assert len(named) == 2 * len(set(named)) == 22


def test_both_pages_have_the_same_commands_and_numbers() -> None:
    pages = [(FOLDER / name).read_text(encoding="utf-8") for name in ("what-if.md", "what-if.zh.md")]
    blocks = [re.findall(r"^```\w+\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL) for page in pages]
    assert blocks[0] == blocks[1]
    rows = [re.findall(r"^\| \w+ \|.*\|$", page, flags=re.MULTILINE) for page in pages]
    assert [re.findall(r"[\d.]+", row) for row in rows[0]] == [re.findall(r"[\d.]+", row) for row in rows[1]]
