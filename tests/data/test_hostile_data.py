"""Extreme inputs in small: they work, or one line says why not. Full sizes were measured by hand."""

import json
import random
from pathlib import Path

import pytest

from minitf.data.config import DataConfig
from minitf.data.sources import tables
from minitf.data.sources.text import open_text
from minitf.data.tokenized_pairs import prepare_pairs
from minitf.data.tokenized_text import prepare
from minitf.errors import RequestError
from minitf.tokenizer import TokenizerConfig

MANY = 20_000


def config(path: Path, **settings: object) -> DataConfig:
    return DataConfig(source="files", files=[str(path)], **settings)  # type: ignore[arg-type]


def write_empty(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text('{"text": ""}\n' * MANY)
    elif path.suffix in (".csv", ".tsv"):
        path.write_text("id" + {".csv": ",", ".tsv": "\t"}[path.suffix] + "text\n" + f"1{','}\n" * MANY)
        if path.suffix == ".tsv":
            path.write_text(path.read_text().replace(",", "\t"))
    else:
        path.mkdir()
        for number in range(300):
            (path / f"{number}.txt").touch()
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "folder"])
def test_a_corpus_of_empty_documents_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"^[^\n]*(0 documents with text are too few|the files are empty)[^\n]*$"):
        open_text(config(write_empty(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_empty_documents_are_skipped(tmp_path: Path, name: str) -> None:
    path = write_empty(tmp_path / name)
    with path.open("a") as file:
        for number in range(20):
            file.write(f'{{"text": "text {number:04}"}}\n' if name == "a.jsonl" else f"{number},text {number:04}\n")
    found = prepare(config(path, cache_dir=str(tmp_path / "cache")), TokenizerConfig(kind="byte"), log=lambda _: None)
    assert (found.train_bytes, found.val_bytes) == (18 * 9, 2 * 9)


@pytest.mark.parametrize("alphabet", ["a", "abcdefghij", "世"])
def test_text_without_newlines_is_encoded_exactly(tmp_path: Path, alphabet: str) -> None:
    text = "".join(random.Random(0).choices(alphabet, k=300_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = config(tmp_path / "a.txt", cache_dir=str(tmp_path / "cache"))
    found = prepare(data, TokenizerConfig(kind="bpe", train_megabytes=0.1), log=lambda _: None)
    assert found.tokenizer.decode(found.train.tolist()) + found.tokenizer.decode(found.val.tolist()) == text


@pytest.mark.parametrize(
    ("name", "begin", "words"),
    [
        ("a.jsonl", '{"text": "', "line 1 is longer than"),
        ("a.csv", 'text\n"', "line 2 is longer than"),
        ("b.csv", 'text\n"' + "a\n" * 3000, "field larger than field limit"),
    ],
)
def test_an_endless_row_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: str, words: str
) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 5000)
    (tmp_path / name).write_text(begin + "a" * 4000 * (name != "b.csv") + "b" * 4000)
    with pytest.raises(RequestError, match=words):
        open_text(config(tmp_path / name))


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    for seed in range(5):
        (tmp_path / "a.txt").write_bytes(random.Random(seed).randbytes(100_000))
        with pytest.raises(RequestError, match=r"^[^\n]*(not a text file|invalid UTF-8 at byte)[^\n]*$"):
            open_text(config(tmp_path / "a.txt"))


def test_empty_pairs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "", "completion": ""}) + "\n" + "{}\n" * 1000)
    with pytest.raises(RequestError, match="prompt is empty"):
        prepare_pairs(
            config(tmp_path / "a.jsonl", kind="pairs", cache_dir=str(tmp_path / "c")), TokenizerConfig(kind="byte")
        )
