"""Tokenizers made from the text that is trained on: byte-level BPE, the characters that occur, the 256 bytes."""

import re
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minitf.data.sources.corpus import num_bytes_of
from minitf.errors import RequestError
from minitf.tokenizer import END_OF_TEXT, SOURCE, TARGET, Tokenizer, TokenizerConfig, chars_of_bytes

DEFAULT_VOCAB_SIZE = 4096
MAX_WORD_CHARS = 1000
# Characters of text with longer words that are trained on: no two of its pieces are alike, and the trainer keeps 50
# bytes for each character.
MAX_UNBROKEN_CHARS = 1 << 23


def load_pretrained(config: TokenizerConfig, for_pairs: bool = False) -> Tokenizer | None:
    """The tokenizer of kind=pretrained, None for the other kinds; `for_pairs` adds the marks of source and target."""
    if config.kind != "pretrained":
        return None
    tokenizer = Tokenizer.load(str(config.file))
    return tokenizer.for_pairs() if for_pairs else tokenizer


def train_tokenizer(
    config: TokenizerConfig,
    texts: Iterable[str],
    held_out_texts: Iterable[str] = (),
    for_pairs: bool = False,
    streamed: bool = False,
) -> Tokenizer:
    """Make the tokenizer that `config` describes; `for_pairs` adds the marks of source and target.

    BPE learns its merges from a sample of `texts`, the training text: from everywhere, or, if they are `streamed`, from
    the start, as a stream read to its end only for this would be downloaded twice. `char` takes its alphabet from
    `texts` and `held_out_texts`: which characters exist is not a statistic that could leak. Other kinds read neither.
    """
    if (pretrained := load_pretrained(config, for_pairs)) is not None:
        return pretrained
    if config.kind == "byte":
        return Tokenizer(_byte_level(models.BPE(vocab=chars_of_bytes(), merges=[])), for_pairs)
    if config.kind == "bpe":
        max_bytes = int(config.train_megabytes * 1e6)
        sample = first_texts(texts, max_bytes) if streamed else evenly_sampled(texts, max_bytes)
        return _train_bpe(config, sample, for_pairs)
    alphabet: set[str] = set()
    for source in (texts, held_out_texts):
        for text in source:
            alphabet.update(text)
    # Half a surrogate pair, as JSON may hold, is no character: encoding it is refused.
    characters = [char for char in sorted(alphabet) if not "\ud800" <= char <= "\udfff"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(characters)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, for_pairs)


def _train_bpe(config: TokenizerConfig, texts: Iterable[str], for_pairs: bool) -> Tokenizer:
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size or DEFAULT_VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, *([SOURCE, TARGET] if for_pairs else [])],
        show_progress=False,
    )
    backend.train_from_iterator(_break_long_words(texts), trainer)
    reached = backend.get_vocab_size()
    if reached < config.vocab_size:
        raise RequestError(
            f"tokenizer.vocab_size={config.vocab_size} is more than this text gives: it ends at {reached} tokens; "
            f"set tokenizer.vocab_size={reached} or less"
        )
    return Tokenizer(backend, for_pairs)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _break_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, those with very long words in pieces: the trainer's time grows with the square of a word's length."""
    left = MAX_UNBROKEN_CHARS
    for text in texts:
        if not re.search(rf"\S{{{MAX_WORD_CHARS}}}", text):
            yield text
        elif left > 0:
            left -= len(text)
            yield from (text[start : start + MAX_WORD_CHARS] for start in range(0, len(text), MAX_WORD_CHARS))


def evenly_sampled(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Evenly spaced texts of `texts`, together at most `max_bytes`, in one pass."""
    kept: list[str] = []
    size = 0
    stride = 1
    for index, text in enumerate(texts):
        if index % stride:
            continue
        kept.append(text)
        size += num_bytes_of(text)
        while size > max_bytes and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            size = sum(map(num_bytes_of, kept))
    return kept


def first_texts(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The first of `texts`, up to the one that reaches `max_bytes`."""
    left = max_bytes
    for text in texts:
        yield text
        left -= num_bytes_of(text)
        if left <= 0:
            return
