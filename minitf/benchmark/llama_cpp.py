"""llama.cpp's side: the same checkpoint in its own format, decoded by its server inside a Python process."""

import re
import statistics
import time
from pathlib import Path
from typing import Any


def convert(checkpoint: str, path: str) -> dict[str, Any]:
    """Write a checkpoint as GGUF in float32, with numbered names as tokens.

    The prompt is given as ids, and `decode` reads the ids from the generated names, so the tokenizer does not matter.
    """
    from minitf.checkpoints.checkpoint import load_checkpoint
    from minitf.checkpoints.gguf import Vocabulary, write_gguf

    model = load_checkpoint(checkpoint, device="cpu").model
    names = Vocabulary("gpt-2", tokens=[f"t{i}" for i in range(model.vocab_size)], merges=["t 0"])
    write_gguf(Path(path), model.config, dict(model.named_parameters()), names)
    return {}


def decode(file: str, prompt: list[int], num_tokens: int, repeats: int) -> dict[str, Any]:
    """Greedy continuation of one prompt, `repeats` times after a warm-up: seconds of each, and the ids.

    Through xllamacpp's server, with one thread and with all; the faster of the two counts.
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
