"""llama.cpp's side: the same checkpoint in its own format, decoded by its server inside a Python process."""

import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

# Names of a block's matrices and norms, Hugging Face's -> llama.cpp's; `.weight` follows both.
TENSORS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def convert(checkpoint: str, path: str) -> dict[str, Any]:
    """Write a checkpoint (Qwen3's architecture) as GGUF in float32, with names in place of its tokens' texts."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")  # it is given ids and asked for ids: any tokenizer serves
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    for name, tensor in load_file(Path(checkpoint) / "model.safetensors").items():
        writer.add_tensor(gguf_name(name), tensor.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outside:
        return f"{outside[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{TENSORS[part]}.weight"


def decode(file: str, prompt: list[int], num_tokens: int, repeats: int) -> dict[str, Any]:
    """Greedy continuation of one prompt, `repeats` times after one to warm up: seconds of each, and the ids.

    By its server, the way xllamacpp offers, on one thread and on all: the faster of the two counts.
    """
    import os

    import xllamacpp

    best: dict[str, Any] = {}
    for num_threads in sorted({1, os.cpu_count() or 1}):
        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx = len(prompt) + num_tokens + 1
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
        server = xllamacpp.Server(params)
        request = {
            "prompt": prompt, "n_predict": num_tokens, "temperature": 0.0, "samplers": ["top_k"], "top_k": 1,
            "ignore_eos": True, "cache_prompt": False,
        }  # fmt: skip
        server.handle_completions(request)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            answer = server.handle_completions(request)
            seconds.append(time.perf_counter() - start)
        ids = [int(name) for name in re.findall(r"t(\d+)", answer["choices"][0]["text"])]
        result = {"seconds": seconds, "ids": [ids], "num_threads": num_threads, "timings": answer["timings"]}
        best = min((best or result, result), key=lambda result: statistics.median(result["seconds"]))
        del server
    return best
