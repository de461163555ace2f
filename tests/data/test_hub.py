"""Data sets of the hub, read by the real `datasets` client from a stand-in on loopback."""

import functools
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import HubStandIn

from minitf.data.config import DataConfig
from minitf.data.resumable import ResumableIterator
from minitf.data.sources import hub as hub_module
from minitf.data.sources.pairs import open_pairs
from minitf.data.sources.text import open_text

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"document {i} of a data set." for i in range(400)]
CARD = b"""---
configs:
- config_name: one
  data_files:
  - {split: train, path: one/train*.parquet}
  - {split: test, path: one/test.parquet}
- config_name: two
  data_files: two.parquet
---
"""
# A process of its own, as the client reads its settings on import. It answers jobs, one line each.
CLIENT = """
import json, sys, time
real_sleep = time.sleep
time.sleep = lambda seconds: real_sleep(min(seconds, 0.01))  # the client waits 23 s before it gives up
from minitf.data import tokenize
from minitf.data.config import DataConfig
from minitf.data.sources.text import open_text
from minitf.data.tokenized_text import prepare
from minitf.errors import MinitfError
from minitf.tokenizer import TokenizerConfig
tokenize.GROUP_ITEMS = 16
for line in sys.stdin:
    job = json.loads(line)
    config = DataConfig(source="hub", **job["config"])
    try:
        if job["prepare"]:
            log = []
            found = prepare(config, TokenizerConfig(kind="byte"), log=log.append)
            files = {f.name: f.read_bytes().hex() for f in found.directory.iterdir() if f.suffix == ".bin"}
            answer = {"files": files, "log": log}
        else:
            corpus = open_text(config)
            answer = {"description": corpus.description, "bytes": corpus.num_bytes, "documents": corpus.num_documents}
            answer |= {part: [item.text for item in getattr(corpus, part)] for part in ("train", "val")}
    except MinitfError as error:
        answer = {"error": str(error), "status": error.exit_status}
    print(json.dumps(answer), flush=True)
"""


def parquet(texts: list[str], rows_per_group: int = 50) -> bytes:
    import pyarrow
    import pyarrow.parquet

    written = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, written, row_group_size=rows_per_group)
    return written.getvalue()


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def long_documents(count: int) -> list[str]:
    choose = random.Random(0).choices
    return [f"{i} " + "".join(choose("abcdefgh ", k=4000)) for i in range(count)]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    sets = {
        "plain": {"train.parquet": parquet(DOCUMENTS)},
        "lines": {
            "data/train-0.jsonl": jsonl(DOCUMENTS[:150]),
            "data/train-1.jsonl": jsonl(DOCUMENTS[150:]),
            "data/test.jsonl": jsonl(["held out"] * 3),
        },
        "configs": {
            "README.md": CARD,
            "one/train-0.parquet": parquet(DOCUMENTS[:170]),
            "one/train-1.parquet": parquet(DOCUMENTS[170:]),
            "one/test.parquet": parquet(["held out"]),
            "two.parquet": parquet(DOCUMENTS[::-1]),
        },
        "tagged": {"train.jsonl": jsonl(DOCUMENTS)},
        "tagged@v1": {"train.jsonl": jsonl(DOCUMENTS[:20])},
        "gated": {"train.parquet": parquet(DOCUMENTS)},
        "script": {"script.py": b"raise SystemExit('code was run')", "train.jsonl": jsonl(DOCUMENTS)},
        "empty": {"README.md": b""},
        "long": {f"train-{i}.jsonl": jsonl(long_documents(100)) for i in range(2)},
        "long_parquet": {f"train-{i}.parquet": parquet(long_documents(100), 10) for i in range(2)},
    }
    with HubStandIn({f"datasets/o/{name}": files for name, files in sets.items()}, {"datasets/o/gated"}) as stand_in:
        yield stand_in


class Client:
    def __init__(self, hub: HubStandIn, home: Path, **changes: str) -> None:
        settings = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60",
            "NO_PROXY": "*", "USE_TORCH": "0",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env={**os.environ, **settings, **changes}, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, path: str, prepare: bool = False, **settings: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        job = {"config": {"hub_path": path, **settings}, "prepare": prepare}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def read(self, path: str, **settings: Any) -> tuple[list[str], list[str]]:
        """The texts to train on, and those held out."""
        answer = self.ask(path, **settings)
        assert "error" not in answer, answer["error"]
        return answer["train"], answer["val"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(20)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def client(hub: HubStandIn, home: Path) -> Iterator[Client]:
    started = Client(hub, home)
    yield started
    started.close()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_by_name(client: Client, streaming: bool) -> None:
    held_out = DOCUMENTS[9::10]
    trained = [text for text in DOCUMENTS if text not in held_out]
    read = functools.partial(client.read, streaming=streaming)
    assert read("o/plain") == (trained, held_out)
    assert read("o/lines", hub_val_split="test") == (DOCUMENTS, ["held out"] * 3)
    first = DOCUMENTS[:-31:-1]
    assert read("o/configs", hub_name="two", max_documents=30) == (
        [text for text in first if text not in first[9::10]],
        first[9::10],
    )
    assert read("o/configs", hub_name="one", hub_split="test", hub_val_split="train") == (["held out"], DOCUMENTS)
    assert read("o/tagged", hub_revision="v1") == ([*DOCUMENTS[:9], *DOCUMENTS[10:19]], DOCUMENTS[9:20:10])


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        ("o/absent", {}, "o/absent is no data set of the hub, or a private one: check data.hub_path"),
        ("o/plain", {"hub_revision": "v7"}, "o/plain has no revision v7; check data.hub_revision"),
        ("o/configs", {}, "o/configs has several configurations; set data.hub_name, one of: one, two"),
        ("o/configs", {"hub_name": "x"}, "o/configs has no configuration 'x'; set data.hub_name, one of: one, two"),
        ("o/lines", {"hub_split": "x"}, "o/lines has no split 'x'; set data.hub_split, one of: train, test"),
        ("o/lines", {"hub_val_split": "x"}, "o/lines has no split 'x'; set data.hub_val_split, one of: train, test"),
        ("o/plain", {"text_column": "x"}, "o/plain has no column 'x'; set data.text_column, one of: id, text"),
        ("o/gated", {}, "o/gated is gated: accept its terms on http://127.0.0.1"),
        ("o/script", {}, "o/script is loaded by a program of its own (script.py), which is never run"),
        ("o/empty", {}, "doesn't contain any data files"),
    ],
)
def test_a_wrong_request_is_one_line(client: Client, path: str, settings: dict[str, Any], words: str) -> None:
    for streaming in (False, True):
        found = client.ask(path, streaming=streaming, **settings)
        assert found["status"] == 2
        assert words in found["error"]
        assert "\n" not in found["error"]
    if path == "o/gated":
        assert "hf auth login" in found["error"]


def test_a_dropped_connection_is_retried(hub: HubStandIn, client: Client) -> None:
    hub.sends_before_it_drops, hub.drops = 50_000, 3
    try:
        for path, streaming in (("o/long", True), ("o/long_parquet", True), ("o/long", False)):
            hub.drops = 3
            found = client.ask(path, streaming=streaming)
            assert hub.drops == 0
            assert sorted(found["train"] + found["val"]) == sorted(long_documents(100) * 2), path
    finally:
        hub.sends_before_it_drops, hub.drops = None, 0


@pytest.mark.parametrize("path", ["o/long", "o/long_parquet"])
def test_a_lost_connection_is_reported_and_the_preparation_resumed(
    hub: HubStandIn, client: Client, tmp_path: Path, path: str
) -> None:
    sent = hub.num_sent
    whole = client.ask(path, prepare=True, streaming=True, cache_dir=str(tmp_path / "a"))
    hub.dies_after = hub.num_sent + int(0.4 * (hub.num_sent - sent))
    try:
        found = client.ask(path, prepare=True, streaming=True, cache_dir=str(tmp_path / "b"))
    finally:
        hub.dies_after = None
    assert found["status"] == 1
    assert "cannot reach the Hugging Face hub" in found["error"]
    assert "are prepared: the same command resumes from there" in found["error"]
    again = client.ask(path, prepare=True, streaming=True, cache_dir=str(tmp_path / "b"))
    assert again["files"] == whole["files"]
    assert "resuming" in again["log"][0]


def test_a_slow_hub_is_awaited(hub: HubStandIn, client: Client) -> None:
    hub.delay_s = 0.05
    try:
        assert len(client.ask("o/tagged")["train"]) == 360
    finally:
        hub.delay_s = 0.0


@pytest.mark.slow
def test_a_silent_hub_times_out(hub: HubStandIn, home: Path) -> None:
    impatient = Client(hub, home, HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    hub.delay_s = 3.0
    try:
        found = impatient.ask("o/never")
    finally:
        hub.delay_s = 0.0
        impatient.close()
    assert found["status"] == 1
    assert "no answer from the hub" in found["error"]
    assert "HF_HUB_ETAG_TIMEOUT" in found["error"]


def test_an_unreachable_hub_falls_back_to_the_cache(hub: HubStandIn, client: Client, home: Path) -> None:
    known = client.ask("o/plain")
    hub.requests.clear()
    offline = Client(hub, home, HF_HUB_OFFLINE="1")
    try:
        assert offline.ask("o/plain") == known
        assert "HF_HUB_OFFLINE forbids" in offline.ask("o/script")["error"]
        assert "without the hub nothing says" in offline.ask("o/plain", hub_revision="v3")["error"]
        assert hub.requests == []
    finally:
        offline.close()
    hub.dies_after = -1
    try:
        found = client.ask("o/plain")
        assert found["train"] == known["train"]
        assert "from the cache, as the hub cannot be reached" in found["description"]
        found = client.ask("o/script")
        assert found["error"].startswith("cannot reach the Hugging Face hub for o/script")
    finally:
        hub.dies_after = None


# Interrupted and resumed


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shuffle_buffer", [0, 25])
def test_reading_resumes_exactly_at_any_item(tmp_path: Path, streaming: bool, shuffle_buffer: int) -> None:
    for number in range(3):
        texts = DOCUMENTS[number * 70 : (number + 1) * 70]
        (tmp_path / f"{number}.parquet").write_bytes(parquet(texts, 30))
    config = DataConfig(
        source="hub", hub_path="parquet", files=[str(tmp_path)], streaming=streaming, shuffle_buffer=shuffle_buffer
    )
    whole = [(item.text, item.held_out) for item in ResumableIterator(open_text(config).read)]
    texts = [text for text, _ in whole]
    assert sorted(texts) == sorted(DOCUMENTS[:210])
    assert (texts == DOCUMENTS[:210]) == (shuffle_buffer == 0)
    for stops in ([1], [24, 1], [25], [64, 2, 63], [69, 1, 1], [70], [100, 100], [209], [210]):
        seen, state = [], None
        for count in [*stops, 1000]:
            reader = ResumableIterator(open_text(config).read, state)
            seen += [(item.text, item.held_out) for _, item in zip(range(count), reader, strict=False)]
            state = json.loads(json.dumps(reader.state))
        assert seen == whole, stops


def test_the_shuffled_order_depends_on_the_seed(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.parquet").write_bytes(parquet(DOCUMENTS[number * 50 : (number + 1) * 50]))

    def first(**settings: Any) -> list[str]:
        config = DataConfig(source="hub", hub_path="parquet", files=[str(tmp_path)], max_documents=60, **settings)
        return [item.text for item in ResumableIterator(open_text(config).read)]

    drawn = first(streaming=True, shuffle_buffer=40)
    assert drawn == first(streaming=True, shuffle_buffer=40)
    assert drawn != first(streaming=True, shuffle_buffer=40, shuffle_seed=1)
    assert len(set(drawn)) == len(drawn) == 60
    assert not set(drawn) <= set(DOCUMENTS[:100])  # files are shuffled too
    assert first(shuffle_buffer=40) != DOCUMENTS[:60]


def test_hub_pairs_resume_and_count_bad_rows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "BLOCK_ROWS", 7)
    rows = [{"prompt": f"q{i}", "completion": "" if i % 5 == 0 else f"a{i}"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        kind="pairs", source="hub", hub_path="json", files=[str(tmp_path / "a.jsonl")], bad_rows="skip", streaming=True
    )
    whole = list(open_pairs(config))
    assert len(whole) == 40
    for count in (1, 6, 13, 30, 40):
        reader = ResumableIterator(open_pairs(config).read)
        seen = [pair for _, pair in zip(range(count), reader, strict=False)]
        pairs = open_pairs(config)
        seen += ResumableIterator(pairs.read, json.loads(json.dumps(reader.state)))
        assert seen == whole
        assert pairs.left_out.rows == {"bad": 10}
