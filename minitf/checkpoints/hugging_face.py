"""Hugging Face models: their config.json and weights, and downloads from the hub.

Only safetensors and JSON files are read or downloaded: no pickle, no code that comes with a model.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitf.errors import MinitfError, RequestError, one_line
from minitf.model import ModelConfig
from minitf.system.safe_io import read_json, read_tensors
from minitf.variants import STANDARD, attention_class, name_of

INDEX = "model.safetensors.index.json"
# The files downloaded of a hub model, all from its top folder.
DOWNLOADED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "README.md",
    "model.safetensors", INDEX, "model-*-of-*.safetensors",
)  # fmt: skip
WINDOWED = "sliding_window"  # the variant that transformers has too
HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
# The defaults of transformers for what a config.json leaves out. Ours leaves nothing out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048,
    },
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768,
    },
    "minitf": {},
}  # fmt: skip


def to_hugging_face(config: ModelConfig, vocab_size: int, end_id: int, start_id: int) -> dict[str, Any]:
    """The `config.json` of this architecture: Qwen3's, or Llama's without QK-norm; else `minitf`, which no other
    program takes for a model it knows."""
    kind = "minitf" if why_not_hugging_face(config) else "qwen3" if config.qk_norm else "llama"
    return {
        "architectures": [f"{kind.title()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,
        **({"rope_scaling": dict(config.rope_scaling)} if config.rope_scaling else {}),
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": start_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "torch_dtype": "float32",
        **(_window(config) if config.variant == WINDOWED else {}),
        "minitf": {"dropout": config.dropout, **_heads_off(config), **_attention(config)},
    }


def _heads_off(config: ModelConfig) -> dict[str, Any]:
    """Heads that are off; their weights are zero in the file, so that other programs need not know."""
    return {"heads_off": config.heads_off} if config.heads_off else {}


def why_not_hugging_face(config: ModelConfig) -> str | None:
    """Why transformers has no such model, in a sentence; None if it has."""
    if config.attention_class:
        what = f"the class {name_of(config.attention_class)}"
    elif config.variant == STANDARD or (config.variant == WINDOWED and config.qk_norm):
        return None
    else:
        what = f"the variant {config.variant}"
    return f"this is a minitf checkpoint and no model of transformers, since its attention is {what}"


def _attention(config: ModelConfig) -> dict[str, Any]:
    """What `from_hugging_face` needs to know of an attention that is not the standard one."""
    if config.variant == STANDARD and not config.attention_class:
        return {}
    own = {"attention_class": name_of(config.attention_class)} if config.attention_class else {}
    note = why_not_hugging_face(config)
    return {"variant": config.variant, **own, "qk_norm": config.qk_norm, **({"note": note} if note else {})}


def _window(config: ModelConfig) -> dict[str, Any]:
    """The same window in every layer, in Qwen3's terms."""
    return {
        "use_sliding_window": True,
        "sliding_window": window_of(config),
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * config.num_layers,
    }


def window_of(config: ModelConfig) -> int | None:
    """The positions that a query looks back on, its own included; None for all."""
    return getattr(attention_class(config.variant), "window", None)


def from_hugging_face(config: dict[str, Any]) -> tuple[ModelConfig, int]:
    """The model config and vocabulary size of a `config.json`; KeyError, TypeError or ValueError if it is invalid.

    A ValueError names the feature that minitf does not support.
    """
    kind = config["model_type"]
    if kind not in DEFAULTS:
        raise ValueError(f"model_type {kind!r} is not supported: only qwen3 and llama are")
    own = dict(config.get("minitf") or {})
    config = {**DEFAULTS[kind], **{name: value for name, value in config.items() if value is not None}}
    _refuse_unsupported(config)
    try:
        model = ModelConfig(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            num_heads=int(config["num_attention_heads"]),
            num_kv_heads=int(config.get("num_key_value_heads", 0)),
            head_dim=int(config.get("head_dim", 0)),
            intermediate_size=int(config["intermediate_size"]),
            context_length=int(config["max_position_embeddings"]),
            **_rope(config),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            qk_norm=bool(own.get("qk_norm", kind == "qwen3")),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            dropout=float(own.get("dropout", 0.0)),
            variant=str(own.get("variant", STANDARD)),
            attention_class=str(own.get("attention_class", "")),
            heads_off=[[int(layer), int(head)] for layer, head in own.get("heads_off", [])],
        )
    except RequestError as error:  # of a setting; here the file is wrong, not the request
        raise ValueError(str(error)) from None
    if model.variant == WINDOWED and config.get("sliding_window", window_of(model)) != window_of(model):
        raise ValueError(f"its sliding window is {config['sliding_window']}, here it is {window_of(model)}")
    return model, int(config["vocab_size"])


def _refuse_unsupported(config: dict[str, Any]) -> None:
    fixed = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
        "rope_interleaved": False,
    }  # fmt: skip
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}, only {value!r} is supported")
    if method := config.get("quantization_config"):
        quantisation = method.get("quant_method") if isinstance(method, dict) else method
        raise ValueError(f"its weights are quantised ({quantisation}), which is not supported: take the original")
    windows = {str(layer) for layer in config.get("layer_types") or ()} - {"full_attention"}
    ours = dict(config.get("minitf") or {}).get("variant") == WINDOWED
    if (config.get("use_sliding_window") or windows) and not ours:
        raise ValueError(f"sliding windows are not supported ({', '.join(sorted(windows)) or 'use_sliding_window'})")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either notation."""
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", config.get("rope_theta", 10000.0)))
    old = rope.pop("type", "default")
    kind = rope.pop("rope_type", old)
    if float(rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return {"rope_theta": theta}
    if kind in ("llama3", "yarn"):
        original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", original)
    return {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": kind, **{k: v for k, v in rope.items() if v is not None}},
    }


# ---------------------------------------------------------------------------------------------------------------------
# weights


def load_weights(directory: Path, tied: bool) -> dict[str, Tensor]:
    """All parameters of a model folder in float32, from one file or from the shards of an index."""
    names = ["model.safetensors"]
    if (directory / INDEX).is_file() and not (directory / names[0]).is_file():
        names = _shards(directory / INDEX)
    elif not (directory / names[0]).is_file() and (pickled := sorted(directory.glob("pytorch_model*.bin"))):
        raise MinitfError(f"{pickled[0]} is a pickle, which is never opened: take the model's safetensors files")
    weights: dict[str, Tensor] = {}
    for name in names:
        weights |= read_tensors(directory / name)
    # Old files also hold rotary frequencies, which follow from the config, and the tied output matrix.
    redundant = [name for name in weights if name.endswith("rotary_emb.inv_freq")]
    if tied and "model.embed_tokens.weight" in weights:
        redundant += [name for name in weights if name == "lm_head.weight"]
    for name in redundant:
        del weights[name]
    if unsupported := [str(tensor.dtype) for tensor in weights.values() if not tensor.is_floating_point()]:
        raise MinitfError(f"{directory}: weights of {unsupported[0]} are not supported: take the original, unquantised")
    return {name: tensor.to(torch.float32) for name, tensor in weights.items()}


def _shards(index: Path) -> list[str]:
    """The file names in an index."""
    try:
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MinitfError(f"{index} is damaged: {error}") from None
    if any(Path(name).name != name for name in names):
        raise MinitfError(f"{index} names files outside its folder")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# the hub


def is_hub_name(name: str) -> bool:
    """Whether `name` means a model on the hub, OWNER/NAME or OWNER/NAME@REVISION, rather than a local path."""
    found = HUB_NAME.fullmatch(name)
    owner = name.split("/")[0]
    return found is not None and owner != "runs" and not Path(name).exists() and not Path(owner).is_dir()


def fetch_model(name: str) -> Path:
    """The local folder of the hub model OWNER/NAME or OWNER/NAME@REVISION, downloaded or from the cache.

    `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` apply as in every Hugging Face library.
    """
    from huggingface_hub import snapshot_download

    found = HUB_NAME.fullmatch(name)
    assert found is not None
    try:
        folder = Path(snapshot_download(found["repo"], revision=found["revision"], allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # of the library, its HTTP client or the system; classes differ between versions
        raise _hub_error(name, error) from error
    if not (folder / "config.json").is_file():
        raise RequestError(f"{name} on the hub has no config.json: it is not a transformers model")
    return folder


def _hub_error(name: str, error: Exception) -> MinitfError:
    """The error of a download as one line."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return RequestError(f"{name} is gated: request access on its page, then log in with: hf auth login")
    if isinstance(error, hub.RepositoryNotFoundError):
        return RequestError(f"{name} is neither here nor on the hub: check the name, or log in with: hf auth login")
    if isinstance(error, hub.RevisionNotFoundError):
        return RequestError(f"{name}: the model has no such revision")
    if isinstance(error, hub.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return MinitfError(f"{name} is not in the cache, and HF_HUB_OFFLINE forbids downloading it")
    reason = one_line(error.__cause__ or error, 160)
    return MinitfError(f"{name}: cannot download it from {constants.ENDPOINT}: {type(error).__name__}: {reason}")
