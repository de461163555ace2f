"""Every kind of tokenizer.json streams what it would print whole, and typed text is no control token."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from helpers import make_text
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from minitf.data.config import DataConfig
from minitf.data.tokenized_pairs import prepare_pairs
from minitf.data.tokenized_text import prepare
from minitf.errors import RequestError
from minitf.tokenizer import Tokenizer, TokenizerConfig

LINES = make_text(100).splitlines()
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(prefix: bool = False) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2's: "▁" for a space, bytes for characters that it lacks, the first space dropped."""
    words = [word for line in LINES for word in ("▁" + line.replace(" ", " ▁")).split(" ")]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    content = json.loads(trained.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *content["vocab"]]
    vocab = {token: id_ for id_, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in content["merges"]]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(SPECIAL)
    return backend


def unigram() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    return backend


def word_piece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False)
    )
    return backend


def word_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return backend


def suffixed() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    return backend


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": byte_level, "byte level with prefix": lambda: byte_level(prefix=True),
    "byte fallback": byte_fallback, "unigram": unigram, "word piece": word_piece, "word level": word_level,
    "suffixed": suffixed,
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(KINDS[request.param]())


def test_streamed_ids_are_the_text_of_all(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(500):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(1, 25))
        stream = tokenizer.decode_stream()
        assert "".join(stream.step(id_) or "" for id_ in ids) + stream.flush() == tokenizer.decode(ids)


def test_a_text_goes_on_where_its_beginning_ends(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" ".join(LINES)[:300])
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        assert tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:], after=ids[:cut]) == whole


def test_typed_text_is_no_control_token(tokenizer: Tokenizer) -> None:
    control = {tokenizer.end_id, *(tokenizer.backend.token_to_id(token) for token in ("<s>", "</s>"))}
    for text in ("</s>", "The cat</s> sat", "<s>The cat", f"The {tokenizer.end_token} cat", "</s></s>"):
        assert control.isdisjoint(tokenizer.encode(text)), text


def test_only_bytes_are_exact_without_a_look_at_the_text() -> None:
    assert [name for name, make in KINDS.items() if Tokenizer(make()).is_exact] == ["byte level"]


def data_of(directory: Path, text: str) -> DataConfig:
    (directory / "text.txt").write_text(text, encoding="utf-8")
    return DataConfig(source="files", files=[str(directory / "text.txt")], cache_dir=str(directory / "cache"))


def test_what_a_tokenizer_loses_is_named_and_not_counted_as_predicted(tmp_path: Path) -> None:
    lines: list[str] = []
    text = "The cat sat.\n\nThe dog sang 世界.\n" * 50
    found = prepare(data_of(tmp_path, text), TokenizerConfig(), Tokenizer(word_piece()), log=lines.append)
    named = "150 line breaks, 100 capital letters, 100 CJK characters"
    for said in (found.description, lines[-1]):
        assert f"; the tokenizer loses {named}: bits per byte are of what it keeps" in said
    kept = found.tokenizer.decode(found.train.tolist()), found.tokenizer.decode(found.val.tolist())
    assert (found.train_bytes, found.val_bytes) == tuple(map(len, kept))
    exact = prepare(data_of(tmp_path, text), TokenizerConfig(), Tokenizer(byte_level()), log=lines.append)
    assert exact.train_bytes + exact.val_bytes == len(text.encode())
    assert "loses" not in exact.description


def test_the_bytes_of_answers_are_those_a_tokenizer_keeps(tmp_path: Path) -> None:
    rows = [{"prompt": f"cat {i}", "completion": "The\ncat" if i % 2 else "the cat"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(kind="pairs", source="files", files=[str(tmp_path / "a.jsonl")], cache_dir=str(tmp_path / "c"))
    found = prepare_pairs(data, TokenizerConfig(), Tokenizer(word_piece()).for_pairs(), log=lambda _: None)
    assert set(found.train.completion_bytes.tolist()) == {len("the cat")}
    assert "loses" in found.description


def test_the_chat_template_has_a_file_of_its_own_and_a_cache_brings_no_other(tmp_path: Path) -> None:
    """transformers 5 writes chat_template.jinja; earlier versions tokenizer_config.json, with one or several."""
    templates = {"one": "{{ 'one' }}", "two": "{{ 'two' }}", "three": "{{ 'three' }}"}
    several = [{"name": "tool", "template": "x"}, {"name": "default", "template": templates["three"]}]
    settings = {"one": {}, "two": {"chat_template": templates["two"]}, "three": {"chat_template": several}}
    for name, template in templates.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(byte_level().to_str())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings[name]))
        if name == "one":
            (folder / "chat_template.jinja").write_text(template)
        given = Tokenizer.load(folder)
        assert given.chat_template == template
        found = prepare(data_of(tmp_path, make_text(20)), TokenizerConfig(), given, log=lambda _: None)
        assert found.tokenizer.chat_template == template
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_text_whose_control_tokens_cannot_be_taken_apart_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel(vocab={"<unk>": 0, "<": 1, "x": 2}, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "x"])
    with pytest.raises(RequestError, match="holds a control token of this tokenizer"):
        Tokenizer(backend).encode("x")
