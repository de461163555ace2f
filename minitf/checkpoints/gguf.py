"""Export as a GGUF file, for llama.cpp and the programs built on it; the command `export`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.checkpoints.locate import find_checkpoint
from minitf.errors import CommandParser, RequestError
from minitf.model import ModelConfig
from minitf.rope import scaled_frequencies
from minitf.system.files import atomic_replace
from minitf.tokenizer import Tokenizer, chars_of_bytes
from minitf.variants import STANDARD, name_of

FORMATS = ("gguf",)
TYPES = ("f32", "f16", "q8_0")
# Parameters of a block, Hugging Face's names -> llama.cpp's, without `.weight`.
TENSORS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# Pre-tokenizer patterns that llama.cpp implements; it would split text differently for any other.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms: a byte-level BPE with GPT-2's characters for bytes."""

    pre: str  # llama.cpp's name of the pre-tokenizer pattern
    tokens: list[str]
    merges: list[str]
    special: frozenset[int] = frozenset()
    added: frozenset[int] = frozenset()  # matched before text is split
    unused: frozenset[int] = frozenset()
    start_id: int | None = None  # prepended to every text
    end_id: int = 0
    chat_template: str = ""


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """A tokenizer's vocabulary, padded to `vocab_size`; RequestError if llama.cpp would tokenize text differently."""
    content = json.loads(tokenizer.to_json())
    pre, (ids, merges) = _kind(content)
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    named = {id_: token for token, id_ in ids.items()} | added
    unused = frozenset(range(vocab_size)) - set(named)
    return Vocabulary(
        pre=pre,
        tokens=[named.get(id_, f"[UNUSED{id_}]") for id_ in range(vocab_size)],
        # llama.cpp refuses a file without merges; this one never applies, as its first half is not a single character.
        merges=merges or [f"{tokenizer.end_token} {tokenizer.end_token}"],
        special=frozenset(token["id"] for token in content["added_tokens"] if token["special"]),
        added=frozenset(token["id"] for token in content["added_tokens"] if not token["special"]),
        unused=unused,
        start_id=tokenizer.start_ids[0] if tokenizer.start_ids else None,
        end_id=tokenizer.end_id,
        chat_template=tokenizer.chat_template,
    )


def _kind(content: dict[str, Any]) -> tuple[str, tuple[dict[str, int], list[str]]]:
    """llama.cpp's name of the pre-tokenizer pattern, and tokens and merges over bytes."""
    model, steps = content["model"], content["pre_tokenizer"]
    if model.get("type") != "BPE":
        raise RequestError(f"--format gguf: a {model.get('type')} tokenizer is not supported, only byte-level BPE is")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if steps is None and (content["decoder"] or {}).get("type") == "Fuse" and not merges:
        return "gpt-2", _characters(model["vocab"])
    steps = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps or {}]
    # A ByteLevel step splits like GPT-2 unless use_regex is false, and maps bytes to characters.
    *before, last = steps
    patterns = [step.get("pattern", {}).get("Regex") for step in before]
    own_regex = bool(last.get("use_regex", True))
    known = {
        "gpt-2": own_regex and not before,
        "smollm": own_regex and before == [{"type": "Digits", "individual_digits": True}],
        "qwen2": not own_regex and patterns == [QWEN2],
        "llama-bpe": not own_regex and patterns == [LLAMA3],
    }
    found = [name for name, matches in known.items() if matches]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or not found:
        kinds = ", ".join(step.get("type", "none") for step in steps)
        raise RequestError(
            f"--format gguf: llama.cpp would not split text as this tokenizer does ({kinds}); "
            f"those like {', '.join(known)} can be exported"
        )
    if model.get("ignore_merges", False) != (found[0] == "llama-bpe"):
        raise RequestError("--format gguf: this tokenizer's ignore_merges is not what llama.cpp would do")
    return found[0], (model["vocab"], merges)


def _characters(alphabet: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    """A character vocabulary as byte tokens; merges build a multi-byte character from left to right."""
    byte_char = {byte: char for char, byte in chars_of_bytes().items()}
    ids: dict[str, int] = {}
    merges: dict[str, None] = {}
    for char, id_ in alphabet.items():
        name = "".join(byte_char[byte] for byte in char.encode())
        ids[name] = id_
        merges |= dict.fromkeys(f"{name[:end]} {name[end]}" for end in range(1, len(name)))
    return ids, list(merges)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    stem = name.removesuffix(".weight")
    if stem in OUTER_TENSORS:
        return f"{OUTER_TENSORS[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{TENSORS[part]}.weight"


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    vocabulary: Vocabulary,
    kind: str = "f32",
    name: str = "",
) -> None:
    """Write a model as GGUF with weights of a type in TYPES; RequestError if llama.cpp cannot compute the same."""
    if config.variant != STANDARD or config.attention_class:
        what = f"class {name_of(config.attention_class)}" if config.attention_class else f"variant {config.variant}"
        raise RequestError(f"--format gguf: llama.cpp does not have the attention of this model, the {what}")
    try:
        import gguf
    except ImportError:
        raise RequestError("--format gguf needs the package gguf: pip install 'minitf[export]'") from None
    with atomic_replace(path) as partial:
        writer = gguf.GGUFWriter(str(partial), "qwen3" if config.qk_norm else "llama")
        _write_settings(writer, config, kind, name or path.stem)
        _write_vocabulary(writer, vocabulary)
        if config.rope_scaling.get("rope_type") == "llama3":
            writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
        for parameter, tensor in weights.items():
            _write_tensor(writer, parameter, tensor.detach().float().cpu().numpy(), config, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _write_settings(writer: Any, config: ModelConfig, kind: str, name: str) -> None:
    import gguf

    writer.add_name(name)
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[kind]
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    scaling = config.rope_scaling
    rope_type = scaling.get("rope_type", "default")
    if rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif rope_type not in ("default", "llama3") or (rope_type == "llama3" and config.qk_norm):
        architecture = "qwen3" if config.qk_norm else "llama"
        raise RequestError(f"--format gguf: rope_type {rope_type} of a {architecture} model is not supported")


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    from gguf import TokenType

    types = dict.fromkeys(vocabulary.special, TokenType.CONTROL) | dict.fromkeys(
        vocabulary.added, TokenType.USER_DEFINED
    )
    types |= dict.fromkeys(vocabulary.unused, TokenType.UNUSED)
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([types.get(id_, TokenType.NORMAL) for id_ in range(len(vocabulary.tokens))])
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.end_id if vocabulary.start_id is None else vocabulary.start_id)
    writer.add_eos_token_id(vocabulary.end_id)
    writer.add_pad_token_id(vocabulary.end_id)
    writer.add_add_bos_token(vocabulary.start_id is not None)
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocabulary.chat_template)


def _write_tensor(writer: Any, name: str, values: npt.NDArray[np.float32], config: ModelConfig, kind: str) -> None:
    import gguf

    if not config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
        # llama.cpp's Llama rotates neighbouring channels, Hugging Face's pairs channel i with i + head_dim / 2.
        heads = config.num_heads if "q_proj" in name else config.num_kv_heads
        values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    values = np.ascontiguousarray(values)
    if kind == "f32" or values.ndim == 1:
        writer.add_tensor(gguf_name(name), values)
    elif kind == "q8_0" and values.shape[1] % 32 == 0:  # its blocks are 32 entries of a row
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
    else:
        writer.add_tensor(gguf_name(name), values.astype(np.float16))


def _llama3_factors(config: ModelConfig) -> npt.NDArray[np.float32]:
    """The factors by which llama.cpp divides the rotary frequencies."""
    import torch

    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    scaled, _ = scaled_frequencies(frequencies, config.rope_theta, config.rope_scaling)
    return (frequencies / scaled).numpy().astype(np.float32)


def export_run(run: str, kind: str = "f32", out: str | None = None) -> Path:
    """Write the model that RUN names as GGUF to `out` (default: into the run, or here); returns the path."""
    directory = find_checkpoint(run)
    run_dir = directory.parent.parent
    own = (run_dir / "config.yaml").is_file()
    name = run_dir.parent.name if own else Path(run).name.replace("@", "-")
    path = Path(out) if out else (run_dir if own else Path()) / f"{name}-{kind}.gguf"
    checkpoint = load_checkpoint(directory, device="cpu")
    vocabulary = vocabulary_of(checkpoint.tokenizer, checkpoint.model.vocab_size)
    if not path.parent.is_dir():
        raise RequestError(f"--out {path}: the directory {path.parent} does not exist")
    write_gguf(path, checkpoint.model.config, dict(checkpoint.model.named_parameters()), vocabulary, kind, name)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command `export`."""
    p = CommandParser(description="Write a model as a GGUF file, for llama.cpp and the programs built on it.")
    p.add_argument("--run", default="latest", help="a run, a checkpoint, OWNER/NAME of the hub, or latest (default)")
    p.add_argument("--format", default="gguf", choices=FORMATS, help="the only format, besides the checkpoint itself")
    p.add_argument("--type", default="f32", choices=TYPES, help="type of the weights: f32 (default), f16 or q8_0")
    p.add_argument("--out", metavar="FILE", help="output file; default: NAME-TYPE.gguf in the run")
    args = p.parse_args(argv)
    path = export_run(args.run, args.type, args.out)
    print(f"wrote {path.stat().st_size / 1e6:.1f} MB; try it: llama-cli -m {path} -p 'PROMPT' -no-cnv", file=sys.stderr)
    print(path)
    return 0


if __name__ == "__main__":
    from minitf.errors import run_command

    raise SystemExit(run_command(main))
