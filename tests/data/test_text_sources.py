"""Text sources: their content, the held-out part, the pieces, and the errors for a user's mistakes."""

import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from minitf.data.config import DataConfig
from minitf.data.fingerprint import fingerprint
from minitf.data.sources import files as files_module
from minitf.data.sources import text as text_module
from minitf.data.sources.books import book_chapters
from minitf.data.sources.corpus import Item, is_held_out
from minitf.data.sources.text import open_text
from minitf.errors import RequestError

CONF = Path(__file__).parents[2] / "conf"


def text_of(rows: Iterable[Item]) -> str:
    return "".join(item.text for item in rows)


def files_config(*files: Path | str, **settings: object) -> DataConfig:
    return DataConfig(source="files", files=[str(file) for file in files], **settings)  # type: ignore[arg-type]


def split_of(config: DataConfig) -> tuple[str, str]:
    found = open_text(config)
    return text_of(found.train), text_of(found.val)


# Embedded books


@pytest.fixture(scope="module")
def kjv() -> list[str]:
    return book_chapters("kjv")


@pytest.fixture(scope="module")
def web() -> list[str]:
    return book_chapters("web")


def test_books_have_all_chapters_and_verses(kjv: list[str], web: list[str]) -> None:
    assert len(kjv) == len(web) == 1189
    assert sum(chapter.count("\n") for chapter in kjv) == 31_102
    assert sum(chapter.count("\n") for chapter in web) == 31_098  # without Luke 17:36, Acts 8:37, 15:34, 24:7
    assert kjv[0].startswith("In the beginning God created the heaven and the earth.\nAnd the earth was without form")
    assert kjv[-1].endswith("The grace of our Lord Jesus Christ be with you all. Amen.\n")
    assert kjv[499].startswith("My God, my God, why hast thou forsaken me?")
    assert web[499].startswith("My God, my God, why have you forsaken me?")


def test_books_are_plain_text(kjv: list[str], web: list[str]) -> None:
    for text in ("".join(kjv), "".join(web)):
        assert not re.search(r"[\[\]<>&¶`\d{}]|  |\( | \)|^ | $|\n\n", text, flags=re.MULTILINE)
    assert "darkness was upon the face of the deep" in kjv[0]  # printed as "[was]"
    headings = re.compile(r"(?:Psalm|BOOK|BEIT|GIMEL|Beloved|Friends|dummy)$|Psalm \d", flags=re.MULTILINE)
    assert not headings.search("".join(web))


def test_every_tenth_chapter_is_held_out_in_both_books(kjv: list[str], web: list[str]) -> None:
    for source, chapters in (("kjv", kjv), ("web", web)):
        found = open_text(DataConfig(source=source))
        train, val = ([item.text for item in rows] for rows in (found.train, found.val))
        assert val == chapters[9::10]
        assert train == [chapter for i, chapter in enumerate(chapters) if i % 10 != 9]
        assert not set(train) & set(val)
        assert all(item.end for item in found.train)
        assert "1,189 chapters, every tenth held out" in found.description
        assert found.separated


@pytest.mark.parametrize(("fraction", "every"), [(0.1, 10), (0.05, 20), (0.2, 5), (0.25, 4), (0.5, 2), (0.01, 100)])
def test_held_out_documents_are_evenly_spaced(fraction: float, every: int) -> None:
    assert [i for i in range(5000) if is_held_out(i, fraction)] == list(range(every - 1, 5000, every))


def test_probes_of_the_books_are_in_their_text(kjv: list[str], web: list[str]) -> None:
    for source, chapters in (("kjv", kjv), ("web", web)):
        probes = OmegaConf.load(CONF / "data" / f"{source}.yaml").probes
        at = [next(i for i, text in enumerate(chapters) if probe[:-1] in text.replace("\n", " ")) for probe in probes]
        assert at[0] == 0  # Genesis 1, trained on
        assert all(is_held_out(i, 0.1) for i in at[1:])


# Local files


def test_one_file_is_split_by_characters(tmp_path: Path) -> None:
    data = "".join(random.Random(0).choices("añ 世🎉\n\r", k=100_003))
    (tmp_path / "a.txt").write_text(data, encoding="utf-8", newline="")
    train, val = split_of(files_config(tmp_path / "a.txt"))
    n = len(data)
    assert train == data[: int(n * 0.9)]
    assert val == data[int(n * 0.9) :]
    assert not open_text(files_config(tmp_path / "a.txt")).separated


@pytest.mark.parametrize("alphabet", ["ab \n", "ab \r\n", "a", "日", "a \t", "🎉é "])
def test_pieces_are_bounded_and_join_to_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alphabet: str
) -> None:
    monkeypatch.setattr(text_module, "PIECE_CHARS", 64)
    monkeypatch.setattr(files_module, "READ_BYTES", 37)  # characters of several bytes are cut by reads
    data = "".join(random.Random(1).choices(alphabet, k=3001))
    (tmp_path / "a.txt").write_text(data, encoding="utf-8", newline="")
    found = open_text(files_config(tmp_path / "a.txt"))
    train, val = list(found.train), list(found.val)
    assert text_of(train) + text_of(val) == data
    assert max(len(item.text) for item in train + val) <= 64
    assert [item.end for item in train] == [False] * (len(train) - 1) + [True]


def test_pieces_are_cut_at_lone_newlines_then_lone_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "PIECE_CHARS", 16)

    def first(text: str) -> str:
        return next(text_module._pieces([text])).text

    assert first("one two\nthree four\nfive") == "one two\nthree"  # the newline is in the first half: too early
    assert first("one two three\nfour five") == "one two three\n"
    assert first("one two th\n\nree four five") == "one two th\n\nree"
    assert first("x\r\nabcdefg\r\nabcdefghi") == "x\r\nabcdefg\r\n"
    assert first("abcdefghijklmnopqrst") == "abcdefghijklmnop"


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/d.log", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else f"text of {name}\n")
    train, val = split_of(files_config(tmp_path))
    assert train == "text of a.md\ntext of b.txt\n"
    assert val == "text of sub/c.txt\n"
    train, val = split_of(files_config(tmp_path / "sub" / "*", tmp_path / "b.txt", tmp_path / "sub" / "c.txt"))
    assert (train, val) == ("text of sub/c.txt\ntext of sub/d.log\n", "text of b.txt\n")
    many = tmp_path / "many"
    many.mkdir()
    for i in range(30):
        (many / f"{i:02}.txt").write_text(f"{i:02}\n")
    assert split_of(files_config(many))[1] == "09\n19\n29\n"
    assert split_of(files_config(many, max_documents=3))[0] == "00\n01\n"


def test_what_is_hidden_in_a_folder_is_left_out_and_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", ".ipynb_checkpoints/a-checkpoint.txt", ".git/x/description.txt", "sub/.c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "._a.txt").write_bytes(b"\0\5\26\7\0Mac OS X")
    corpus = open_text(files_config(tmp_path))
    assert [item.text for item in corpus] == ["text of a.txt", "text of b.md"]
    assert corpus.summary == "2 files, 0.5 of them held out; left out: 4 hidden files"
    named = open_text(files_config(tmp_path / ".git/x", tmp_path / "sub/.c.txt"))
    assert text_of(named) == "text of .git/x/description.txttext of sub/.c.txt"


def test_a_file_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(name)
    Path("link.txt").symlink_to("a.txt")
    entries = ["a.txt", "./a.txt", str(tmp_path / "a.txt"), "link.txt", "*.txt", "."]
    assert text_of(open_text(files_config(*entries))) == "a.txtb.txt"


def test_a_text_that_is_trained_on_is_not_held_out_too(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number % 15}\n")
    corpus = open_text(files_config(tmp_path))
    assert text_of(corpus.val) == "text 9\n" * 2
    assert len(list(corpus)) == 30
    assert "every tenth held out, 3 repeated ones where the first is" in corpus.description


def test_newlines_are_kept_and_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xef\xbb\xbf")
    assert "".join(split_of(files_config(tmp_path / "a.txt"))) == "one\r\ntwo\rthree\n\ufeff"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\xff", r"a\.txt: invalid UTF-8 at byte 4"),
        ("é".encode() * 700_000 + b"\xc3", r"invalid UTF-8 at byte 1400000"),
        (b"\xef\xbb\xbfgood\xff", r"invalid UTF-8 at byte 7"),
        (b"x" * (1 << 20) + b"\xe4\xb8A", r"invalid UTF-8 at byte 1048576"),
        (b"\x89PNG\0\0", r"a\.txt: not a text file \(NUL at byte 4\)"),
        (b"", r"data\.files.*empty"),
        (b"x", r"too few"),
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(RequestError, match=message) as error:
        split_of(files_config(tmp_path / "a.txt"))
    assert "\n" not in str(error.value)


def test_one_bad_file_among_many_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"fine\xff")
    with pytest.raises(RequestError, match=r"b\.txt: invalid UTF-8 at byte 4"):
        split_of(files_config(tmp_path))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nope\.txt does not exist"):
        open_text(files_config("nope.txt"))
    (tmp_path / "x.log").touch()
    with pytest.raises(RequestError, match=r"no \.txt or \.md or .* file"):
        open_text(files_config(tmp_path))


# The hub


def test_local_json_lines_through_the_hub_loader(tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "line {i}", "label": {i}}}\n' for i in range(20))
    (tmp_path / "x.jsonl").write_text(lines + '{"text": "", "label": 0}\n')
    config = DataConfig(source="hub", hub_path="json", files=[str(tmp_path / "x.jsonl")])
    found = open_text(config)
    assert [item.text for item in found.val] == ["line 9", "line 19"]
    assert [(item.text, item.end) for item in found.train][:2] == [("line 0", True), ("line 1", True)]
    assert len(list(found.train)) == 18
    config = DataConfig(source="hub", hub_path="json", files=[str(tmp_path / "x.jsonl")], rows_are_documents=False)
    assert not any(item.end for item in open_text(config).train)
    config = DataConfig(source="hub", hub_path="json", files=[str(tmp_path / "x.jsonl")], text_column="texts")
    with pytest.raises(RequestError, match=r"no column 'texts'.*text, label"):
        open_text(config)
    config = DataConfig(source="hub", hub_path="json", files=[str(tmp_path / "x.jsonl")], text_column="label")
    with pytest.raises(RequestError, match=r"row 1: label holds int, not text; set data\.text_column"):
        list(open_text(config).train)
    (tmp_path / "y.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    config = DataConfig(source="hub", hub_path="json", files=[str(tmp_path / "y.jsonl")])
    with pytest.raises(RequestError, match=r"^cannot load json: [^\n]+$"):
        open_text(config)


def test_a_streamed_dataset_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(25)))
    splits = [
        split_of(
            DataConfig(
                source="hub", hub_path="json", files=[str(tmp_path / "x.jsonl")], streaming=streaming, max_documents=22
            )
        )
        for streaming in (False, True)
    ]
    assert splits[0] == splits[1]


def test_an_unreachable_hub_is_one_line() -> None:
    code = (
        "import sys\nfrom minitf.data.sources.text import *\nfrom minitf.errors import run_command\n"
        "sys.exit(run_command(lambda: print(open_text(DataConfig(source='hub', hub_path='nobody/nothing')))))"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PATH": "", "HOME": "/nonexistent"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert done.stderr == (
        "minitf: nobody/nothing is not in the cache, and HF_HUB_OFFLINE forbids downloading it; "
        "data=kjv and data=web work offline\n"
    )
    assert done.returncode == 1


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "pairs"}, r"data\.kind=pairs"),
        ({"source": "disk"}, r"data\.source=disk"),
        ({"source": "files"}, r"data\.files"),
        ({"source": "hub"}, r"data\.hub_path"),
        ({"val_fraction": 0.0}, r"data\.val_fraction"),
        ({"val_fraction": 0.9}, r"data\.val_fraction"),
        ({"max_documents": 0}, r"data\.max_documents"),
    ],
)
def test_bad_settings_name_their_key(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        DataConfig(**settings)  # type: ignore[arg-type]


def test_presets_fit_the_config() -> None:
    missing = {"text": r"data\.files", "pairs": r"data\.files", "hub": r"data\.hub_path"}
    for path in sorted((CONF / "data").glob("*.yaml")):
        assert path.read_text().startswith("# "), path
        composed = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(path))
        if path.stem in missing:
            with pytest.raises(RequestError, match=missing[path.stem]):
                OmegaConf.to_object(composed)
        else:
            data = OmegaConf.to_object(composed)
            assert data.probes or data.example or data.kind == "pairs", path


def test_a_renamed_file_is_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = fingerprint(files_config(tmp_path / "a.txt"))
    (tmp_path / "a.txt").rename(tmp_path / "b.md")
    assert fingerprint(files_config(tmp_path / "b.md")) == before
    (tmp_path / "b.md").rename(tmp_path / "b.json")  # read as a table
    assert fingerprint(files_config(tmp_path / "b.json")) != before


def test_the_fingerprint_depends_only_on_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = fingerprint(files_config(tmp_path / "a.txt"))
    assert before == fingerprint(files_config(tmp_path, probes=["x"], cache_dir="elsewhere"))
    assert before != fingerprint(files_config(tmp_path, val_fraction=0.2))
    (tmp_path / "a.txt").write_text("two")
    assert before != fingerprint(files_config(tmp_path / "a.txt"))
    assert fingerprint(DataConfig()) != fingerprint(DataConfig(source="web"))
