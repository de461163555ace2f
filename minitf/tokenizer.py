"""Text <-> ids: byte-level BPE trained on the corpus, single characters, bytes, or a tokenizer made elsewhere.

Every kind gives back exactly the text it was given. The files it writes are those of the Hugging Face world.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from minitf.errors import MinitfError, RequestError
from minitf.system.safe_io import check_size

END_OF_TEXT = "<|endoftext|>"
SOURCE, TARGET = "<|source|>", "<|target|>"  # before the text that is turned into another, and before that other
JOINED_MESSAGES = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
START_OF_CHAT = "{{ bos_token }}"
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>")
NUM_BYTES = 256
DEFAULT_VOCAB_SIZE = 4096
LONGEST_WORD = 1000  # characters
MOST_ENDLESS = 1 << 23  # characters of text with longer ones: no two are alike, and the trainer keeps 50 bytes of each
MAX_FILE_BYTES = 256 << 20  # of a tokenizer.json; the largest in use have some 40 MB
MAX_UNUSED_IDS = 1 << 16


@dataclass
class TokenizerConfig:
    """How text becomes ids."""

    kind: str = "bpe"  # bpe | char (every character a token) | byte | pretrained (tokenizer.file)
    vocab_size: int = 0  # tokens of a trained BPE, 256 bytes included; auto: 4096, or as many as a small text gives
    file: str | None = None  # tokenizer.json, or the directory holding it, for kind=pretrained
    train_megabytes: float = 64.0  # MB of training text, evenly sampled, that the BPE is trained on

    def __post_init__(self) -> None:
        if self.kind not in ("bpe", "char", "byte", "pretrained"):
            raise RequestError(f"tokenizer.kind={self.kind} is not known; use bpe, char, byte or pretrained")
        if self.kind == "bpe" and self.vocab_size and self.vocab_size < NUM_BYTES + 1:
            raise RequestError(
                f"tokenizer.vocab_size={self.vocab_size} is too small: 256 bytes and the end-of-text token need 257"
            )
        if self.kind == "pretrained" and not self.file:
            raise RequestError("tokenizer.file is empty; name a tokenizer.json, e.g. tokenizer.file=my/tokenizer.json")
        if self.train_megabytes <= 0:
            raise RequestError(f"tokenizer.train_megabytes={self.train_megabytes} must be above 0")


class Tokenizer:
    """str <-> ids, with a special token for the end of a text and, of pairs, two that mark source and target."""

    def __init__(
        self, backend: tokenizers.Tokenizer, for_pairs: bool = False, declared_end: str = "", template: str = ""
    ) -> None:
        """Take over `backend`, to which `<|endoftext|>` is added if it has no known end-of-text token.

        With `for_pairs` it gets `<|source|>` and `<|target|>` too, if it has not got them; ids that exist stay.
        `declared_end` is the end-of-text token its maker names, `template` its maker's chat template, if any.
        """
        ends = (declared_end, *KNOWN_ENDS)
        known = (token for token in ends if token and backend.token_to_id(token) is not None)
        self.end_token = next(known, END_OF_TEXT)
        markers = [SOURCE, TARGET] if for_pairs or backend.token_to_id(TARGET) is not None else []
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in (self.end_token, *markers)]
        )
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is that text, not the end of it
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        tokens = backend.get_vocab(with_added_tokens=True)
        self.end_id = tokens[self.end_token]
        self.source_id, self.target_id = tokens.get(SOURCE), tokens.get(TARGET)  # None: not made for pairs
        # What a pretrained model expects before every text, such as Llama's <s>.
        self.start_ids: list[int] = backend.encode("").ids
        self.vocab_size = max(tokens.values()) + 1
        own = self.target_id is not None or template.removeprefix(START_OF_CHAT) == JOINED_MESSAGES
        self._template = "" if own else template
        # Without a pre-tokenizer and merges the tokenizer is an alphabet, and BPE drops what it does not know.
        self._alphabet: frozenset[str] | None = None
        if isinstance(backend.decoder, decoders.Fuse) and backend.pre_tokenizer is None:
            self._alphabet = frozenset(token for token in tokens if len(token) == 1)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises RequestError when it holds what cannot be encoded."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in parallel. Raises RequestError when one holds what cannot be encoded."""
        for text in texts:
            self._check(text)
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def for_pairs(self) -> "Tokenizer":
        """This tokenizer with the marks of source and target; the ids it has stay what they are."""
        if self.target_id is not None:
            return self
        return Tokenizer(tokenizers.Tokenizer.from_str(self.to_json()), True, self.end_token)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of a pair up to where its completion begins. Raises RequestError when it cannot be encoded."""
        if self.source_id is None or self.target_id is None:
            raise RequestError("this tokenizer has no marks of source and target: the model was not trained on pairs")
        return [self.source_id, *self.encode(prompt), self.target_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without end-of-text tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def decode_stream(self) -> "TextStream":
        """A decoder that takes one id at a time, for text that is shown while it is generated."""
        return TextStream(self)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in `text` each of its tokens stands: (first character, the one after its last)."""
        self._check(text)
        encoding = self.backend.encode(text, add_special_tokens=False)
        return [(int(start), int(end)) for start, end in encoding.offsets]

    @property
    def by_character(self) -> bool:
        """Whether every token is a single character."""
        return self._alphabet is not None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A readable text for each id, for pictures: newlines as "⏎", bytes of a split character as "⟨e4⟩"."""
        return [self._piece(id_) for id_ in ids]

    def save(self, directory: Path | str, max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `transformers.AutoTokenizer` reads them."""
        directory = Path(directory)
        start = self.backend.id_to_token(self.start_ids[0]) if self.start_ids else None
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": start or self.end_token,
            "eos_token": self.end_token,
            "pad_token": self.end_token,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
            # There too, "<|endoftext|>" in a text is that text, unless the template's own marks are to be tokens.
            "split_special_tokens": self.chat_template == JOINED_MESSAGES,
        }
        if not self._template:  # without it transformers' server takes the whole chat for the answer of a Qwen3 model
            # The answer begins where the chat ends, and is all there is up to the end of the text.
            fields = {"content": {"close": self.end_token, "content": "text"}}
            response = {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\Z", "fields": fields}
            settings |= {"response_template": response}
        if max_length is not None:
            settings |= {"model_max_length": max_length}
        (directory / "tokenizer.json").write_text(self.to_json(), encoding="utf-8", newline="")
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @property
    def chat_template(self) -> str:
        """How tools that speak in messages write them as text (Jinja): its maker's way, or the messages joined.

        Of pairs: the last message between the marks of source and target, to be answered.
        """
        if self.target_id is not None:
            return f"{SOURCE}{{{{ messages[-1]['content'] }}}}{TARGET}"
        return self._template or (START_OF_CHAT if self.start_ids else "") + JOINED_MESSAGES

    def to_json(self) -> str:
        """The content of tokenizer.json: all there is to this tokenizer."""
        return str(self.backend.to_str(pretty=True))

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json, or the directory holding it. Raises RequestError when that fails."""
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise RequestError(f"{file}: no tokenizer here; name a tokenizer.json or the directory holding it")
        try:
            check_size(file, MAX_FILE_BYTES)
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
            tokenizer = cls(backend, False, *_declared(file.with_name("tokenizer_config.json")))
            num_tokens = tokenizer.backend.get_vocab_size(with_added_tokens=True)
            if tokenizer.vocab_size > 2 * num_tokens + MAX_UNUSED_IDS:  # a model would have a row for each id
                raise ValueError(f"{num_tokens:,} tokens, but an id of {tokenizer.vocab_size - 1:,}")
            return tokenizer
        except (OSError, MinitfError):
            raise
        except BaseException as error:  # the library panics on some damaged files, and its panic is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"{file}: not a usable tokenizer.json ({reason}); make it anew") from None

    def _check(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = _name(text[error.start])
            raise RequestError(
                f"the text holds half a surrogate pair, {lone}, at character {error.start}; it has no UTF-8 form"
            ) from None
        if self._alphabet is None or (unknown := set(text) - self._alphabet) == set():
            return
        offset = min(text.index(char) for char in unknown)
        raise RequestError(
            f"the character {_name(text[offset])} at character {offset} of the text is not in the vocabulary; "
            "leave it out, or train with tokenizer=bpe or tokenizer=byte"
        )

    def _piece(self, id_: int) -> str:
        token = self.backend.id_to_token(id_)
        if token is None or id_ == self.end_id:
            return token or f"⟨{id_}⟩"
        text = str(self.backend.decode([id_], skip_special_tokens=False))
        if self._alphabet is None and token.startswith("▁") and not text.startswith(" "):
            text = " " + text  # SentencePiece decoders drop the space of a first word
        if "\ufffd" in text and token != "\ufffd":
            text = self._readable_bytes(token)
        return text.translate(_VISIBLE)

    def _readable_bytes(self, token: str) -> str:
        """Text of a token that is not whole characters: its stray bytes in hexadecimal."""
        if fallback := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return f"⟨{fallback[1].lower()}⟩"
        if not all(char in _BYTE_OF_CHAR for char in token):
            return token
        text = bytes(_BYTE_OF_CHAR[char] for char in token).decode("utf-8", "surrogateescape")
        return "".join(f"⟨{ord(char) - 0xDC00:02x}⟩" if "\udc80" <= char <= "\udcff" else char for char in text)


class TextStream:
    """Text of ids that come one by one; a character is given out once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._num_given = 0

    def step(self, id_: int) -> str | None:
        """Add one id. The text it completes, or None when it completes none yet."""
        self._ids.append(id_)
        text = self._stream.step(self._tokenizer.backend, id_)
        self._num_given += len(text or "")
        return text

    def flush(self) -> str:
        """The text held back for bytes that never came, as U+FFFD; to be called once, after the last id."""
        return self._tokenizer.decode(self._ids)[self._num_given :]


def train_tokenizer(
    config: TokenizerConfig, texts: Iterable[str], held_out_texts: Iterable[str] = (), for_pairs: bool = False
) -> Tokenizer:
    """Make the tokenizer that `config` describes, with the marks of source and target if it is `for_pairs`.

    BPE learns its merges from `texts`, the training text. `char` takes its alphabet from `texts` and `held_out_texts`:
    which characters exist is not a statistic that could leak. The other kinds read neither.
    """
    if config.kind == "pretrained":
        loaded = Tokenizer.load(str(config.file))
        return loaded.for_pairs() if for_pairs else loaded
    if config.kind == "byte":
        return Tokenizer(_byte_level(models.BPE(vocab=_BYTE_OF_CHAR, merges=[])), for_pairs)
    if config.kind == "char":
        alphabet: set[str] = set()
        for source in (texts, held_out_texts):
            for text in source:
                alphabet.update(text)
        # Half a surrogate pair, as JSON may hold, is no character: it is refused when it is to be encoded.
        characters = [c for c in sorted(alphabet) if not "\ud800" <= c <= "\udfff"]
        backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
        backend.decoder = decoders.Fuse()
        return Tokenizer(backend, for_pairs)
    return _train_bpe(config, texts, for_pairs)


def _train_bpe(config: TokenizerConfig, texts: Iterable[str], for_pairs: bool) -> Tokenizer:
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size or DEFAULT_VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, *([SOURCE, TARGET] if for_pairs else [])],
        show_progress=False,
    )
    backend.train_from_iterator(_without_endless_words(texts), trainer)
    reached = backend.get_vocab_size()
    if reached < config.vocab_size:
        raise RequestError(
            f"tokenizer.vocab_size={config.vocab_size} is more than this text gives: it ends at {reached} tokens; "
            f"set tokenizer.vocab_size={reached} or less"
        )
    return Tokenizer(backend, for_pairs)


def _declared(file: Path) -> tuple[str, str]:
    """The `eos_token` and the `chat_template` of a tokenizer_config.json, where there are any."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        end, template = content.get("eos_token"), content.get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "", ""
    end = end.get("content") if isinstance(end, dict) else end
    return end if isinstance(end, str) else "", template if isinstance(template, str) else ""


def _without_endless_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut up where nothing breaks them: the trainer's time grows with the square of a word's length."""
    left = MOST_ENDLESS
    for text in texts:
        if not re.search(rf"\S{{{LONGEST_WORD}}}", text):
            yield text
        elif left > 0:
            left -= len(text)
            yield from (text[start : start + LONGEST_WORD] for start in range(0, len(text), LONGEST_WORD))


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def chars_of_bytes() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: itself where printable in Latin-1, else the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {chr(byte) if byte in printable else chr(0x100 + others.index(byte)): byte for byte in range(NUM_BYTES)}


def join_bytes(pieces: Sequence[str]) -> list[str]:
    """The pieces of one text, with the bytes of a character split over tokens named after it: "你(1/3)", "你(2/3)", ...

    `pieces` are those of `Tokenizer.pieces`; bytes that make no character stay as they are ("⟨e4⟩").
    """
    parts = [[m[0] for m in _PART.finditer(piece)] for piece in pieces]
    stray = [(i, j, int(part[1:3], 16)) for i, row in enumerate(parts) for j, part in enumerate(row) if len(part) > 1]
    start = 0
    while start < len(stray):
        first = stray[start][2]
        length = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2
        run = stray[start : start + length]
        try:
            char = bytes(byte for _, _, byte in run).decode("utf-8")
        except UnicodeDecodeError:
            start += 1
            continue
        owners = sorted({i for i, _, _ in run})
        for number, owner in enumerate(owners, start=1):
            mine = [j for i, j, _ in run if i == owner]
            parts[owner][mine[0]] = f"{char}({number}/{len(owners)})"
            for j in mine[1:]:
                parts[owner][j] = ""
        start += length
    return ["".join(row) for row in parts]


_PART = re.compile(r"⟨[0-9a-f]{2}⟩|.", re.DOTALL)
_BYTE_OF_CHAR = chars_of_bytes()
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡", ord("\n"): "⏎", ord("\t"): "⇥"}


def _name(char: str) -> str:
    return f"{char!r} (U+{ord(char):04X})"
