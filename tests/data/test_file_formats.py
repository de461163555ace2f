"""Local files by their extension: every format gives the texts that were written to it."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from minitf.data.config import DataConfig
from minitf.data.fingerprint import fingerprint
from minitf.data.sources.text import open_text
from minitf.errors import RequestError

TEXTS = ['The cat,\nand "the" mat.', "naïve 世界\r\n", "", "third", *(f"document {i}" for i in range(4, 20))]
KEPT = [text for text in TEXTS if text]


def write(path: Path, column: str = "text") -> Path:
    """TEXTS in the format of the file's extension."""
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[1]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), column: TEXTS}), path)
        return path
    rows = [{"id": i, column: text} for i, text in enumerate(TEXTS)]
    if kind == "json":
        content = json.dumps(rows, indent=2)
    elif kind in ("jsonl", "ndjson"):
        content = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        import io

        written = io.StringIO()
        table = csv.writer(written, delimiter="\t" if kind == "tsv" else ",")
        table.writerows([["id", column], *enumerate(TEXTS)])
        content = written.getvalue()
    data = content.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pytest.importorskip("zstandard", reason="install the extra minitf[zst]").compress(data)
    path.write_bytes(data)
    return path


def read(config: DataConfig) -> tuple[list[str], list[str]]:
    corpus = open_text(config)
    parts = []
    for rows in (corpus.train, corpus.val):
        found = list(rows)
        assert all(item.end for item in found)
        parts.append([item.text for item in found])
    return parts[0], parts[1]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.zst", "A.JSONL"],
)
def test_a_row_of_a_table_is_a_document(tmp_path: Path, name: str) -> None:
    config = DataConfig(source="files", files=[str(write(tmp_path / name.lower()).rename(tmp_path / name))])
    train, val = read(config)
    assert val == [KEPT[9]]
    assert train == [text for text in KEPT if text != KEPT[9]]


def test_folders_globs_and_files_together(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz")
    write(tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("a plain text")
    (tmp_path / "d.log").write_text("not asked for")
    (tmp_path / "e.tar.gz").write_bytes(b"nor this")
    corpus = open_text(DataConfig(source="files", files=[str(tmp_path)]))
    assert sorted(item.text for item in corpus) == sorted([*KEPT, *KEPT, "a plain text"])
    assert corpus.summary.endswith("; left out: 2 empty rows, 2 other files")
    train, val = read(DataConfig(source="files", files=[f"{tmp_path}/a.*"], max_documents=5))
    assert [*train, *val] == KEPT[:5]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_is_decompressed(tmp_path: Path, suffix: str) -> None:
    text = "".join(f"line {i} – ü\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    packed = tmp_path / f"a.txt{suffix}"
    if suffix == ".gz":
        packed.write_bytes(gzip.compress(text.encode()))
    else:
        zstandard = pytest.importorskip("zstandard", reason="install the extra minitf[zst]")
        packed.write_bytes(zstandard.compress(text.encode()))

    def whole(path: Path) -> list[str]:
        config = DataConfig(source="files", files=[str(path)])
        corpus = open_text(config)
        return ["".join(item.text for item in rows) for rows in (corpus.train, corpus.val)]

    assert whole(packed) == whole(tmp_path / "a.txt")
    packed.write_bytes(packed.read_bytes()[:100])
    if suffix == ".gz":  # a zstd stream that ends early looks complete
        with pytest.raises(RequestError, match=r"a\.txt\.gz: damaged"):
            whole(packed)


def test_the_text_column_can_be_chosen(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", column="body")
    named = DataConfig(source="files", files=[str(file)], text_column="body")
    assert read(named)[1] == [KEPT[9]]
    assert fingerprint(named) != fingerprint(DataConfig(source="files", files=[str(file)]))
    with pytest.raises(RequestError, match=r"line 1: no column 'text', only id, body; set data\.text_column"):
        read(DataConfig(source="files", files=[str(file)]))
    with pytest.raises(RequestError, match="id holds int"):
        read(DataConfig(source="files", files=[str(file)], text_column="id"))
    with pytest.raises(RequestError, match=r"no column 'text', only id, body"):
        read(DataConfig(source="files", files=[str(write(tmp_path / "a.parquet", column="body"))]))


def test_quoted_lines_and_empty_lines_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,\n2,"two ""quoted""\nlines"\n\n3,three\n')
    corpus = open_text(DataConfig(source="files", files=[str(tmp_path / "a.csv")]))
    assert sorted(item.text for item in corpus) == ["three", 'two "quoted"\nlines']
    assert corpus.summary.endswith("; left out: 1 empty row")


def test_parquet_with_invalid_utf8_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["plain", "stuff"]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"stuff", b"st\xffff"))
    with pytest.raises(RequestError, match=r"a\.parquet: cannot be read as parquet: 'utf-8'"):
        read(DataConfig(source="files", files=[str(path)]))


def test_bad_rows_of_text_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\none,1\nHello, world,2\nonly text\n"Yes" he said,3\n\xff,4\ntwo,5\n,6\n')
    corpus = open_text(DataConfig(source="files", files=[str(path)], bad_rows="skip"))
    for _ in range(2):
        assert [item.text for item in corpus] == ["one", "two"]
        assert corpus.summary.endswith("; left out: 4 bad rows, 1 empty row")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text\nHello, world\n", "line 2: 2 columns, the header has 1"),
        ("a.csv", b"text,label\na,1\nonly text\n", "line 3: 1 column, the header has 2"),
        ("a.tsv", b"text\tlabel\na\t1\nonly text\n", "line 3: 1 column, the header has 2"),
        ("a.csv", b"text,text\na,b\n", "line 1: several columns are called 'text'"),
        ("a.csv", b'text\n"a\nb\n', "line 2: a field whose quotation marks do not match, up to line 3"),
        (
            "a.csv",
            b'text\n"a" b\n',
            "line 2: ',' expected after '\"'; inside a quoted field each",
        ),
        ("a.tsv", b'text\tx\n"a" b\tc\n', "line 2: .* expected after"),
        ("a.csv", b"text\na\rb\n", "line 2: new-line character seen in unquoted field"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2: not a JSON object"),
        ("a.json", b'{\n"text": "a"}', "line 1: not JSON .*; write one object a line, or one array of objects"),
        ("a.jsonl", b'{"text": Infinity}\n', "line 1: text holds float, not text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2: not JSON \("),
        ("a.jsonl", b'"a"\n', "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: text holds half a surrogate pair"),
        ("a.csv", b'text\n"a\n', "unexpected end of data"),
        ("a.csv", b'"a\nb",c\n1,2\n', "line 3: no column 'text', only a b, c; set"),
        ("a.csv", b"text\n\xff\xfe\n", "line 2: invalid UTF-8 at byte 0 of the line"),
        ("a.parquet", b"no", "cannot be read as parquet"),
        ("a.jsonl.gz", b"no", "damaged"),
        ("a.jsonl", b'{"text": "a"}\n', "1 documents with text are too few"),
    ],
)
def test_an_unreadable_table_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=words):
        read(DataConfig(source="files", files=[str(tmp_path / name)]))
