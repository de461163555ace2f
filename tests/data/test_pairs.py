"""Pairs from all sources: recognised, complete, and a bad row reported by its number."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from minitf.data.config import DataConfig
from minitf.data.fingerprint import fingerprint
from minitf.data.sources.books import aligned_verses
from minitf.data.sources.corpus import Item
from minitf.data.sources.pairs import open_pairs
from minitf.data.sources.synthetic import EXERCISES, exercise_pairs
from minitf.errors import RequestError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(25)]


def config_of(path: Path, **settings: Any) -> DataConfig:
    return DataConfig(kind="pairs", source="files", files=[str(path)], **settings)


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, **settings: Any) -> list[Item]:
    return list(open_pairs(config_of(path, **settings)))


def test_all_formats_give_the_same_pairs(tmp_path: Path) -> None:
    from datasets import Dataset

    write_json(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "e.parquet"))
    expected = [Item((row["prompt"], row["completion"]), i % 10 == 9) for i, row in enumerate(ROWS)]
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == expected, path.name


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_give_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    def pack(data: bytes) -> bytes:
        if suffix == ".gz":
            return gzip.compress(data)
        zstandard = pytest.importorskip("zstandard", reason="install the extra minitf[zst]")
        half = len(data) // 2  # several frames, as parallel compressors write them
        return b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))

    table = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
    contents = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "b.json": json.dumps(ROWS),
        "c.csv": table,
        "d.tsv": table.replace(",", "\t"),
    }
    expected = [Item((row["prompt"], row["completion"]), i % 10 == 9) for i, row in enumerate(ROWS)]
    for name, content in contents.items():
        path = tmp_path / (name + suffix)
        path.write_bytes(pack(content.encode()))
        assert read(path) == expected, name
        path.write_bytes(b"damage" + path.read_bytes()[6:])
        with pytest.raises(RequestError, match="damaged"):
            read(path)


def test_quotes_newlines_and_tabs_are_kept(tmp_path: Path) -> None:
    row = {"prompt": 'a "quoted", text\nof two lines', "completion": "ünï 世界 \t tab"}
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows([row, row])
    for path in (tmp_path / "a.csv", write_json(tmp_path / "a.jsonl", [row, row])):
        assert [pair.texts for pair in read(path)] == [(row["prompt"], row["completion"])] * 2


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "said"),
    [
        ({"source": "s", "target": "t"}, "s", "t", "source -> target"),
        ({"id": 3, "question": "q", "answer": 42}, "q", "42", "question -> answer"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2", "3", "instruction and input -> output"),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "Sing.", "La", "instruction -> output"),
        ({"translation": {"en": "cat", "fr": "chat"}}, "cat", "chat", "translation, en -> fr"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                ]
            },
            "Be kind.\nHi",
            "Hello",
            "messages, earlier turns -> last answer",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            "Hi",
            "Hello",
            "conversations, earlier turns -> last answer",
        ),
    ],
)
def test_usual_columns_are_recognised(
    tmp_path: Path, row: dict[str, Any], prompt: str, completion: str, said: str
) -> None:
    corpus = open_pairs(config_of(write_json(tmp_path / "a.jsonl", [row, row])))
    assert [pair.texts for pair in corpus] == [(prompt, completion)] * 2
    assert corpus.summary.endswith(said + ("; not used: id" if "id" in row else ""))


def test_columns_are_decided_for_each_row(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Say hello.", "output": "Hello!"},
        {"instruction": "Translate.", "input": "cat", "output": "chat", "id": 7},
        {"instruction": "Sing.", "input": float("nan"), "output": "La"},
        {"question": "Who did it?", "context": "Ann did it.", "answer": "Ann", "input": ""},
        {"translation": {"en": "dog", "fr": "chien"}},
        {"translation": {"fr": "chat", "en": "cat"}},
    ]
    pairs = [
        ("Say hello.", "Hello!"), ("Translate.\ncat", "chat"), ("Sing.", "La"), ("Who did it?\nAnn did it.", "Ann"),
        ("dog", "chien"), ("cat", "chat"),
    ]  # fmt: skip
    said = (
        "instruction -> output, instruction and input -> output, question and context -> answer, "
        "translation, en -> fr; not used: id"
    )
    corpus = open_pairs(config_of(write_json(tmp_path / "a.jsonl", rows)))
    assert [pair.texts for pair in corpus] == pairs
    assert corpus.summary.endswith(said)
    hub = DataConfig(kind="pairs", source="hub", hub_path="json", files=[str(tmp_path / "a.jsonl")])
    assert [pair.texts for pair in open_pairs(hub)] == pairs


def test_the_columns_can_be_chosen(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.jsonl", [{"prompt": "no", "old": "thou", "new": "you", "completion": "no"}] * 2)
    assert read(path, prompt_column="old", completion_column="new")[0].texts == ("thou", "you")
    with pytest.raises(RequestError, match=r"no column 'older' \(data\.prompt_column\), only prompt, old, new"):
        read(path, prompt_column="older")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": " ", "completion": "x"}', "line 2: prompt is empty"),
        ('{"prompt": "x"}', "line 2: completion is missing"),
        ('{"prompt": "x", "completion": NaN}', "line 2: completion is missing"),
        ('{"prompt": null, "completion": "y"}', "line 2: prompt is missing"),
        ('{"prompt": "x", "completion": -Infinity}', "line 2: completion is -inf, which is no value"),
        ('{"prompt": "x", "completion": true}', "line 2: completion holds bool, not text"),
        ('{"prompt": "x", "completion": ["y"]}', "line 2: completion holds list, not text"),
        ('{"prompt": "x"', "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"prompt": "x\\udc00", "completion": "y"}', "line 2: prompt holds half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_or_left_out(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        read(path)
    corpus = open_pairs(config_of(path, bad_rows="skip"))
    for _ in range(2):
        assert len(list(corpus)) == 2
        assert corpus.left_out.rows == {"bad": 1}


def test_a_missing_number_of_a_parquet_file_is_a_bad_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a", "b", "c"], "completion": pyarrow.array([1.0, float("nan"), None])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RequestError, match="row 2: completion is missing"):
        read(tmp_path / "a.parquet")
    assert [pair.texts for pair in read(tmp_path / "a.parquet", bad_rows="skip")] == [("a", "1.0")]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_stray_quotation_mark_is_refused_with_its_line(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / {",": "a.csv", "\t": "a.tsv"}[delimiter]
    path.write_text('prompt,completion\na,b\nc,"d\ne,f\ng,h\n'.replace(",", delimiter))
    for bad_rows in ("error", "skip"):  # which rows are whole is unknown: they are not left out either
        with pytest.raises(RequestError, match="line 3: a field whose quotation marks do not match, up to line 5"):
            read(path, bad_rows=bad_rows)
    path.write_text('prompt,completion\n"Yes" he said,"Oui" dit-il\nb,c\n'.replace(",", delimiter))
    with pytest.raises(RequestError, match=r"line 2: .* expected after"):
        read(path)
    assert [pair.texts for pair in read(path, bad_rows="skip")] == [("b", "c")]


def test_invalid_utf8_is_reported_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,completion\na,b\ncafé,d\n".encode("latin-1"))
    with pytest.raises(RequestError, match=r"line 3: invalid UTF-8 at byte 3 of the line"):
        read(path)
    path.write_bytes(b"prompt,completion\na,b,c\n")
    with pytest.raises(RequestError, match=r"line 2: 3 columns, the header has 2"):
        read(path)


def test_invalid_utf8_inside_a_quoted_field_makes_its_row_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\na,b\n"c\n\xff\nc",d\n' + b"".join(b"e,%d\n" % i for i in range(20)))
    with pytest.raises(RequestError, match="line 4: invalid UTF-8 at byte 0 of the line"):
        read(path)
    assert [pair.texts for pair in read(path, bad_rows="skip")] == [("a", "b"), *(("e", str(i)) for i in range(20))]


def test_files_without_pairs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(RequestError, match=r"not from .*a\.txt"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(RequestError, match="no rows"):
        read(tmp_path / "b.jsonl")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(RequestError, match="cannot be read as parquet"):
        read(tmp_path / "c.parquet")
    with pytest.raises(RequestError, match=r"data\.source=kjv is not known for data\.kind=pairs"):
        DataConfig(kind="pairs", source="kjv")
    write_json(tmp_path / "d.jsonl", [{"a": "1", "b": "2"}])
    with pytest.raises(RequestError, match=r"none of its columns .*\(a, b\); set data\.prompt_column"):
        read(tmp_path / "d.jsonl")


def test_a_pair_that_is_trained_on_is_not_held_out_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 15}", "completion": "x"} for i in range(30)]
    pairs = read(write_json(tmp_path / "a.jsonl", rows))
    assert [pair.texts[0] for pair in pairs if pair.held_out] == ["9", "9"]
    assert len(pairs) == 30


def test_a_hub_data_set_of_pairs(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)])
    data = DataConfig(kind="pairs", source="hub", hub_path="json", files=[str(tmp_path / "a.jsonl")])
    pairs = list(open_pairs(data))
    assert [pair.texts[0] for pair in pairs] == [f"q{i}" for i in range(20)]
    assert [pair.texts[0] for pair in pairs if pair.held_out] == ["q9", "q19"]


@pytest.mark.slow
def test_verses_are_aligned_by_number() -> None:
    chapters = aligned_verses()
    assert len(chapters) == 1189
    assert sum(map(len, chapters)) == 31_095
    assert chapters[0][0] == (
        "In the beginning God created the heaven and the earth.",
        "In the beginning God created the heavens and the earth.",
    )
    pairs = list(open_pairs(DataConfig(kind="pairs", source="kjv_to_web")))
    held_out = [pair.texts[0] for pair in pairs if pair.held_out]
    assert len(held_out) == 3056
    assert "Thou shalt not bear false witness against thy neighbour." in held_out
    assert not any(pair.texts[1].count('"') % 2 for pair in pairs)


@pytest.mark.parametrize("name", EXERCISES)
def test_exercises_are_correct_and_held_out_pairs_are_not_trained_on(name: str) -> None:
    pairs = list(open_pairs(DataConfig(kind="pairs", source=name, num_pairs=2000)))
    assert len({pair.texts[0] for pair in pairs}) == 2000
    assert sum(pair.held_out for pair in pairs) == 200
    assert [pair.texts for pair in pairs] == list(exercise_pairs(name, 2000))
    for (prompt, completion), *_ in pairs:
        if name == "addition":
            assert int(completion) == sum(map(int, prompt.split("+")))
        else:
            wanted = {"copy": prompt, "reverse": prompt[::-1], "sort": "".join(sorted(prompt))}
            assert completion == wanted[name]


def test_the_fingerprint_depends_on_pairs_and_columns(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.jsonl", ROWS)
    first = fingerprint(config_of(path))
    assert fingerprint(config_of(path)) == first
    assert fingerprint(config_of(path, prompt_column="completion", completion_column="prompt")) != first
    write_json(path, ROWS[:-1])
    assert fingerprint(config_of(path)) != first
