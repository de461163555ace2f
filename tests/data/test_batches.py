"""Ids on disk and the batches made of them: nothing lost, nothing twice, the same again after a restart."""

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
import torch

from minitf.data import batches
from minitf.data import cache as prepared
from minitf.data import tokenize as preparation
from minitf.data.batches import IGNORED, Batches, TokenizedText, held_out_batches, prepare
from minitf.data.sources import books
from minitf.data.sources import text as corpus
from minitf.data.sources.text import DataConfig
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


# Preparing


def test_ids_are_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARS", 500)
    monkeypatch.setattr(preparation, "ENCODE_CHARS", 1200)
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


def test_documents_are_separated(tmp_path: Path) -> None:
    found = prepare(DataConfig(cache_dir=str(tmp_path)), BYTE, log=quiet)
    chapters = books.book_chapters("kjv")
    assert (found.train == 256).sum() == 1071
    assert (found.val == 256).sum() == 118
    ids = found.val.tolist()
    assert bytes(ids[: ids.index(256)]).decode() == chapters[9]
    assert found.val_bytes == sum(len(chapter.encode()) for chapter in chapters[9::10])
    assert len(found.val) == found.val_bytes + 118


def test_a_long_document_is_separated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARS", 100)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 999)
    data = DataConfig(source="files", files=[str(tmp_path)], cache_dir=str(tmp_path / "cache"))
    assert (
        bytes(i if i < 256 else 33 for i in prepare(data, BYTE, log=quiet).train)
        == b"a" * 999 + b"!" + b"b" * 999 + b"!"
    )


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
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


def test_the_second_start_only_opens_files(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch\nfrom minitf.data.batches import *\n"
        f"data = DataConfig(cache_dir={str(tmp_path)!r})\n"
        "started = time.monotonic()\nfound = prepare(data, TokenizerConfig(vocab_size=300))\n"
        "print(len(found.train), 'datasets' in sys.modules, 'pythonbible' in sys.modules, time.monotonic() - started)"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        for _ in range(2)
    )
    num_first, *loaded_first, _ = first.stdout.split()
    num_second, *loaded_second, seconds = second.stdout.split()
    assert num_first == num_second
    assert (loaded_first, loaded_second) == (["False", "True"], ["False", "False"])
    assert float(seconds) < 1
    assert "prepared in" in first.stderr
    assert second.stderr == ""


def test_settings_that_change_the_ids_change_the_directory(tmp_path: Path) -> None:
    data = text_config(tmp_path, sample_text(3000))
    keys = [
        preparation.cache_key(data, BYTE, None),
        preparation.cache_key(data, TokenizerConfig(vocab_size=300), None),
        preparation.cache_key(data, TokenizerConfig(vocab_size=301), None),
        preparation.cache_key(text_config(tmp_path, sample_text(3001)), BYTE, None),
        preparation.cache_key(text_config(tmp_path, sample_text(3000), val_fraction=0.2), BYTE, None),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == preparation.cache_key(
        text_config(tmp_path, sample_text(3000)), TokenizerConfig(kind="byte", vocab_size=9), None
    )


def _prepare_in_process(data: DataConfig, barrier: object) -> tuple[str, int]:
    barrier.wait()  # type: ignore[attr-defined]
    found = prepare(data, TokenizerConfig(vocab_size=300), log=quiet)
    return str(found.directory), int(found.train.astype(np.int64).sum())


def test_two_processes_at_once_end_with_one_directory(tmp_path: Path) -> None:
    data = text_config(tmp_path, sample_text(200_000))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(2) as pool:
        barrier = manager.Barrier(2)
        results = pool.starmap(_prepare_in_process, [(data, barrier)] * 2)
    assert results[0] == results[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(results[0][0]).name]


def test_the_second_of_two_uses_what_the_first_made(tmp_path: Path) -> None:
    data = text_config(tmp_path, sample_text(2000))
    found = prepare(data, BYTE, log=quiet)
    copy = prepared._temporary_name(found.directory)
    shutil.copytree(found.directory, copy)
    before = found.directory.stat().st_ino
    published = prepared._publish(copy, found.directory, batches.TextPreparation(data, BYTE).load)
    assert published.directory.stat().st_ino == before


@pytest.mark.parametrize("damage", ["cut", "gone", "junk", "tokenizer", "meta", "empty"])
def test_a_damaged_directory_is_made_again_and_said_once(tmp_path: Path, damage: str) -> None:
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


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    data = text_config(tmp_path, "short")
    with pytest.raises(RequestError):
        prepare(data, TokenizerConfig(vocab_size=5000), log=quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_leavings_of_killed_runs_are_removed_once_old_and_nothing_else(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    names = {"old": f".{'a' * 20}.{'b' * 12}", "young": f".{'c' * 20}.{'d' * 12}", "foreign": ".old.thing"}
    for name in names.values():
        (cache / name).mkdir(parents=True)
        (cache / name / "train.bin").touch()
    past = time.time() - 2 * prepared.STALE_S
    for name in (names["old"], names["foreign"]):
        os.utime(cache / name / "train.bin", (past, past))
        os.utime(cache / name, (past, past))
    found = prepare(text_config(tmp_path, sample_text(2000)), BYTE, log=quiet)
    assert {path.name for path in cache.iterdir()} == {names["young"], names["foreign"], found.directory.name}


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = text_config(tmp_path, sample_text(2000))
    data.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(MinitfError, match=r"cannot write prepared data to [^\n]*data\.cache_dir[^\n]*$"):
        prepare(data, BYTE, log=quiet)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    partial = prepared.Partial(tmp_path, ("train.bin",))
    partial.files["train.bin"] = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(MinitfError, match="No space left"):
        partial.append({"train.bin": b"ids"})


def test_text_without_a_held_out_part_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": ""}\n')
    data = DataConfig(source="hub", hub_path="json", files=[str(tmp_path / "x.jsonl")], cache_dir=str(tmp_path / "c"))
    with pytest.raises(RequestError, match="no held-out text"):
        prepare(data, BYTE, log=quiet)


def test_bpe_is_trained_on_a_sample_from_everywhere() -> None:
    texts = [f"{i:03}" + "x" * 97 for i in range(1000)]
    sample = preparation.evenly_sampled(texts, 20_000)
    assert 100 <= len(sample) <= 200
    indices = [int(text[:3]) for text in sample]
    assert len({b - a for a, b in itertools.pairwise(indices)}) == 1
    assert preparation.evenly_sampled(texts, 10**9) == texts
    assert list(batches._first(texts, 20_000)) == texts[:200]


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: Path) -> None:
    chapters = list(books.book_chapters("kjv"))
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(4):
            file.writelines(chapters)
    code = (
        "import resource, datasets, pyarrow\nfrom minitf.data.batches import *\n"
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


# Training batches


@pytest.mark.parametrize(
    ("num_tokens", "length", "batch_size"), [(1000, 16, 4), (1000, 7, 5), (17, 16, 3), (40, 16, 8)]
)
def test_targets_are_inputs_shifted_and_windows_come_from_the_text(
    num_tokens: int, length: int, batch_size: int
) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    train = Batches(tokens, length, batch_size, seed=0)
    for index in range(50):
        inputs_BT, targets_BT, *_ = train.batch(index)
        assert inputs_BT.shape == targets_BT.shape == (batch_size, length)
        assert inputs_BT.dtype == targets_BT.dtype == torch.int64
        assert inputs_BT.is_contiguous()
        assert targets_BT.is_contiguous()
        assert torch.equal(targets_BT, inputs_BT + 1)  # ids count up: the next token is the next number
        assert torch.equal(inputs_BT, inputs_BT[:, :1] + torch.arange(length))
        assert inputs_BT.min() >= 0
        assert targets_BT.max() < num_tokens


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(1000, 7), (1000, 200), (1003, 6)])
def test_every_window_comes_once_an_epoch(num_tokens: int, batch_size: int) -> None:
    length = 16
    train = Batches(np.arange(num_tokens, dtype=np.uint16), length, batch_size, seed=3)
    num_windows = train.windows_per_epoch
    assert num_windows == (num_tokens - length) // length
    assert train.tokens_per_epoch == num_windows * length
    num_batches = -(-4 * num_windows // batch_size)
    starts = torch.cat([train.batch(index)[0][:, 0] for index in range(num_batches)])
    epochs = [starts[i * num_windows : (i + 1) * num_windows].tolist() for i in range(4)]
    for epoch in epochs:
        offset = min(epoch)
        assert sorted(epoch) == list(range(offset, offset + num_windows * length, length))
        assert epoch != sorted(epoch)
    assert len({min(epoch) for epoch in epochs}) > 1  # epochs are cut from different offsets
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_all_tokens_become_targets_over_the_epochs() -> None:
    train = Batches(np.arange(100, dtype=np.uint16), 16, 5, seed=0)
    seen = {token for index in range(400) for token in train.batch(index)[1].flatten().tolist()}
    assert seen == set(range(1, 100))


def test_a_batch_depends_on_nothing_but_seed_and_index() -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    one = Batches(tokens, 32, 6, seed=1)
    in_order = [one.batch(index) for index in range(100)]
    other = Batches(tokens, 32, 6, seed=1)
    for index in random.Random(0).sample(range(100), 100):
        assert all(torch.equal(a, b) for a, b in zip(other.batch(index)[:2], in_order[index][:2], strict=True))
    assert not torch.equal(Batches(tokens, 32, 6, seed=2).batch(0)[0], in_order[0][0])
    assert Batches(tokens, 32, 6, seed=-1).batch(0)[0].shape == (6, 32)


def test_text_shorter_than_a_context_is_refused() -> None:
    with pytest.raises(RequestError, match=r"has 128 tokens.*need 129.*model\.context_length"):
        Batches(np.zeros(128, dtype=np.uint16), 128, 4, seed=0)
    inputs_BT, targets_BT, *_ = Batches(np.arange(129, dtype=np.uint16), 128, 2, seed=0).batch(0)
    assert inputs_BT[0].tolist() == list(range(128))
    assert targets_BT[1, -1] == 128


# Held-out batches


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 18, 33, 1000, 1025])
def test_held_out_covers_every_target_once(num_tokens: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    targets: list[int] = []
    for inputs_BT, targets_BT, *_ in held_out_batches(tokens, 16, batch_size=5):
        assert inputs_BT.shape == targets_BT.shape
        assert inputs_BT.shape[0] <= 5
        counted = targets_BT != IGNORED
        assert torch.equal(targets_BT[counted], inputs_BT[counted] + 1)
        targets += targets_BT[counted].tolist()
    assert targets == list(range(1, num_tokens))


def test_held_out_cap_takes_evenly_spread_windows() -> None:
    tokens = np.arange(16 * 100 + 1, dtype=np.uint16)
    found = list(held_out_batches(tokens, 16, batch_size=4, max_tokens=16 * 10 + 3))
    starts = torch.cat([inputs_BT[:, 0] for inputs_BT, *_ in found]).tolist()
    assert starts == [i * 160 for i in range(10)]
    assert len(list(held_out_batches(tokens, 16, 4, max_tokens=10**9))) == 25
    assert sum(len(inputs_BT) for inputs_BT, *_ in held_out_batches(tokens, 16, 4, max_tokens=1)) == 1
    with pytest.raises(RequestError, match="too few"):
        list(held_out_batches(tokens[:1], 16, 4))


def test_prepared_text_feeds_batches(tmp_path: Path) -> None:
    found: TokenizedText = prepare(text_config(tmp_path, sample_text(5000)), BYTE, log=quiet)
    inputs_BT, targets_BT, *_ = Batches(found.train, 32, 4, seed=0).batch(0)
    text = bytes(found.train.tolist())
    for inputs_T, targets_T in zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True):
        assert bytes([*inputs_T, targets_T[-1]]) in text
