"""A checkpoint is a Hugging Face model: transformers loads it and computes the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise

from minitf.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from minitf.data.tokenizer_training import train_tokenizer
from minitf.errors import MinitfError
from minitf.generate import GenerationRequest, generate
from minitf.inference.sampling import Sampling
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer, TokenizerConfig

transformers: Any = pytest.importorskip("transformers", reason="install the extra minitf[test]")

SHAPES = [
    pytest.param({"tie_embeddings": tied, "qk_norm": qk_norm, "num_kv_heads": groups}, id=f"{tied}-{qk_norm}-{groups}")
    for tied in (True, False)
    for qk_norm in (True, False)
    for groups in (4, 2)
] + [pytest.param({"head_dim": 12, "rope_theta": 500.0, "intermediate_size": 40}, id="odd sizes")]


def save(model: Transformer, tokenizer: Tokenizer, directory: Path) -> Path:
    return save_checkpoint(directory, model, tokenizer, {}, {"step": 1}, is_best=True, keep=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path, shape: dict[str, Any]
) -> None:
    model = make_model(tokenizer.vocab_size, context_length=128, **shape)
    checkpoint = save(model, tokenizer, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report  # no weight is missing, unexpected or of another shape
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if model.config.qk_norm else "LlamaForCausalLM")
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == [type(theirs).__name__]
    assert theirs.config.tie_word_embeddings == model.config.tie_embeddings
    assert theirs.num_parameters() == model.num_parameters()
    ids_BT = torch.randint(tokenizer.vocab_size, (2, 128))
    with torch.no_grad():
        logits = model(ids_BT)
        torch.testing.assert_close(theirs(ids_BT).logits, logits, rtol=0, atol=1e-4)
    assert logits.std() > 0.5


@pytest.mark.parametrize("qk_norm", [True, False])
def test_transformers_generates_the_same_text(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path, qk_norm: bool
) -> None:
    model = make_model(tokenizer.vocab_size, context_length=128, qk_norm=qk_norm)
    checkpoint = save(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = tokenizer.encode("The cat sat on")
    steps = generate(model, GenerationRequest(prompt, Sampling(temperature=0)))
    ours = [int(next(steps).ids_B) for _ in range(100)]
    written = theirs.generate(torch.tensor([prompt]), max_new_tokens=100, min_new_tokens=100, do_sample=False)
    assert len(set(ours)) > 5
    assert tokenizer.end_id not in ours
    assert written[0, len(prompt) :].tolist() == ours


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_transformers_reads_the_same_ids_and_text(
    make_model: Callable[..., Transformer], tmp_path: Path, kind: str
) -> None:
    text = "The cat's  mat,\n\n\t— <|endoftext|> naïve 世界 "
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=270), [text * 3])
    checkpoint = save(make_model(tokenizer.vocab_size), tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.encode(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.end_id


def test_chat_template_matches_the_training_format(make_model: Callable[..., Transformer], tmp_path: Path) -> None:
    """For text the messages are joined verbatim; for pairs the source stands between its marks."""
    messages = [{"role": "user", "content": "The cat <|endoftext|>"}, {"role": "assistant", "content": " sat"}]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=260), ["The cat sat. "])
    theirs = transformers.AutoTokenizer.from_pretrained(save(make_model(tokenizer.vocab_size), tokenizer, tmp_path))
    asked = {"add_generation_prompt": True, "return_dict": False}
    assert theirs.apply_chat_template(messages, **asked) == tokenizer.encode("The cat <|endoftext|> sat")
    pairs = tokenizer.for_pairs()
    theirs = transformers.AutoTokenizer.from_pretrained(save(make_model(pairs.vocab_size), pairs, tmp_path / "pairs"))
    asked_pair = theirs.apply_chat_template([{"role": "user", "content": "The cat"}], **asked)
    assert asked_pair == pairs.encode_prompt("The cat")


def test_the_chat_template_of_a_pretrained_tokenizer_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}<|{{ message['role'] }}|>{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    loaded = Tokenizer.load(tmp_path)
    loaded.save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == template
    assert loaded.for_pairs().chat_template != template


def test_a_model_saved_by_transformers_loads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its config.json has the current format of transformers, its directory has no trainer_state."""
    shape = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **heads, **rope)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    ours = load_checkpoint(tmp_path)
    assert ours.model.config.rope_theta == 5000.0
    assert ours.step is None
    ids_BT = torch.randint(tokenizer.vocab_size, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids_BT), theirs(ids_BT).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}}, "longrope"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ],
)
def test_a_model_of_another_architecture_is_refused_by_name(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    checkpoint = save(make_model(tokenizer.vocab_size), tokenizer, tmp_path)
    (checkpoint / "trainer_state.json").unlink()
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(MinitfError, match=rf"config\.json.*{words}"):
        load_checkpoint(checkpoint)
