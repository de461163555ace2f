"""Export as GGUF: fields, weights, and a vocabulary that gives the same ids in llama.cpp."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from helpers import make_text
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from minitf.checkpoints.checkpoint import save_checkpoint
from minitf.checkpoints.gguf import LLAMA3, QWEN2, TENSORS, Vocabulary, export_run, gguf_name, main, vocabulary_of
from minitf.data.tokenizer_training import train_tokenizer
from minitf.errors import RequestError, run_command
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer, TokenizerConfig, chars_of_bytes

gguf: Any = pytest.importorskip("gguf", reason="install the extra minitf[export]")


def test_every_parameter_has_a_llama_cpp_name(make_model: Callable[..., Transformer]) -> None:
    names = {gguf_name(name) for name, _ in make_model(tie_embeddings=False).named_parameters()}
    outside = {"token_embd.weight", "output_norm.weight", "output.weight"}
    assert names == outside | {f"blk.{i}.{part}.weight" for i in (0, 1) for part in TENSORS.values()}


def export(model: Transformer, tokenizer: Tokenizer, place: Path, kind: str) -> Any:
    checkpoint = save_checkpoint(place, model, tokenizer, {}, {"step": 1}, is_best=True, keep=1)
    return gguf.GGUFReader(export_run(str(checkpoint), kind, str(place / "model.gguf")))


def fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head in the order first half's 0, second half's 0, first half's 1, ..."""
    half = weight.shape[0] // num_heads // 2
    rows = [h * 2 * half + part * half + i for h in range(num_heads) for i in range(half) for part in (0, 1)]
    return weight[rows]


@pytest.mark.parametrize("qk_norm", [True, False])
def test_gguf_holds_every_field_and_weight(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path, qk_norm: bool
) -> None:
    shape = {"qk_norm": qk_norm, "tie_embeddings": qk_norm, "head_dim": 6, "rope_theta": 500.0, "rms_norm_eps": 1e-5}
    model = make_model(tokenizer.vocab_size + 2, intermediate_size=40, **shape)
    reader = export(model, tokenizer, tmp_path, "f32")
    name = "qwen3" if qk_norm else "llama"
    content = fields(reader)
    tokens, merges = content.pop("tokenizer.ggml.tokens"), content.pop("tokenizer.ggml.merges")
    types = content.pop("tokenizer.ggml.token_type")
    assert content.pop(f"{name}.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert content == {
        "general.architecture": name, "general.name": "step_00000001", "general.file_type": 0,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{name}.context_length": 32, f"{name}.embedding_length": 32, f"{name}.block_count": 2,
        f"{name}.feed_forward_length": 40, f"{name}.attention.head_count": 4, f"{name}.attention.head_count_kv": 2,
        f"{name}.attention.key_length": 6, f"{name}.attention.value_length": 6, f"{name}.rope.dimension_count": 6,
        f"{name}.rope.freq_base": 500.0, f"{name}.vocab_size": 302,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": tokenizer.end_id,
        "tokenizer.ggml.eos_token_id": tokenizer.end_id, "tokenizer.ggml.padding_token_id": tokenizer.end_id,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }  # fmt: skip
    assert tokens == [tokenizer.backend.id_to_token(i) for i in range(300)] + ["[UNUSED300]", "[UNUSED301]"]
    assert len(merges) == 300 - 257
    expected_types = [gguf.TokenType.NORMAL] * 300 + [gguf.TokenType.UNUSED] * 2
    expected_types[tokenizer.end_id] = gguf.TokenType.CONTROL
    assert types == expected_types

    written = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
    expected = {gguf_name(key): value.detach() for key, value in model.named_parameters()}
    if not qk_norm:
        for layer in (0, 1):
            for part, heads in (("q", 4), ("k", 2)):
                key = f"blk.{layer}.attn_{part}.weight"
                expected[key] = permuted(expected[key], heads)
    assert set(written) == set(expected)
    assert ("output.weight" in written) is not qk_norm
    for key, value in expected.items():
        torch.testing.assert_close(written[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(("kind", "file_type", "most"), [("f16", 1, 1e-3), ("q8_0", 7, 8e-3)])
def test_quantised_weights_are_within_their_rounding(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path, kind: str, file_type: int, most: float
) -> None:
    model = make_model(tokenizer.vocab_size, intermediate_size=40)  # 40 is no multiple of the block size 32
    reader = export(model, tokenizer, tmp_path, kind)
    assert fields(reader)["general.file_type"] == file_type
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == types["blk.1.ffn_up.weight"] == kind.upper()
    assert types["blk.1.ffn_down.weight"] == "F16"
    expected = {gguf_name(key): value.detach().numpy() for key, value in model.named_parameters()}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(values, expected[tensor.name], rtol=0, atol=most * np.abs(values).max())


def test_rope_scaling_is_exported(make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
    content = fields(export(make_model(300, rope_scaling=scaling), tokenizer, tmp_path, "f32"))
    assert (content["qwen3.rope.scaling.type"], content["qwen3.rope.scaling.factor"]) == ("linear", 4.0)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    model = make_model(300, rope_scaling=scaling, qk_norm=False)
    reader = export(model, tokenizer, tmp_path, "f32")
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = make_model(300, qk_norm=False)
    turned = torch.atan2(model.rotary[1, 1, :4], model.rotary[0, 1, :4])  # at position 1 the angle is the frequency
    frequencies = torch.atan2(plain.rotary[1, 1, :4], plain.rotary[0, 1, :4])
    np.testing.assert_allclose(frequencies / factors, turned, rtol=1e-5)
    assert factors.min() == 1
    assert factors.max() == 8
    for refused in ({**scaling, "rope_type": "yarn"}, scaling):
        with pytest.raises(RequestError, match=f"rope_type {refused['rope_type']} of a qwen3"):
            export(make_model(300, rope_scaling=refused), tokenizer, tmp_path, "f32")
    assert not list(tmp_path.glob(".*"))


def as_llama_cpp(words: Vocabulary, text: str) -> list[int]:
    """llama.cpp's tokens of a text of one word: bytes merged by rank; unknown pieces byte by byte."""
    stand_in = {byte: char for char, byte in chars_of_bytes().items()}
    parts = [stand_in[byte] for byte in text.encode()]
    ranks = {merge: rank for rank, merge in enumerate(words.merges)}
    while True:
        pairs = [(ranks[f"{a} {b}"], i) for i, (a, b) in enumerate(pairwise(parts)) if f"{a} {b}" in ranks]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [words.tokens.index(piece) for part in parts for piece in ([part] if part in words.tokens else part)]


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_exported_vocabularies_give_the_same_ids(kind: str) -> None:
    text = "naïve–世界🙂"
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=280), [text, make_text(50), text])
    words = vocabulary_of(tokenizer, tokenizer.vocab_size)
    assert words.pre == "gpt-2"
    assert words.merges
    assert as_llama_cpp(words, text) == tokenizer.encode(text)


def with_split(pattern: str | None, digits: bool = False, **model: Any) -> Tokenizer:
    """A byte-level tokenizer with the pre-tokenizer `pattern`, like those of pretrained models."""
    byte = train_tokenizer(TokenizerConfig(kind="byte"), [])
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte.backend.get_vocab(), merges=[("t", "h")] * 0, **model))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.NFC() if pattern == QWEN2 else None
    backend.add_tokens([AddedToken("<think>", special=False)])
    return Tokenizer(backend)


def test_pre_tokenizers_of_pretrained_models_are_recognised() -> None:
    assert vocabulary_of(with_split(None), 300).pre == "gpt-2"
    assert vocabulary_of(with_split(None, digits=True), 300).pre == "smollm"
    assert vocabulary_of(with_split(QWEN2), 300).pre == "qwen2"
    assert vocabulary_of(with_split(LLAMA3, ignore_merges=True), 300).pre == "llama-bpe"
    words = vocabulary_of(with_split(QWEN2), 300)
    assert [words.tokens[id_] for id_ in words.added] == ["<think>"]
    assert len(words.unused) == 300 - 258
    with pytest.raises(RequestError, match=r"would not split.*Split, ByteLevel"):
        vocabulary_of(with_split(r"\w+"), 300)
    with pytest.raises(RequestError, match="ignore_merges"):
        vocabulary_of(with_split(QWEN2, ignore_merges=True), 300)


def test_a_sentencepiece_tokenizer_is_refused_by_name() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"▁a": 0, "</s>": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(RequestError, match="Metaspace"):
        vocabulary_of(Tokenizer(backend), 2)
    with pytest.raises(RequestError, match="Unigram"):
        vocabulary_of(Tokenizer(tokenizers.Tokenizer(models.Unigram([("a", 0.0), ("</s>", 0.0)], None, False))), 2)


def test_export_command_writes_a_file(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.gguf"
    assert main(["--run", str(trained_run), "--format", "gguf", "--type", "q8_0", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert fields(gguf.GGUFReader(out))["general.name"] == "tiny"
    assert run_command(lambda: main(["--run", str(trained_run), "--out", str(tmp_path / "no/where.gguf")])) == 2
