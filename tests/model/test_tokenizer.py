"""Text <-> ids: exact round trips, files shared with `transformers`, and clear errors."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from minitf.data import tokenizer_training
from minitf.data.sources import books
from minitf.data.sources import text as text_source
from minitf.data.tokenizer_training import train_tokenizer
from minitf.errors import RequestError
from minitf.tokenizer import END_OF_TEXT, Tokenizer, TokenizerConfig

ROOT = Path(__file__).parents[2]
TEXTS = [
    "",
    " ",
    "\n",
    "  two  spaces \t and\ttabs  ",
    "lines\nof\r\nall\rkinds\n\n\r\n",
    "café naïve ﬁ ½ ǅ",
    "世界 こんにちは 안녕 สวัสดี",
    "مرحبا שלום नमस्ते ελληνικά русский",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🎉🇺🇳",
    "\u0301 lone combining \u0300\u0489",
    "\0\x01\x1b\x7f\x85\u2028\u200b\ufeff\ufffd\ufffe\uffff",
    "\u202eright to left\u202c",
    f"literal {END_OF_TEXT} inside{END_OF_TEXT}",
    "Ġ ▁ <0xE4> Ċ",
    "\U0010ffff\ue000",
    "x" * 5000,
]


def random_text(rng: random.Random) -> str:
    planes = [(0x20, 0x7F), (0, 0x20), (0xA0, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(40)))


ALL_TEXTS = [*TEXTS, *(random_text(random.Random(seed)) for seed in range(200))]


@pytest.fixture(scope="module", params=["bpe", "char", "byte"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    config = TokenizerConfig(kind=request.param, vocab_size=600)
    return train_tokenizer(config, books.book_chapters("kjv")[:30], ALL_TEXTS)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=600), books.book_chapters("kjv")[:30])


def test_decoding_gives_back_the_text(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(ALL_TEXTS)
    for text, ids in zip(ALL_TEXTS, batch, strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_id not in ids
        assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)


def test_ids_of_each_kind() -> None:
    byte = train_tokenizer(TokenizerConfig(kind="byte"), [])
    assert byte.encode("aé\n") == list("aé\n".encode())
    assert (byte.end_id, byte.vocab_size) == (256, 257)
    char = train_tokenizer(TokenizerConfig(kind="char"), ["cab\n"], ["z"])
    assert char.encode("\nabcz") == [0, 1, 2, 3, 4]
    assert (char.end_id, char.vocab_size) == (5, 6)


def test_bpe_vocabulary(bpe: Tokenizer) -> None:
    assert (bpe.end_id, bpe.vocab_size) == (0, 600)
    assert len(bpe.encode(" the")) == 1
    assert bpe.decode([0, *bpe.encode("a"), 0]) == "a"


def test_streamed_text_equals_decoded_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    texts_ids = tokenizer.encode_batch(ALL_TEXTS[:60])
    random_ids = [rng.choices(range(tokenizer.vocab_size), k=rng.randrange(1, 30)) for _ in range(300)]
    for ids in (*texts_ids, *random_ids):
        stream = tokenizer.decode_stream()
        parts = [stream.step(id_) or "" for id_ in ids]
        assert "".join(parts) + stream.flush() == tokenizer.decode(ids)


def test_a_character_is_streamed_when_complete() -> None:
    byte = train_tokenizer(TokenizerConfig(kind="byte"), [])
    stream = byte.decode_stream()
    assert [stream.step(id_) for id_ in "é世".encode()] == [None, "é", None, None, "世"]
    stream = byte.decode_stream()
    assert [stream.step(id_) for id_ in b"a\xe4\xb8"] == ["a", None, None]
    assert stream.flush() == "\ufffd"


def test_pieces_are_readable(tokenizer: Tokenizer, bpe: Tokenizer) -> None:
    byte = train_tokenizer(TokenizerConfig(kind="byte"), [])
    assert byte.pieces(byte.encode("a ä\n\t\0")) == ["a", " ", "⟨c3⟩", "⟨a4⟩", "⏎", "⇥", "␀"]
    assert bpe.pieces([*bpe.encode(" the\n"), bpe.end_id]) == [" the", "⏎", END_OF_TEXT]
    for text in ALL_TEXTS:
        ids = tokenizer.encode(text)
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
        assert not set("".join(pieces)) & set(map(chr, range(32)))


def test_text_cut_into_pieces_has_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_source, "PIECE_CHARS", 200)
    rng = random.Random(0)
    text = "".join(books.book_chapters("kjv")[30:40])
    broken = re.sub("\n", lambda _: "\n" * rng.choice([1, 2, 3]), text)
    spaced = re.sub(" ", lambda _: " " * rng.choice([1, 1, 2, 3]), text)
    indented = re.sub("\n", lambda _: "\n" + " " * rng.choice([0, 0, 4]), text)
    wholes = [text, text.replace("\n", "\r\n"), broken, spaced, indented]
    bpe = train_tokenizer(TokenizerConfig(vocab_size=600), wholes)  # so that runs of whitespace are tokens
    for whole in wholes:
        rows = list(text_source._pieces([whole]))
        assert len(rows) > 100
        assert [id_ for ids in bpe.encode_batch([item.text for item in rows]) for id_ in ids] == bpe.encode(whole)


def test_a_saved_tokenizer_is_the_same_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, max_length=128)
    loaded = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.to_json() == tokenizer.to_json()
    for text in ALL_TEXTS:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == tokenizer.end_id == loaded.end_id
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.model_max_length == 128


def test_unknown_characters_are_named(tmp_path: Path) -> None:
    trained = train_tokenizer(TokenizerConfig(kind="char"), ["abc"])
    trained.save(tmp_path)
    for char in (trained, Tokenizer.load(tmp_path)):
        with pytest.raises(RequestError, match=r"'é' \(U\+00E9\) at character 2 .*tokenizer=bpe or tokenizer=byte"):
            char.encode("abéZ")


def test_lone_surrogates_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"half a surrogate pair, '\\ud800' \(U\+D800\), at character 1"):
        tokenizer.encode("x\ud800")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "words"}, r"tokenizer\.kind=words"),
        ({"vocab_size": 256}, r"tokenizer\.vocab_size=256 .* 257"),
        ({"kind": "pretrained"}, r"tokenizer\.file"),
        ({"train_megabytes": 0}, r"tokenizer\.train_megabytes"),
    ],
)
def test_bad_settings_name_their_key(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TokenizerConfig(**settings)  # type: ignore[arg-type]


def test_too_large_a_vocabulary_reports_the_limit() -> None:
    with pytest.raises(RequestError, match=r"tokenizer\.vocab_size=5000 .*ends at 261 tokens"):
        train_tokenizer(TokenizerConfig(vocab_size=5000), ["hello"] * 3 + ["hell"])
    assert train_tokenizer(TokenizerConfig(vocab_size=261), ["hello"] * 3 + ["hell"]).vocab_size == 261


def test_text_without_whitespace_can_be_trained_on() -> None:
    text = "".join(random.Random(0).choices("acgt", k=300_000))
    trained = train_tokenizer(TokenizerConfig(vocab_size=300), [text])
    assert trained.decode(trained.encode(text)) == text


def damaged_files(good: str) -> Iterator[str]:
    yield from ("", "{}", "[]", "null", "\0\0\0", '{"version": "1.0"}', good[:-100], good.replace("Ġt", "Ġqq", 1))
    wrong = json.loads(good)
    wrong["model"]["vocab"] = {"a": -1}
    yield json.dumps(wrong)


def test_damaged_files_are_one_line(bpe: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    with pytest.raises(RequestError, match="no such file"):
        Tokenizer.load(tmp_path)
    for content in damaged_files(bpe.to_json()):
        file.write_text(content)
        with pytest.raises(RequestError, match=r"^[^\n]*tokenizer\.json: not a usable tokenizer[^\n]*$"):
            Tokenizer.load(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="not a usable tokenizer"):
        Tokenizer.load(file)


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", "<eos>"])
def test_a_pretrained_tokenizer_keeps_its_end_of_text(bpe: Tokenizer, tmp_path: Path, end: str) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe.to_json().replace(END_OF_TEXT, end))
    theirs = train_tokenizer(TokenizerConfig(kind="pretrained", file=str(tmp_path)), [])
    assert theirs.backend.id_to_token(theirs.end_id) == end
    assert theirs.vocab_size == bpe.vocab_size


def test_a_pretrained_tokenizer_without_end_of_text_gets_one(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe.to_json().replace(END_OF_TEXT, "[SEP]"))
    theirs = Tokenizer.load(tmp_path)
    assert (theirs.end_token, theirs.end_id, theirs.vocab_size) == (END_OF_TEXT, 600, 601)


def test_presets_fit_the_config() -> None:
    kinds = []
    for path in sorted((ROOT / "conf" / "tokenizer").glob("*.yaml")):
        composed = OmegaConf.merge(OmegaConf.structured(TokenizerConfig), OmegaConf.load(path))
        kinds.append(composed.kind)
        if composed.kind == "pretrained":
            composed.file = "x"
        OmegaConf.to_object(composed)
    assert kinds == ["bpe", "byte", "char", "pretrained"]


def test_long_words_are_broken_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_training, "MAX_UNBROKEN_CHARS", 5000)
    read = list(tokenizer_training._break_long_words(["x" * 3000, "a b", "y" * 3000, "z" * 3000, "c d"]))
    assert "".join(read) == "x" * 3000 + "a b" + "y" * 3000 + "c d"
    assert max(map(len, read)) == tokenizer_training.MAX_WORD_CHARS


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, minitf.data.sources.text, minitf.tokenizer\n"
    code += "print({'torch', 'datasets', 'pythonbible'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"
