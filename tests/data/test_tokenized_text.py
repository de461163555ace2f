"""Text as ids on disk: nothing lost, one entry for each text and tokenizer, damage repaired."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minitf.data import cache, tokenize, tokenized_text
from minitf.data.batches import Batches
from minitf.data.cache import Builder
from minitf.data.config import DataConfig
from minitf.data.fingerprint import cache_key, fingerprint
from minitf.data.sources import books
from minitf.data.sources import text as text_source
from minitf.data.tokenized_text import prepare
from minitf.data.tokenizer_training import evenly_sampled, first_texts
from minitf.errors import MinitfError, RequestError
from minitf.tokenizer import Tokenizer, TokenizerConfig

ROOT = Path(__file__).parents[2]
BYTE = TokenizerConfig(kind="byte")


def quiet(line: str) -> None:
    pass


def text_config(tmp_path: Path, text: str, **settings: object) -> DataConfig:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    return DataConfig(source="files", files=[str(tmp_path / "a.txt")], cache_dir=str(tmp_path / "cache"), **settings)  # type: ignore[arg-type]


def sample_text(num_chars: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcde \né世", k=num_chars))


def test_ids_decode_to_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_source, "PIECE_CHARS", 500)
    monkeypatch.setattr(tokenize, "GROUP_BYTES", 1200)
    text = sample_text(20_000)
    for config in (BYTE, TokenizerConfig(kind="char"), TokenizerConfig(vocab_size=300)):
        found = prepare(text_config(tmp_path, text), config, log=quiet)
        assert found.tokenizer.decode(found.train.tolist()) == text[:18_000]
        assert found.tokenizer.decode(found.val.tolist()) == text[18_000:]
        assert found.train_bytes == len(text[:18_000].encode())
        assert found.val_bytes == len(text[18_000:].encode())
        assert found.train.dtype == np.uint16
        assert not found.train.flags.writeable
        assert found.tokenizer.end_id not in found.train


def test_an_end_of_text_token_follows_each_document(tmp_path: Path) -> None:
    found = prepare(DataConfig(cache_dir=str(tmp_path)), BYTE, log=quiet)
    chapters = books.book_chapters("kjv")
    assert (found.train == 256).sum() == 1071
    assert (found.val == 256).sum() == 118
    ids = found.val.tolist()
    assert bytes(ids[: ids.index(256)]).decode() == chapters[9]
    assert found.val_bytes == sum(len(chapter.encode()) for chapter in chapters[9::10])
    assert len(found.val) == found.val_bytes + 118


def test_a_document_in_pieces_has_one_end_of_text_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_source, "PIECE_CHARS", 100)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 999)
    data = DataConfig(source="files", files=[str(tmp_path)], cache_dir=str(tmp_path / "cache"))
    assert (
        bytes(i if i < 256 else 33 for i in prepare(data, BYTE, log=quiet).train)
        == b"a" * 999 + b"!" + b"b" * 999 + b"!"
    )


def test_large_vocabularies_are_stored_as_uint32(tmp_path: Path) -> None:
    given = Tokenizer.load(prepare(text_config(tmp_path, sample_text(1000)), BYTE, log=quiet).directory)
    given.backend.add_tokens([f"<token {i}>" for i in range(65_536)])
    found = prepare(text_config(tmp_path, sample_text(1000)), BYTE, tokenizer_from=Tokenizer(given.backend), log=quiet)
    assert found.train.dtype == np.uint32


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    first = prepare(text_config(tmp_path, sample_text(2000)), TokenizerConfig(vocab_size=270), log=quiet)
    other = text_config(tmp_path, sample_text(3000, seed=1))
    found = prepare(other, BYTE, tokenizer_from=first.tokenizer, log=quiet)
    assert found.tokenizer.to_json() == first.tokenizer.to_json()
    assert found.tokenizer.decode(found.train.tolist()) == sample_text(3000, seed=1)[:2700]
    pretrained = prepare(other, TokenizerConfig(kind="pretrained", file=str(first.directory)), log=quiet)
    assert pretrained.directory == found.directory


@pytest.mark.slow
def test_a_cache_hit_loads_no_source_and_prints_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom minitf.data.tokenized_text import *\n"
        f"found = prepare(DataConfig(cache_dir={str(tmp_path)!r}), TokenizerConfig(vocab_size=300))\n"
        "print(len(found.train), *({'datasets', 'pythonbible', 'rich'} & set(sys.modules)))"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        for _ in range(2)
    )
    num_tokens, *loaded = first.stdout.split()
    assert sorted(loaded) == ["pythonbible", "rich"]
    assert second.stdout.split() == [num_tokens]
    assert "prepared in" in first.stderr
    assert second.stderr == ""


def test_settings_that_change_the_ids_change_the_cache_key(tmp_path: Path) -> None:
    data = text_config(tmp_path, sample_text(3000))
    keys = [
        cache_key(fingerprint(data), BYTE, None),
        cache_key(fingerprint(data), TokenizerConfig(vocab_size=300), None),
        cache_key(fingerprint(data), TokenizerConfig(vocab_size=301), None),
        cache_key(fingerprint(text_config(tmp_path, sample_text(3001))), BYTE, None),
        cache_key(fingerprint(text_config(tmp_path, sample_text(3000), val_fraction=0.2)), BYTE, None),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == cache_key(
        fingerprint(text_config(tmp_path, sample_text(3000))), TokenizerConfig(kind="byte", vocab_size=9), None
    )


def test_cache_keys_are_those_of_earlier_versions() -> None:
    pairs = DataConfig(kind="pairs", source="addition", num_pairs=1000, val_fraction=0.2)
    assert cache_key(fingerprint(pairs), TokenizerConfig(vocab_size=500), None) == "0f8bf4adbb95af532132"
    assert cache_key(fingerprint(pairs), BYTE, None) == "9e943829d8c361a63186"
    streamed = DataConfig(source="hub", hub_path="a/b", shuffle_buffer=10, streaming=True)
    assert fingerprint(streamed) == "5f8e34834ad06bbc6a5d0373137cc1e1d03e6ce8f16e25735dca03d2a51729fc"


def _prepare_in_process(data: DataConfig, barrier: object) -> tuple[str, int]:
    barrier.wait()  # type: ignore[attr-defined]
    found = prepare(data, TokenizerConfig(vocab_size=300), log=quiet)
    return str(found.directory), int(found.train.astype(np.int64).sum())


@pytest.mark.slow
def test_two_processes_at_once_build_one_entry(tmp_path: Path) -> None:
    data = text_config(tmp_path, sample_text(200_000))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(2) as pool:
        barrier = manager.Barrier(2)
        results = pool.starmap(_prepare_in_process, [(data, barrier)] * 2)
    assert results[0] == results[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(results[0][0]).name]


def test_publishing_keeps_an_entry_that_is_complete(tmp_path: Path) -> None:
    data = text_config(tmp_path, sample_text(2000))
    found = prepare(data, BYTE, log=quiet)
    copy = cache._temporary_name(found.directory)
    shutil.copytree(found.directory, copy)
    before = found.directory.stat().st_ino
    published = cache._publish(copy, found.directory, Builder((), lambda _: ({}, ""), tokenized_text._load))
    assert published.directory.stat().st_ino == before


@pytest.mark.parametrize("damage", ["cut", "gone", "junk", "tokenizer", "meta", "empty"])
def test_a_damaged_entry_is_rebuilt_and_reported_once(tmp_path: Path, damage: str) -> None:
    data = text_config(tmp_path, sample_text(5000))
    found = prepare(data, BYTE, log=quiet)
    directory, ids = found.directory, found.train.tolist()
    if damage == "cut":
        with (directory / "train.bin").open("r+b") as file:
            file.truncate(100)
    elif damage == "gone":
        (directory / "val.bin").unlink()
    elif damage == "junk":
        (directory / "meta.json").write_text("{")
    elif damage == "tokenizer":
        content = (directory / "tokenizer.json").read_text()
        (directory / "tokenizer.json").write_text("?" * len(content))
    elif damage == "meta":
        (directory / "meta.json").write_text(json.dumps([1]))
    else:
        for file in directory.iterdir():
            file.unlink()
    lines: list[str] = []
    found = prepare(data, BYTE, log=lines.append)
    assert sum("is damaged" in line for line in lines) == 1
    assert found.train.tolist() == ids
    prepare(data, BYTE, log=lines.append)
    assert len(lines) == 3  # damaged, preparing, prepared: nothing more the second time
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [directory.name]


def test_a_failed_preparation_leaves_no_files(tmp_path: Path) -> None:
    data = text_config(tmp_path, "short")
    with pytest.raises(RequestError):
        prepare(data, TokenizerConfig(vocab_size=5000), log=quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_stale_temporary_directories_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    names = {"old": f".{'a' * 20}.{'b' * 12}", "young": f".{'c' * 20}.{'d' * 12}", "foreign": ".old.thing"}
    for name in names.values():
        (root / name).mkdir(parents=True)
        (root / name / "train.bin").touch()
    past = time.time() - 2 * cache.STALE_S
    for name in (names["old"], names["foreign"]):
        os.utime(root / name / "train.bin", (past, past))
        os.utime(root / name, (past, past))
    found = prepare(text_config(tmp_path, sample_text(2000)), BYTE, log=quiet)
    assert {path.name for path in root.iterdir()} == {names["young"], names["foreign"], found.directory.name}


def test_an_unwritable_cache_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = text_config(tmp_path, sample_text(2000))
    data.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(MinitfError, match=r"cannot write prepared data to [^\n]*data\.cache_dir[^\n]*$"):
        prepare(data, BYTE, log=quiet)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    partial = cache.Partial(tmp_path, ("train.bin",))
    partial.files["train.bin"] = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(MinitfError, match="No space left"):
        partial.append({"train.bin": b"ids"}, {})


def test_text_without_a_held_out_part_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": ""}\n')
    data = DataConfig(source="hub", hub_path="json", files=[str(tmp_path / "x.jsonl")], cache_dir=str(tmp_path / "c"))
    with pytest.raises(RequestError, match="no held-out text"):
        prepare(data, BYTE, log=quiet)


def test_the_bpe_sample_is_evenly_spaced() -> None:
    texts = [f"{i:03}" + "x" * 97 for i in range(1000)]
    sample = evenly_sampled(texts, 20_000)
    assert 100 <= len(sample) <= 200
    indices = [int(text[:3]) for text in sample]
    assert len({b - a for a, b in itertools.pairwise(indices)}) == 1
    assert evenly_sampled(texts, 10**9) == texts
    assert list(first_texts(texts, 20_000)) == texts[:200]


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: Path) -> None:
    chapters = list(books.book_chapters("kjv"))
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(4):
            file.writelines(chapters)
    code = (
        "import resource, datasets, pyarrow\nfrom minitf.data.tokenized_text import *\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        f"data = DataConfig(source='files', files=[{str(tmp_path / 'a.txt')!r}], cache_dir={str(tmp_path / 'c')!r})\n"
        "prepare(data, TokenizerConfig(vocab_size=512, train_megabytes=4))\nprint(before, peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    before, peak = map(float, done.stdout.split())
    assert peak - before < 250, (
        f"{before:.0f} MiB before, {peak:.0f} MiB at most"
    )  # all ids of the text at once: above 330


def test_prepared_text_feeds_batches(tmp_path: Path) -> None:
    found = prepare(text_config(tmp_path, sample_text(5000)), BYTE, log=quiet)
    inputs_BT, targets_BT, *_ = Batches(found.train, 32, 4, seed=0).batch(0)
    text = bytes(found.train.tolist())
    for inputs_T, targets_T in zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True):
        assert bytes([*inputs_T, targets_T[-1]]) in text
