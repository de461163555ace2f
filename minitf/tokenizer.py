"""Text <-> ids: byte-level BPE, single characters, bytes, or a pretrained tokenizer.

Decoding gives back exactly the text that was encoded. The files are those of Hugging Face `tokenizers`.
"""

import contextlib
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from minitf.errors import MinitfError, RequestError
from minitf.system.files import expand_user
from minitf.system.safe_io import check_size

END_OF_TEXT = "<|endoftext|>"
SOURCE, TARGET = "<|source|>", "<|target|>"  # of a pair: before the prompt, before the completion
JOINED_MESSAGES = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
START_OF_CHAT = "{{ bos_token }}"
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>")
NUM_BYTES = 256
BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # a token that is a byte, for characters the vocabulary lacks
MAX_FILE_BYTES = 256 << 20  # of a tokenizer.json; the largest in use have some 40 MB
MAX_UNUSED_IDS = 1 << 16
MAX_TEMPLATE_BYTES = 1 << 20


@dataclass
class TokenizerConfig:
    """How text becomes ids."""

    kind: str = "bpe"  # bpe | char (every character a token) | byte | pretrained (tokenizer.file)
    vocab_size: int = 0  # tokens of a trained BPE, including 256 bytes; auto: 4096, or fewer for a small text
    file: str | None = None  # for kind=pretrained: a tokenizer.json, or its directory
    train_megabytes: float = 64.0  # MB of training text, evenly sampled, to train the BPE on

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
    """str <-> ids, with a special token for the end of a text and, for pairs, two that mark source and target."""

    def __init__(
        self, backend: tokenizers.Tokenizer, for_pairs: bool = False, declared_end: str = "", template: str = ""
    ) -> None:
        """Wrap `backend`, adding `<|endoftext|>` if it has no known end-of-text token.

        `for_pairs` adds `<|source|>` and `<|target|>` too. Ids that exist stay. `declared_end` and `template` are the
        end-of-text token and the chat template that the tokenizer's files declare, if any.
        """
        ends = (declared_end, *KNOWN_ENDS)
        known = (token for token in ends if token and backend.token_to_id(token) is not None)
        self.end_token = next(known, END_OF_TEXT)
        markers = [SOURCE, TARGET] if for_pairs or backend.token_to_id(TARGET) is not None else []
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in (self.end_token, *markers)]
        )
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is plain text
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        tokens = backend.get_vocab(with_added_tokens=True)
        self.end_id = tokens[self.end_token]
        self.source_id, self.target_id = tokens.get(SOURCE), tokens.get(TARGET)  # None: not for pairs
        # Tokens that a pretrained model expects before every text, such as Llama's <s>.
        self.start_ids: list[int] = backend.encode("").ids
        self.vocab_size = max(tokens.values()) + 1
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id_ for id_, token in added.items() if token.special)  # never decoded to text
        # All of them control but the unknown token, which text that the vocabulary lacks becomes.
        unknown = {tokens.get(getattr(backend.model, "unk_token", None) or "")}
        unknown |= set(_ids_of_unknown(backend))
        self._control = {id_: added[id_].content for id_ in self._special_ids - unknown}
        self._byte_ids = frozenset(id_ for token, id_ in tokens.items() if BYTE_FALLBACK.fullmatch(token))
        own = self.target_id is not None or template.removeprefix(START_OF_CHAT) == JOINED_MESSAGES
        self._template = "" if own else template
        # Without a pre-tokenizer and merges BPE is an alphabet, and silently drops other characters.
        self._alphabet: frozenset[str] | None = None
        if isinstance(backend.decoder, decoders.Fuse) and backend.pre_tokenizer is None:
            self._alphabet = frozenset(token for token in tokens if len(token) == 1)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises RequestError for a character that cannot be encoded."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in parallel. Raises RequestError for a character that cannot be encoded."""
        for text in texts:
            self._check(text)
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library's only class: a Unigram model without an unknown token
            raise RequestError(f"this tokenizer cannot encode the text: {error}", "not_encodable") from None
        rows = [encoding.ids for encoding in encodings]
        if self.is_exact:
            return rows
        return [
            self._encode_apart(text) if not self._control.keys().isdisjoint(ids) else ids
            for text, ids in zip(texts, rows, strict=True)
        ]

    def _encode_apart(self, text: str) -> list[int]:
        """The ids of a text in which the vocabulary finds a control token, such as a typed "</s>": cut within it."""
        names = sorted(map(re.escape, self._control.values()), key=len, reverse=True)
        cuts = [match.start() + 1 for match in re.finditer("|".join(names), text)]
        parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        ids = [id_ for part in parts for id_ in self.backend.encode(part, add_special_tokens=False).ids]
        if not self._control.keys().isdisjoint(ids):
            raise RequestError(f"{text[:60]!r} holds a control token of this tokenizer; leave it out", "control_token")
        return ids

    @functools.cached_property
    def is_exact(self) -> bool:
        """Whether decoding gives back every text that can be encoded, by construction; else that is to be checked."""
        if self.by_character:
            return True
        step = self.backend.pre_tokenizer
        plain = isinstance(step, pre_tokenizers.ByteLevel) and not step.add_prefix_space
        by_bytes = plain and self.backend.normalizer is None and isinstance(self.backend.decoder, decoders.ByteLevel)
        return by_bytes and all(self.backend.token_to_id(char) is not None for char in _BYTE_OF_CHAR)

    def kept(self, text: str, ids: Sequence[int]) -> str:
        """What `ids`, those of `text`, can write of it."""
        return text if self.is_exact else self.decode(ids)

    def for_pairs(self) -> "Tokenizer":
        """This tokenizer with the marks of source and target; existing ids stay."""
        if self.target_id is not None:
            return self
        return Tokenizer(tokenizers.Tokenizer.from_str(self.to_json()), True, self.end_token)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of a pair up to the start of its completion. Raises RequestError where `encode` does."""
        if self.source_id is None or self.target_id is None:
            raise RequestError("this model was not trained on pairs: its tokenizer has no marks of source and target")
        return [self.source_id, *self.encode(prompt.strip()), self.target_id]  # as the pairs that were trained on

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids`, without special tokens; invalid UTF-8 becomes U+FFFD.

        `after`: the ids of a text that `ids` continue; some tokenizers write no space before the first word.
        """
        if after:
            stream = self.decode_stream(after)
            return "".join(stream.step(id_) or "" for id_ in ids) + stream.flush()
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def decode_stream(self, after: Sequence[int] = ()) -> "TextStream":
        """A decoder that takes one id at a time, to show text while it is generated; `after` as in `decode`."""
        return TextStream(self, after)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The span of each token in `text`: (first character, the one after its last)."""
        self._check(text)
        encoding = self.backend.encode(text, add_special_tokens=False)
        return [(int(start), int(end)) for start, end in encoding.offsets]

    @property
    def by_character(self) -> bool:
        """Whether every token is a single character."""
        return self._alphabet is not None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A readable label for each id: newlines as "⏎", the bytes of a split character as "⟨e4⟩"."""
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
            # "<|endoftext|>" in a text is plain text there too, unless the template has marks of its own.
            "split_special_tokens": self.chat_template == JOINED_MESSAGES,
        }
        if not self._template:  # without it transformers' server takes the whole chat of a Qwen3 model for the answer
            # The answer starts where the chat ends, and extends to the end of the text.
            fields = {"content": {"close": self.end_token, "content": "text"}}
            response = {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\Z", "fields": fields}
            settings |= {"response_template": response}
        if max_length is not None:
            settings |= {"model_max_length": max_length}
        (directory / "tokenizer.json").write_text(self.to_json(), encoding="utf-8", newline="")
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @property
    def chat_template(self) -> str:
        """A Jinja template from chat messages to text: the tokenizer's own, else the messages joined.

        For pairs: the last message between the marks of source and target.
        """
        if self.target_id is not None:
            return f"{SOURCE}{{{{ messages[-1]['content'] }}}}{TARGET}"
        return self._template or (START_OF_CHAT if self.start_ids else "") + JOINED_MESSAGES

    def to_json(self) -> str:
        """The content of tokenizer.json, which defines this tokenizer."""
        return str(self.backend.to_str(pretty=True))

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json, or the directory holding it. Raises RequestError when that fails."""
        file = expand_user(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise RequestError(f"{file}: no such file; name a tokenizer.json or its directory")
        try:
            check_size(file, MAX_FILE_BYTES)
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
            tokenizer = cls(backend, False, *_declared(file.parent))
            num_tokens = tokenizer.backend.get_vocab_size(with_added_tokens=True)
            if tokenizer.vocab_size > 2 * num_tokens + MAX_UNUSED_IDS:  # each id is a row of the embedding
                raise ValueError(f"{num_tokens:,} tokens, but an id of {tokenizer.vocab_size - 1:,}")
            return tokenizer
        except (OSError, MinitfError):
            raise
        except BaseException as error:  # on some damaged files the library panics, which is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"{file}: not a usable tokenizer.json ({reason}); replace it") from None

    def _check(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = _name(text[error.start])
            raise RequestError(
                f"the text holds half a surrogate pair, {lone}, at character {error.start}; it has no UTF-8 form",
                "surrogate",
            ) from None
        if self._alphabet is None or (unknown := set(text) - self._alphabet) == set():
            return
        offset = min(text.index(char) for char in unknown)
        raise RequestError(
            f"the character {_name(text[offset])} at character {offset} of the text is not in the vocabulary; "
            "leave it out, or train with tokenizer=bpe or tokenizer=byte",
            "unknown_character",
            character=text[offset],
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
        """The text of a token with incomplete characters, whose bytes are in hexadecimal."""
        if fallback := BYTE_FALLBACK.fullmatch(token):
            return f"⟨{fallback[1].lower()}⟩"
        if not all(char in _BYTE_OF_CHAR for char in token):
            return token
        text = bytes(_BYTE_OF_CHAR[char] for char in token).decode("utf-8", "surrogateescape")
        return "".join(f"⟨{ord(char) - 0xDC00:02x}⟩" if "\udc80" <= char <= "\udcff" else char for char in text)


def _ids_of_unknown(backend: tokenizers.Tokenizer) -> list[int]:
    """The ids of a character that no vocabulary has; none if it cannot be encoded."""
    try:
        return list(backend.encode("\U0010ffff", add_special_tokens=False).ids)
    except Exception:  # the library's only class: a Unigram model without an unknown token
        return []


class TextStream:
    """Decodes ids one by one; text appears once later ids cannot change it. All of it is what `decode` gives.

    A decoder looks at neighbours: it drops the space of the first word, joins bytes to characters. So each new id is
    decoded together with those since an earlier place in the text, whose own text is then left out.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = [id_ for id_ in after if id_ not in tokenizer._special_ids]
        self._known = tokenizer.decode(self._ids)  # the text of the ids that were decoded with `_ids` and shown
        self._num_known = len(self._ids)

    def step(self, id_: int) -> str | None:
        """Add one id; returns the text it completes, or None."""
        if id_ in self._tokenizer._special_ids:
            return None
        self._ids.append(id_)
        if id_ in self._tokenizer._byte_ids:  # more bytes may follow, and make this one part of a character or invalid
            return None
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") or not text.startswith(self._known):
            return None
        return self._advance(text) or None

    def _advance(self, text: str) -> str:
        """Take `text`, of all ids, as shown; the ids whose text was known before are needed no more."""
        new = text[len(self._known) :]
        rest = self._ids[self._num_known :]
        shown = self._tokenizer.decode(rest)
        # Kept as neighbours of what follows: ids that by themselves begin with a word.
        if shown.strip() and not shown.startswith("\ufffd"):
            self._ids, text = rest, shown
        self._known, self._num_known = text, len(self._ids)
        return new

    def flush(self) -> str:
        """After the last id: the rest of the text, incomplete characters as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        return self._advance(text) if text.startswith(self._known) else ""


def _declared(directory: Path) -> tuple[str, str]:
    """The end-of-text token and the chat template that the files of a tokenizer declare, each "" if there is none.

    They stand in tokenizer_config.json, and the template in a file of its own where there is one.
    """
    try:
        content = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        end, template = content.get("eos_token"), content.get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        end = template = None
    if isinstance(template, list):  # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    own_file = directory / "chat_template.jinja"
    with contextlib.suppress(OSError, ValueError, MinitfError):
        check_size(own_file, MAX_TEMPLATE_BYTES)
        template = own_file.read_text(encoding="utf-8")
    end = end.get("content") if isinstance(end, dict) else end
    return end if isinstance(end, str) else "", template if isinstance(template, str) else ""


def chars_of_bytes() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: themselves where printable in Latin-1, else characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {chr(byte) if byte in printable else chr(0x100 + others.index(byte)): byte for byte in range(NUM_BYTES)}


_BYTE_OF_CHAR = chars_of_bytes()
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡", ord("\n"): "⏎", ord("\t"): "⇥"}


def _name(char: str) -> str:
    return f"{char!r} (U+{ord(char):04X})"
