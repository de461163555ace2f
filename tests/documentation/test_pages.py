"""The README and the pages it leads to are short, complete, and lead to places that exist."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from documentation.moving_picture import PICTURE, WORDS, Frame, draw
from documentation.settings_table import PAGE, with_tables

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / ".github").glob("*.md"))
ALL = [README, *PAGES, ROOT / "minitf/backends/README.md", ROOT / "minitf/benchmark/README.md"]
MAX_README_BYTES = 12_000
MAX_PICTURE_BYTES = 300_000


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead, without addresses on the web."""
    text = without_code(page.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [target for target in found if "://" not in target]


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= MAX_README_BYTES


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_place_that_exists(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_readme_leads_to_every_page(page: Path) -> None:
    for readme in (README, ROOT / ".github/README.zh.md"):
        linked = {(readme.parent / target.partition("#")[0]).resolve() for target in links(readme)}
        assert page in linked | {readme}, readme


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_of_many_sections_begins_with_its_contents(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    sections = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    if len(sections) <= 3 or page.name.startswith(("README", "three-steps", "what-if.zh")):
        return
    contents = re.findall(r"\]\(#([^)]+)\)", text[: text.index("\n## ")])
    assert set(contents) <= set(anchors(page))
    assert len(contents) == len(sections), f"{page.name}: {sections}"


def test_the_configuration_page_has_the_presets_and_settings_of_the_help_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python tests/documentation/settings_table.py"


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (
        re.findall(r"^```(?:bash|python)\n(.*?)^```", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for file in (README, ROOT / ".github/README.zh.md")
    )
    code = [re.sub(r" +#.*$", "", block, flags=re.MULTILINE) for block in english]
    assert code == [re.sub(r" +#.*$", "", block, flags=re.MULTILINE) for block in chinese]


def test_the_moving_picture_shows_each_frame_in_turn() -> None:
    weights = [0.01, 0.7, *[0.05] * 5]
    frames = [Frame(1, weights, [("<a>", 0.9)], 1.0, "one"), Frame(9, weights, [("b", 0.8)], 3.0, "two", forbidden=1)]
    drawn = list(ET.fromstring(draw(frames)).iter())
    times = [element.get("keyTimes") for element in drawn if element.tag.endswith("animate")]
    assert times == ["0;0.25000", "0;0.25000"]
    assert PICTURE.stat().st_size < MAX_PICTURE_BYTES
    picture = PICTURE.read_text(encoding="utf-8")
    assert {*WORDS, "purred", "step 100"} <= {element.text for element in ET.fromstring(picture).iter()}
