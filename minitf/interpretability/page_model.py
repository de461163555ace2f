"""A small model as data of a page: what the viewer needs to compute with it in the browser, without a server."""

import base64
import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitf.attention import Attention
from minitf.backends import reference_class, source
from minitf.errors import RequestError
from minitf.model import ModelConfig
from minitf.tokenizer import chars_of_bytes
from minitf.variants import silenced

if TYPE_CHECKING:
    from minitf.model import Transformer
    from minitf.tokenizer import Tokenizer

MAX_BYTES = 3_000_000  # of the weights as base64: 1.1 million parameters in bfloat16
CONFIG = (
    "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "context_length",
    "rope_theta", "rms_norm_eps", "qk_norm", "tie_embeddings",
)  # fmt: skip
# Options that change nothing, are judged by the classes in use, or (heads_off) stand in the weights. Any further
# one must have its default.
KNOWN = {*CONFIG, "dropout", "attention", "variant", "attention_class", "heads_off"}


def page_model(
    model: "Transformer", tokenizer: "Tokenizer", step: int | None, texts: Iterable[str], pairs: bool = False
) -> dict[str, Any]:
    """`model` for a page that shows `texts`, as JSON values; {"why": ...} if the page cannot compute with it.

    `why` names one of the viewer's texts, `why_...`. The weights are rounded to bfloat16, in base64, in the order of
    `parameters`. `pairs` says that the model was trained on pairs.
    """
    if (why := _why_not(model, pairs)) is not None:
        return {"why": why}
    weights = {name: silenced(name, weight, model.config) for name, weight in model.named_parameters()}
    config = asdict(model.config)
    return {
        "step": step,
        "config": {name: config[name] for name in CONFIG} | {"vocab_size": model.vocab_size},
        "parameters": [[name, weight.numel()] for name, weight in weights.items()],
        "weights": _bfloat16(weights.values()),
        "tokenizer": page_tokenizer(tokenizer, model.vocab_size, texts),
    }


def _why_not(model: "Transformer", pairs: bool) -> str | None:
    """The name of the reason why the viewer's model.js cannot compute this model, if there is one."""
    if pairs:
        return "page_pairs"
    layers: Any = model.model.layers
    if source.edited(source.FORWARD) or any(reference_class(block.self_attn) is not Attention for block in layers):
        return "page_other"
    default = asdict(ModelConfig())
    if any(value != default[name] for name, value in asdict(model.config).items() if name not in KNOWN):
        return "page_other"
    num_bytes = 2 * sum(weight.numel() for weight in model.parameters())
    return "page_large" if 4 * -(-num_bytes // 3) > MAX_BYTES else None


def _bfloat16(weights: Iterable[Tensor]) -> str:
    flat = torch.cat([weight.detach().cpu().flatten().to(torch.bfloat16) for weight in weights])
    return base64.b64encode(flat.view(torch.int16).numpy().astype("<i2").tobytes()).decode()


def page_tokenizer(tokenizer: "Tokenizer", vocab_size: int, texts: Iterable[str]) -> dict[str, Any]:
    """The tokenizer as viewer/tokenizer.js reads it; of one that it does not know only the ids of `texts`."""
    common = {"labels": tokenizer.pieces(range(vocab_size)), "start": tokenizer.start_ids, "end": tokenizer.end_id}
    content = json.loads(tokenizer.backend.to_str())
    vocabulary = content["model"].get("vocab")
    if tokenizer.by_character and [*vocabulary.values()] == [*range(len(vocabulary))]:
        return common | {"kind": "characters", "characters": "".join(vocabulary)}
    if tokenizer.is_exact and _is_plain_bpe(content):
        merges = _merges(vocabulary, content["model"]["merges"])
        if merges is not None:
            return common | {"kind": "bytes", "bytes": [vocabulary[char] for char in _chars()], "merges": merges}
    known = {}
    for text in texts:
        with contextlib.suppress(RequestError):  # a probe that this tokenizer cannot encode is not shown either
            known[text] = tokenizer.encode(text)
    return common | {"kind": "none", "known": known}


def _is_plain_bpe(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is BPE over bytes and within GPT-2's pieces of the text, without further rules."""
    model, step = content["model"], content["pre_tokenizer"]
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    special = all(token["special"] for token in content["added_tokens"])
    return bool(
        model["type"] == "BPE"
        and not any(model.get(name) for name in options)
        and step["type"] == "ByteLevel"
        and step.get("use_regex", True)
        and special
    )


def _chars() -> list[str]:
    """The stand-in of every byte in the vocabulary, from 0 to 255."""
    by_byte = {byte: char for char, byte in chars_of_bytes().items()}
    return [by_byte[byte] for byte in range(256)]


def _merges(vocabulary: dict[str, int], merges: list[Any]) -> list[int] | None:
    """[left, right, joined, left, ...] as ids; None if a merge takes what only a later one makes."""
    made, found = set(_chars()), list[int]()
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right} <= made:
            return None
        made.add(left + right)
        found += (vocabulary[left], vocabulary[right], vocabulary[left + right])
    return found
