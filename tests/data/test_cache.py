"""A long preparation shows its progress, and resumes to the same bytes whatever stopped it."""

import io
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import make_text

from minitf.data import progress as progress_module
from minitf.data import tokenize, tokenized_pairs, tokenized_text
from minitf.data.cache import Partial
from minitf.data.config import DataConfig
from minitf.data.progress import Progress
from minitf.data.tokenized_pairs import prepare_pairs
from minitf.data.tokenized_text import prepare
from minitf.errors import MinitfError, RequestError, run_command
from minitf.tokenizer import TokenizerConfig

BPE = TokenizerConfig(vocab_size=300)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "GROUP_ITEMS", 10)
    monkeypatch.setattr(tokenize, "SAVE_EVERY_S", 0.0)


def text_data(tmp_path: Path) -> dict[str, Any]:
    """Settings of each kind of source, without a cache directory."""
    choose = random.Random(0)
    texts = [make_text(choose.randint(1, 9), seed) for seed in range(130)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "one.txt").write_text(make_text(8000))
    (tmp_path / "many").mkdir()
    for number, text in enumerate(texts[:60]):
        (tmp_path / "many" / f"{number:02}.md").write_text(text)
    rows = str(tmp_path / "rows.jsonl")
    return {
        "rows": {"source": "files", "files": [rows]},
        "one": {"source": "files", "files": [str(tmp_path / "one.txt")]},
        "many": {"source": "files", "files": [str(tmp_path / "many")]},
        "hub": {"source": "hub", "hub_path": "json", "files": [rows]},
        "streamed": {"source": "hub", "hub_path": "json", "files": [rows], "streaming": True, "shuffle_buffer": 30},
    }


@pytest.mark.parametrize("name", ["rows", "one", "many", "hub", "streamed"])
def test_interrupted_text_resumes_to_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("minitf.data.sources.text.PIECE_CHARS", 2000)
    settings = text_data(tmp_path)[name]
    whole = prepare(DataConfig(cache_dir=str(tmp_path / "a"), **settings), BPE, log=lambda _: None)
    data = DataConfig(cache_dir=str(tmp_path / "b"), **settings)
    groups, encode = 0, tokenized_text.encode_text
    lines: list[str] = []

    def failing(error: BaseException, after: int) -> None:
        def encode_some(*arguments: Any, **options: Any) -> Any:
            nonlocal groups
            groups += 1
            if groups > after:
                raise error
            return encode(*arguments, **options)

        nonlocal groups
        groups = 0
        monkeypatch.setattr(tokenized_text, "encode_text", encode_some)

    failing(KeyboardInterrupt(), 2)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; .* are prepared: the same command resumes from there$"):
        prepare(data, BPE, log=lines.append)
    failing(MinitfError("lost"), 1)
    with pytest.raises(MinitfError, match=r"^lost; .* are prepared: the same command resumes from there$"):
        prepare(data, BPE, log=lines.append)
    failing(OSError("broken"), 0)
    with pytest.raises(OSError, match="broken"):
        prepare(data, BPE, log=lines.append)
    monkeypatch.setattr(tokenized_text, "encode_text", encode)
    found = prepare(data, BPE, log=lines.append)
    assert files_of(found.directory) == files_of(whole.directory)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [found.directory.name]
    assert [line.split()[0] for line in lines] == ["preparing", "resuming", "resuming", "resuming", "prepared"]


def test_interrupted_pairs_resume_to_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": make_text(2, i), "completion": "" if i % 9 == 5 else make_text(1, i)} for i in range(120)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "kind": "pairs", "source": "files", "files": [str(tmp_path / "a.jsonl")], "bad_rows": "skip",
    }  # fmt: skip
    whole = prepare_pairs(DataConfig(cache_dir=str(tmp_path / "a"), **settings), BPE, log=lambda _: None)
    assert "; left out: 13 bad rows" in whole.description
    data = DataConfig(cache_dir=str(tmp_path / "b"), **settings)
    encode, groups = tokenized_pairs.encode_pairs, iter(range(100))

    def encode_some(*arguments: Any) -> Any:
        if next(groups) == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(tokenized_pairs, "encode_pairs", encode_some)
    with pytest.raises(KeyboardInterrupt, match="the same command resumes from there"):
        prepare_pairs(data, BPE, log=lambda _: None)
    assert files_of(prepare_pairs(data, BPE, log=lambda _: None).directory) == files_of(whole.directory)


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore it
from minitf.data import tokenize, tokenized_text
from minitf.data.config import DataConfig
from minitf.errors import run_command
from minitf.tokenizer import TokenizerConfig
tokenize.GROUP_ITEMS, tokenize.SAVE_EVERY_S = 10, 0.0
encode, groups = tokenized_text.encode_text, iter(range(1000))
def encode_some(*arguments, **options):
    if next(groups) == 6:
        os.kill(os.getpid(), int(sys.argv[1]))
    return encode(*arguments, **options)
tokenized_text.encode_text = encode_some
data = DataConfig(source="files", files=[sys.argv[2]], cache_dir=sys.argv[3])
sys.exit(run_command(lambda: tokenized_text.prepare(data, TokenizerConfig(vocab_size=300)) and 0))
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])  # SIGTERM ends like SIGKILL
def test_a_killed_preparation_is_resumed(tmp_path: Path, kind: signal.Signals) -> None:
    settings = text_data(tmp_path)["rows"]
    command = [sys.executable, "-c", KILLED, str(int(kind)), *settings["files"], str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == (130 if kind == signal.SIGINT else -kind)
    if kind == signal.SIGINT:
        assert done.stderr.splitlines()[-1].startswith("minitf: interrupted; 0.0 MB of text (")
        assert done.stderr.endswith(" are prepared: the same command resumes from there\n")
        assert "Traceback" not in done.stderr
    lines: list[str] = []
    found = prepare(DataConfig(cache_dir=str(tmp_path / "b"), **settings), BPE, log=lines.append)
    assert lines[0].startswith("resuming 130 documents of 1 files")
    whole = prepare(DataConfig(cache_dir=str(tmp_path / "a"), **settings), BPE, log=lines.append)
    assert files_of(found.directory) == files_of(whole.directory)


def test_partial_drops_what_was_appended_after_the_last_save(tmp_path: Path) -> None:
    partial = Partial(tmp_path, ("a.bin",))
    partial.append({"a.bin": b"kept"}, {"at": 1})
    partial.save()
    partial.append({"a.bin": b" and lost"}, {"at": 2})
    partial.close()
    partial = Partial(tmp_path, ("a.bin",))
    assert partial.state == {"at": 1}
    partial.append({"a.bin": b"!"}, {"at": 2})
    partial.close()
    assert (tmp_path / "a.bin").read_bytes() == b"kept!"
    (tmp_path / "a.bin").write_bytes(b"cut")  # shorter than at the last save: not resumable
    partial = Partial(tmp_path, ("a.bin",))
    partial.close()
    assert (partial.state, (tmp_path / "a.bin").read_bytes()) == ({}, b"")


def test_a_request_error_leaves_nothing_to_resume(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "fine"})] * 40 + [json.dumps({"text": 7})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    data = DataConfig(source="hub", hub_path="json", files=[str(tmp_path / "a.jsonl")], cache_dir=str(tmp_path / "c"))
    with pytest.raises(RequestError):
        prepare(data, BPE, log=lambda _: None)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_second_process_waits_and_uses_the_first_ones_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(cache_dir=str(tmp_path / "b"), **text_data(tmp_path)["rows"])
    code = (
        "import sys\nfrom minitf.data import config, tokenized_text\nencode = tokenized_text.encode_text\n"
        "def slow(*arguments, **options):\n    print('encoding', flush=True)\n    sys.stdin.readline()\n"
        "    return encode(*arguments, **options)\n"
        "tokenized_text.encode_text = slow\n"
        f"tokenized_text.prepare(config.{data!r}, tokenized_text.TokenizerConfig(vocab_size=300))\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert first.stdout
    assert first.stdin
    assert first.stdout.readline() == b"encoding\n"
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        first.stdin.close()  # type: ignore[union-attr]  # lets the first continue

    found = prepare(data, BPE, log=log)
    assert first.wait(300) == 0
    assert lines == ["another process is preparing the same text: waiting for it"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == [found.directory.name]


def test_without_locks_each_process_builds_in_its_own_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(path: Path) -> int:
        raise ImportError

    monkeypatch.setattr("minitf.data.cache._lock", no_locks)
    found = prepare(DataConfig(cache_dir=str(tmp_path / "b"), **text_data(tmp_path)["rows"]), BPE, log=lambda _: None)
    assert list((tmp_path / "b").iterdir()) == [found.directory]


# Progress


def test_progress_lines_show_share_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    progress = Progress(lines.append, "training the tokenizer")
    progress.start({"bytes": 4_000_000, "documents": 4}, {"bytes": 10_000_000, "documents": None})
    now = 105.0
    progress.update({"bytes": 4_500_000, "documents": 5})
    assert lines == []  # not more often than every ten seconds
    now = 120.0
    progress.update({"bytes": 6_000_000, "documents": 6})
    assert lines == ["preparing: 6 MB of text, 0.1 MB/s, 60%, 0:40 min left"]
    progress.start({"bytes": 0, "documents": 0}, {"bytes": None, "documents": 400})
    now = 140.0
    progress.update({"bytes": 1_000_000, "documents": 100})
    assert lines[-1] == "preparing: 1 MB of text, 0.1 MB/s, 25%, 1:00 min left"
    progress.start({"bytes": 0, "documents": 0}, {"bytes": None, "documents": None})
    now = 160.0
    progress.update({"bytes": 5_000_000, "documents": 1})
    assert lines[-1] == "preparing: 5 MB of text, 0.2 MB/s"


def test_a_terminal_shows_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    (tmp_path / "a.txt").write_text(make_text(2000))
    prepare(DataConfig(source="files", files=[str(tmp_path / "a.txt")], cache_dir=str(tmp_path / "c")), BPE)
    shown = sys.stderr.getvalue()
    assert shown.index("training the tokenizer") < shown.index("MB/s") < shown.index("prepared in")
    assert "100%, 0:00 min left" in shown


def test_the_message_of_an_interruption_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt("interrupted; half of it is kept")

    assert run_command(interrupted) == 130
    assert capsys.readouterr().err == "minitf: interrupted; half of it is kept\n"
