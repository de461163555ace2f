"""The model card of a checkpoint, its README.md: architecture, data, held-out metrics, config, a sample."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitf.checkpoints.hugging_face import HUB_NAME, is_hub_name, why_not_hugging_face
from minitf.checkpoints.train_state import TrainState
from minitf.data.config import DataConfig
from minitf.errors import MinitfError
from minitf.model import Transformer
from minitf.system.safe_io import check_size

MAX_CARD_BYTES = 1 << 20
TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""
USE = {  # by data.kind
    "text": "It continues text; it was not trained to follow instructions.",
    "pairs": "It turns one text into another: it reads the source between `<|source|>` and `<|target|>`, then writes "
    "the answer. Its chat template takes the last message as the source.",
}


def model_card(
    name: str,
    model: Transformer,
    data: DataConfig,
    description: str,
    state: TrainState,
    settings: Mapping[str, Mapping[str, Any]],
    sample: tuple[str, str] | None = None,
    origin: Mapping[str, str] | None = None,
) -> str:
    """A model card in Markdown with YAML front matter.

    `description` describes the data; `settings` are further sections of the config, name -> key -> value; `sample` is a
    prompt and the model's continuation; `origin` comes from `origin_of`.
    """
    c = model.config
    other = why_not_hugging_face(c)
    architecture = "minitf" if other else "Qwen3" if c.qk_norm else "Llama"
    parts = [
        _front_matter(name, data, state, origin or {}, "minitf" if other else "transformers"),
        f"# {name}\n",
        f"A small language model of {model.num_parameters() / 1e6:.2f}M parameters in the {architecture} architecture: "
        f"{c.num_layers} layers of {c.hidden_size}, {c.num_heads} heads, a context of {c.context_length} tokens, "
        f"a vocabulary of {model.vocab_size:,}. Trained with minitf.\n",
        f"{other[0].upper()}{other[1:]}. Load it with `minitf.load`.\n" if other else TRANSFORMERS,
        f"{USE[data.kind]}\n",
        f"## Data\n\n{description}.\n",
        _figures(state),
        *([_sample(*sample)] if sample else []),
        "## Config\n\n```yaml\n" + _yaml({"data": _data(data), **settings}) + "```\n",
    ]
    return "\n".join(parts)


def origin_of(init_from: str | None, directory: Path | None) -> dict[str, str]:
    """`base_model` and `license` of a model whose training began from the checkpoint `directory`, where known.

    They are copied from the checkpoint's own card. If `init_from` is a hub model, that is the `base_model`.
    """
    text = ""
    if directory is not None:
        with suppress(OSError, UnicodeDecodeError, MinitfError):
            check_size(directory / "README.md", MAX_CARD_BYTES)
            text = (directory / "README.md").read_text(encoding="utf-8")
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    known = dict(re.findall(r"(?m)^(license|base_model): *([\w.-]+(?:/[\w.-]+)?) *$", front[1] if front else ""))
    if init_from and is_hub_name(init_from) and (match := HUB_NAME.fullmatch(init_from)):
        known["base_model"] = match["repo"]
    return known


def _front_matter(name: str, data: DataConfig, state: TrainState, origin: Mapping[str, str], library: str) -> str:
    """YAML for the hub and its tools; JSON strings and lists are valid YAML."""
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [minitf]"]
    lines += [f"{key}: {value}" for key, value in origin.items()]
    on_hub = data.source == "hub" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.hub_path or "")
    if on_hub:
        lines.append(f"datasets: {json.dumps([data.hub_path])}")
    if val := state.last_val:
        dataset = str(data.hub_path) if on_hub else data.source
        metrics = [
            {"type": kind, "name": label, "value": round(float(val[kind]), 4)}
            for kind, label in (("bits_per_byte", "held-out bits per byte"), ("perplexity", "perplexity per token"))
            if kind in val
        ]
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": dataset, "name": f"held-out part of {dataset}"},
            "metrics": metrics,
        }
        lines.append(f"model-index: {json.dumps([{'name': name, 'results': [result]}])}")
    return "\n".join(["---", *lines, "---"]) + "\n"


def _figures(state: TrainState) -> str:
    rows = [
        ("steps", f"{state.step:,} of {state.num_steps:,}"),
        ("tokens trained on", f"{state.tokens:,}"),
        ("training time", f"{state.train_s / 60:.1f} min"),
    ]
    if val := state.last_val:
        rows += [
            ("held-out loss", f"{val['loss']:.4f} nats per token"),
            ("held-out bits per byte", f"{val['bits_per_byte']:.4f}"),
            ("held-out perplexity", f"{val['perplexity']:.2f} per token, over {val['num_tokens']:,} tokens"),
        ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"## Figures\n\n| what | value |\n|---|---|\n{table}\n"


def _sample(prompt: str, continuation: str) -> str:
    text = prompt + continuation
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"## Sample\n\nAfter the first words of the held-out text, `{prompt.replace('`', '')}`:\n\n" + (
        f"{fence}text\n{text}\n{fence}\n"
    )


def _data(data: DataConfig) -> dict[str, Any]:
    """The settings that identify the data, without local paths."""
    settings = {"kind": data.kind, "source": data.source, "val_fraction": data.val_fraction}
    if data.source == "files":
        settings["files"] = [_name_of(path) for path in data.files]
    if data.source == "hub":
        settings |= {key: getattr(data, key) for key in ("hub_path", "hub_name", "hub_split", "hub_revision")}
        settings["hub_path"] = str(data.hub_path) if is_hub_name(str(data.hub_path)) else _name_of(str(data.hub_path))
    return settings


def _name_of(path: str) -> str:
    return re.split(r"[/\\]", path)[-1]


def _yaml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for section, values in sections.items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"
