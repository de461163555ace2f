"""Hugging Face's side: its Trainer on a model of the same architecture and shape, and its `generate`."""

import importlib.util
import itertools
import time
from collections.abc import Mapping
from typing import Any


def unavailable(*packages: str) -> str | None:
    """Why these packages cannot be used, or None."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed (pip install -e '.[benchmark]')" if missing else None


def train(
    shape: Mapping[str, Any], vocab_size: int, batch_size: int, num_steps: int, work: str, precision: str = "bf16",
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Seconds of each step of `Trainer` in this precision, otherwise with its defaults, on random tokens."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_heads"],
        head_dim=shape["hidden_size"] // shape["num_heads"],
        max_position_embeddings=shape["context_length"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(vocab_size, (batch_size * (num_steps + 1), shape["context_length"]))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=work, bf16=precision == "bf16", use_cpu=device == "cpu", per_device_train_batch_size=batch_size,
        max_steps=num_steps, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return {"seconds": [after - before for before, after in itertools.pairwise(times)]}


def decode(checkpoint: str, prompt: list[int], batch_size: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Greedy `generate` with a cache, `repeats` times after a warm-up: seconds of each, and the ids."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    model.generation_config.eos_token_id = None  # both sides generate all tokens
    model.generation_config.pad_token_id = 0
    ids_BT = torch.tensor([prompt] * batch_size, device=device)
    options = {"max_new_tokens": num_tokens, "do_sample": False, "use_cache": True}

    def once() -> list[list[int]]:
        with torch.inference_mode():
            output = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
        return output[:, ids_BT.shape[1] :].tolist()  # type: ignore[no-any-return]

    once()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        rows = once()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "ids": rows}
