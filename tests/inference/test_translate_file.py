"""Translation of files: line by line, and resumed where it stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.errors import RequestError
from minitf.inference import seq2seq, translate_file
from minitf.inference.seq2seq import AnswerOptions


@pytest.fixture(scope="module")
def checkpoint(copying_run: Path) -> Checkpoint:
    return load_checkpoint(copying_run)


class Interrupting:
    """`answer_ids`, interrupted after some answers when asked to; `asked` counts the prompts of each call."""

    def __init__(self) -> None:
        self.stop_after: int | None = None
        self.asked: list[int] = []

    def __call__(self, model: Any, end_id: int, prompts: list[list[int]], options: Any) -> Iterator[Any]:
        self.asked.append(len(prompts))
        for number, item in enumerate(seq2seq.answer_ids(model, end_id, prompts, options)):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield item


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Interrupting:
    answering = Interrupting()
    monkeypatch.setattr(seq2seq, "BATCH_SIZE", 4)
    monkeypatch.setattr(translate_file, "answer_ids", answering)
    return answering


def translate(checkpoint: Checkpoint, directory: Path) -> str:
    return translate_file.translate_file(checkpoint, directory / "in.txt", directory / "out.txt", AnswerOptions())


def write_lines(directory: Path) -> None:
    lines = [letter * count for letter in "abcd" for count in range(1, 8)]
    (directory / "in.txt").write_text("\n".join(lines), encoding="utf-8")


def test_each_line_is_answered_on_its_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out" / "out.txt"
    lines = ["abc", "", "d" * 200, "ca", "dbdb"] * 30
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary = translate_file.translate_file(checkpoint, source, target, AnswerOptions())
    assert "150 lines" in summary
    assert "30 are too long for the context and left empty (line 3, 8" in summary
    assert target.read_text().splitlines() == ["abc", "", "", "ca", "dbdb"] * 30
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("num_answers", [0, 10])
def test_an_interrupted_translation_resumes(
    checkpoint: Checkpoint, tmp_path: Path, answering: Interrupting, num_answers: int
) -> None:
    write_lines(tmp_path)
    journal = tmp_path / ".out.txt.partial.jsonl"
    for stop_after in (num_answers, 2):  # interrupted twice
        answering.stop_after = stop_after
        with pytest.raises(KeyboardInterrupt):
            translate(checkpoint, tmp_path)
        assert not (tmp_path / "out.txt").exists()
        with journal.open("a") as file:
            file.write('[27, "cut o')  # as a kill in the middle of a write leaves it
    answering.stop_after = None
    assert f"{num_answers + 2} of them before" in translate(checkpoint, tmp_path)
    assert answering.asked == [28, 28 - num_answers, 26 - num_answers]
    assert (tmp_path / "out.txt").read_text().splitlines() == (tmp_path / "in.txt").read_text().splitlines()
    assert not journal.exists()


def test_answers_of_other_work_are_not_reused(checkpoint: Checkpoint, tmp_path: Path, answering: Interrupting) -> None:
    write_lines(tmp_path)
    journal = tmp_path / ".out.txt.partial.jsonl"
    journal.write_text(json.dumps({"identity": "of other work"}) + '\n[0, "wrong"]\n')
    translate(checkpoint, tmp_path)
    assert answering.asked == [28]
    assert (tmp_path / "out.txt").read_text().splitlines()[0] == "a"


def test_a_line_ends_with_a_newline_and_nothing_else(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """`str.splitlines` would also split at form feeds, U+0085 and U+2028. The model's alphabet is a to d."""
    for text, lines in {"ab\ncd": 2, "ab\r\ncd\r\n": 2, "\n\nab\n": 3, "": 0}.items():
        (tmp_path / "in.txt").write_bytes(text.encode())
        translate(checkpoint, tmp_path)
        assert (tmp_path / "out.txt").read_bytes().count(b"\n") == lines
    assert translate_file._lines_of(write(tmp_path, "a\u2028b\x0cc\x85d\re\r\nf")) == ["a\u2028b\x0cc\x85d\re", "f"]


def write(directory: Path, text: str) -> Path:
    (directory / "lines.txt").write_bytes(text.encode())
    return directory / "lines.txt"


@pytest.mark.parametrize("target", ["in.txt", "link.txt", "folder/../in.txt"])
def test_the_file_of_sources_is_never_replaced(checkpoint: Checkpoint, tmp_path: Path, target: str) -> None:
    write_lines(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.txt").symlink_to("in.txt")
    before = (tmp_path / "in.txt").read_bytes()
    with pytest.raises(RequestError, match="is the file that --file names"):
        translate_file.translate_file(checkpoint, tmp_path / "in.txt", tmp_path / target, AnswerOptions())
    assert (tmp_path / "in.txt").read_bytes() == before


def test_a_target_that_cannot_be_written_is_refused_before_any_answer(
    checkpoint: Checkpoint, tmp_path: Path, answering: Interrupting
) -> None:
    write_lines(tmp_path)
    with pytest.raises(RequestError, match="is a directory; name a file"):
        translate_file.translate_file(checkpoint, tmp_path / "in.txt", tmp_path, AnswerOptions())
    (tmp_path / "in.csv").write_text("source\nab\n")
    with pytest.raises(RequestError, match="a table; give a text with one source a line"):
        translate_file.translate_file(checkpoint, tmp_path / "in.csv", tmp_path / "out.txt", AnswerOptions())
    assert answering.asked == []
