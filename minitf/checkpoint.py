"""Checkpoints: a training state <-> a directory that is a Hugging Face model.

    model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json   the model
    trainer_state.json trainer_state.safetensors                                                all that resuming needs

No pickle anywhere. A checkpoint is written beside its place, flushed and renamed, so a name either holds a whole
checkpoint or does not exist; `trainer_state.json` carries the SHA-256 of every other file and of itself.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitf.errors import MinitfError, RequestError
from minitf.hardware import choose_device
from minitf.model import ModelConfig, Transformer
from minitf.storage import flush
from minitf.tokenizer import Tokenizer

RUNS = Path("runs")
STEP_NAME = re.compile(r"step_(\d{8,})")


@dataclass
class TrainState:
    """All of a training run that changes: with the config, exactly what resuming needs."""

    step: int = 0  # optimiser steps done
    num_steps: int = 0  # steps of the whole run, which its schedule depends on
    num_steps_final: bool = False  # whether a run that ends by the clock has corrected them by its real speed
    tokens: int = 0  # target tokens trained on
    train_s: float = 0.0  # seconds in training steps
    warmup_s: float = 0.0  # seconds of compilation and first steps before the training
    elapsed_s: float = 0.0  # wall seconds
    best_loss: float = float("inf")  # held-out nats per token of the checkpoint `best`
    last_val: dict[str, float] = field(default_factory=dict)  # newest held-out metrics
    aligning_heads: list[list[int]] = field(
        default_factory=list
    )  # [layer, head] of those that align pairs, by the newest look

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "TrainState":
        """The part of a checkpoint's `trainer_state.json` that is a TrainState."""
        try:
            return cls(**{item.name: state[item.name] for item in fields(cls)})
        except KeyError as error:
            raise MinitfError(f"the checkpoint has no {error} in trainer_state.json: it cannot be resumed") from None


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: a model in evaluation mode, its tokenizer, and where they come from."""

    model: Transformer
    tokenizer: Tokenizer
    directory: Path
    step: int | None
    state: dict[str, Any]  # trainer_state.json; empty for a foreign model

    @property
    def answers(self) -> bool:
        """Whether it was trained on pairs: given a text it turns it into another."""
        return self.tokenizer.target_id is not None and self.state.get("data", {}).get("kind") == "pairs"

    @property
    def aligning_heads(self) -> list[tuple[int, int]]:
        """(layer, head) of those that align source and target, as found when it was saved."""
        c = self.model.config
        heads = [(int(layer), int(head)) for layer, head in self.state.get("aligning_heads", [])]
        return [(layer, head) for layer, head in heads if 0 <= layer < c.num_layers and 0 <= head < c.num_heads]


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def to_hugging_face(config: ModelConfig, vocab_size: int, end_id: int) -> dict[str, Any]:
    """The `config.json` of this architecture: Qwen3's, or Llama's without QK-norm."""
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "torch_dtype": "float32",
        "minitf": {"dropout": config.dropout},
    }


def from_hugging_face(config: dict[str, Any]) -> tuple[ModelConfig, int]:
    """The model config and vocabulary size of a `config.json`; KeyError, TypeError or ValueError where it is none."""
    if config["model_type"] not in ("qwen3", "llama"):
        raise ValueError(f"model_type {config['model_type']!r} is neither qwen3 nor llama")
    # transformers 5 writes rope_parameters; before it rope_theta and rope_scaling stood beside each other.
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(f"its rotary positions are scaled ({rope_type}), which is not supported")
    fixed = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}, only {value!r} is supported")
    model = ModelConfig(
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        num_heads=int(config["num_attention_heads"]),
        num_kv_heads=int(config["num_key_value_heads"]),
        head_dim=int(config.get("head_dim") or 0),
        intermediate_size=int(config["intermediate_size"]),
        context_length=int(config["max_position_embeddings"]),
        rope_theta=float(rope["rope_theta"]),
        qk_norm=config["model_type"] == "qwen3",
        tie_embeddings=bool(config["tie_word_embeddings"]),
        dropout=float(config.get("minitf", {}).get("dropout", 0.0)),
    )
    return model, int(config["vocab_size"])


# ---------------------------------------------------------------------------------------------------------------------
# write


def save_checkpoint(
    checkpoints: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer_state: dict[str, Tensor],
    state: dict[str, Any],
    *,
    is_best: bool,
    keep: int,
    shards: Path | None = None,
) -> Path:
    """Write `checkpoints/step_NNNNNNNN`, point `latest` (and `best`) at it, and remove the oldest beyond `keep`.

    `state` is JSON-able and holds "step". `shards` is a directory beside the checkpoints that is moved into this one.
    Raises OSError (no space, read-only) with nothing lost: what was saved before stays, and the half-written directory
    is removed.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    final = checkpoints / f"step_{state['step']:08d}"
    partial = checkpoints / f".{final.name}.partial"
    for stale in checkpoints.glob(".step_*.partial"):  # of a run that was killed while saving
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir()
        # Tied tensors and views are cloned: a file holds each parameter once, whole.
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        config = to_hugging_face(model.config, model.vocab_size, tokenizer.end_id)
        _write_json(partial / "config.json", config)
        ids = {"bos_token_id": tokenizer.end_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.end_id}
        _write_json(partial / "generation_config.json", ids)
        tokenizer.save(partial)
        tensors = {name: value.detach().cpu().contiguous() for name, value in optimizer_state.items()}
        save_file(tensors, partial / "trainer_state.safetensors")
        if shards:
            os.replace(shards, partial / "shards")
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        digests = {file.relative_to(partial).as_posix(): _sha256(file) for file in files}
        content = {**state, "sha256": digests}
        _write_json(partial / "trainer_state.json", {**content, "own_sha256": _own_sha256(content)})
        for file in partial.iterdir():
            flush(file)
        replaced = checkpoints / f".{final.name}.replaced.partial"
        if final.exists():  # moved aside rather than removed: at no moment is there neither
            os.replace(final, replaced)
        os.replace(partial, final)
        shutil.rmtree(replaced, ignore_errors=True)
    except safetensors.SafetensorError as error:  # its own wrapping of a failed write
        raise MinitfError(f"cannot write the checkpoint {final}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    flush(checkpoints)
    for link in ["latest", "best"] if is_best else ["latest"]:
        _point(checkpoints / link, final.name)
    _prune(checkpoints, keep)
    return final


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sha256(content: dict[str, Any]) -> str:
    """Of all that `trainer_state.json` says, but for this."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _prune(checkpoints: Path, keep: int) -> None:
    kept = {os.path.realpath(checkpoints / link) for link in ("latest", "best")}
    steps = sorted((p for p in checkpoints.iterdir() if STEP_NAME.fullmatch(p.name)), key=lambda p: p.name)
    for directory in steps[: -keep or None]:
        if os.path.realpath(directory) not in kept:
            shutil.rmtree(directory, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# find


def newest_run(runs: Path = RUNS) -> Path:
    """The run directory under `runs` that saved a checkpoint last."""
    links = [path for pattern in ("*/*", "*/*/*") for path in runs.glob(f"{pattern}/checkpoints/latest")]
    if not links:
        raise RequestError(f"no run with a checkpoint under {runs.absolute()}: train one with python -m minitf.train")
    return max(links, key=_modified).parent.parent


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def find_run(run: str | Path) -> Path:
    """The run directory that RUN (a run directory, one of its checkpoints, or `latest`) names."""
    if str(run) == "latest":
        return newest_run()
    path = Path(run)
    for directory in (path, *path.absolute().parents[:2]):
        if (directory / "config.yaml").is_file():
            return directory
    if links := list(path.glob("*/checkpoints/latest")):  # runs/NAME: the newest of that name
        return max(links, key=_modified).parent.parent
    raise RequestError(f"{run} is not a run: no config.yaml in it; a run is a directory such as {RUNS}/NAME/DATE_TIME")


def find_checkpoint(run: str | Path, prefer: str = "best") -> Path:
    """The checkpoint directory that RUN names; of a run the one called `prefer` (best or latest)."""
    if str(run) == "latest":
        run = newest_run()
    path = Path(run)
    if (path / "config.json").is_file():
        return path.resolve()
    for name in (prefer, "latest", "best"):
        if (path / "checkpoints" / name / "config.json").is_file():
            return (path / "checkpoints" / name).resolve()
    if path.is_dir() and any(path.glob("*/checkpoints/latest")):  # runs/NAME: the newest of that name
        return find_checkpoint(max(path.glob("*/checkpoints/latest"), key=_modified).parent.parent, prefer)
    if not path.exists():
        raise RequestError(f"{run} does not exist: give a run directory, a checkpoint directory, or latest")
    if (path / "config.yaml").is_file():
        raise RequestError(f"the run {run} has no checkpoint yet")
    raise RequestError(f"{run} is neither a run nor a checkpoint: it has no config.json and no checkpoints/")


# ---------------------------------------------------------------------------------------------------------------------
# read


def load_checkpoint(run: str | Path, device: str = "auto", prefer: str = "best") -> Checkpoint:
    """Load the model and tokenizer that RUN names; a damaged checkpoint is a MinitfError that names the file."""
    directory = find_checkpoint(run, prefer)
    state = _read_json(directory / "trainer_state.json") if (directory / "trainer_state.json").exists() else {}
    own_digest = state.pop("own_sha256", None)
    if own_digest and own_digest != _own_sha256(state):
        raise MinitfError(f"{directory / 'trainer_state.json'} is damaged: its content is not what was saved")
    for name, digest in state.get("sha256", {}).items():
        _check_digest(directory / name, digest)
    try:
        config, vocab_size = from_hugging_face(_read_json(directory / "config.json"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MinitfError(f"{directory / 'config.json'}: cannot use this model: {error}") from None
    weights = load_tensors(directory / "model.safetensors")
    model = Transformer(config, vocab_size)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise MinitfError(f"{directory / 'model.safetensors'} does not fit its config.json: {reason}") from None
    return Checkpoint(
        model.to(choose_device(device)).eval(), Tokenizer.load(directory), directory, state.get("step"), state
    )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file on the CPU; MinitfError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise MinitfError(f"{path} is missing: this checkpoint is damaged") from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise MinitfError(f"{path} is damaged: {error}") from None


def load_optimizer_state(directory: Path) -> dict[str, Tensor]:
    """What `save_checkpoint` was given as `optimizer_state`, with its `random_state` and `pending`."""
    tensors = load_tensors(directory / "trainer_state.safetensors")
    for name in ("random_state", "pending"):
        if name not in tensors:
            raise MinitfError(f"{directory / 'trainer_state.safetensors'} has no {name}: it cannot be resumed")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MinitfError(f"{path} is missing: this checkpoint is damaged") from None
    except (ValueError, RecursionError) as error:
        raise MinitfError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise MinitfError(f"{path} is damaged: not a JSON object")
    return content


def _check_digest(path: Path, digest: str) -> None:
    if not path.is_file():
        raise MinitfError(f"{path} is missing: this checkpoint is damaged")
    if _sha256(path) != digest:
        raise MinitfError(f"{path} is damaged: its content is not what was saved; another checkpoint of the run may be")
