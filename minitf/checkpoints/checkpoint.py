"""Checkpoints: a training state <-> a directory that is a Hugging Face model.

    model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json   the model
    README.md                                                                                   its model card
    trainer_state.json trainer_state.safetensors                                                what resuming needs
    shards/                                                                      the sharded part of that (fsdp)

No pickle anywhere. A checkpoint is written to a temporary directory, flushed and renamed, so that a name either holds a
complete checkpoint or does not exist. `trainer_state.json` holds the SHA-256 of every other file and of itself.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Required, TypedDict, Unpack

import torch
from torch import Tensor

from minitf.backends import source
from minitf.checkpoints.hugging_face import from_hugging_face, is_hub_name, load_weights, to_hugging_face
from minitf.checkpoints.locate import LINKS, STEP_NAME, find_checkpoints, step_of
from minitf.errors import DeviceError, MinitfError, RequestError, UntrustedCode, one_line
from minitf.model import ModelConfig, Transformer
from minitf.system.files import flush, sha256
from minitf.system.hardware import choose_device
from minitf.system.safe_io import read_json, read_tensors, write_tensors
from minitf.tokenizer import Tokenizer
from minitf.variants import STANDARD, attention_class, copy_in, keep_copy, silenced

CORE = "minitf_core"  # in config.json: the hash of the forward pass that the weights were trained with
VARIANT = "minitf_variant"  # in config.json: the hash of the file of minitf/variants, if the model has one
MAX_ROTARY_ENTRIES = 1 << 27  # positions x head_dim of the rotary table, which every model allocates: 1 GB


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: a model in evaluation mode, its tokenizer, and where they were loaded from."""

    model: Transformer
    tokenizer: Tokenizer
    directory: Path
    step: int | None
    state: dict[str, Any]  # trainer_state.json; empty for a foreign model

    @property
    def answers(self) -> bool:
        """Whether the model was trained on pairs, so that it turns a source into an answer."""
        return self.tokenizer.target_id is not None and self.state.get("data", {}).get("kind") == "pairs"

    @property
    def document_mask(self) -> bool:
        """Whether the model was trained with attention inside documents only."""
        return bool(self.state.get("data", {}).get("document_mask"))

    @property
    def aligning_heads(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads that align source and target, as found when the checkpoint was saved."""
        c = self.model.config
        heads = [(int(layer), int(head)) for layer, head in self.state.get("aligning_heads", [])]
        return [(layer, head) for layer, head in heads if 0 <= layer < c.num_layers and 0 <= head < c.num_heads]


# ---------------------------------------------------------------------------------------------------------------------
# write


class SavedModel(Protocol):
    """What a checkpoint stores of a model."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def vocab_size(self) -> int: ...
    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


class SaveOptions(TypedDict, total=False):
    """How to save: `latest` always points at the new checkpoint."""

    is_best: Required[bool]  # point `best` at it, too
    keep: Required[int | None]  # how many checkpoints to keep, besides those linked; None: all
    card: str  # the README.md
    shards: Path | None  # a directory in `checkpoints` that is moved into the new one


def save_checkpoint(
    checkpoints: Path,
    model: SavedModel,
    tokenizer: Tokenizer,
    optimizer_state: Mapping[str, Tensor],
    state: dict[str, Any],
    before: Callable[[], None] = lambda: None,
    **options: Unpack[SaveOptions],
) -> Path:
    """Write `checkpoints/step_NNNNNNNN`, point links at it, and remove the oldest checkpoints.

    `state` is JSON-able and holds "step"; `before` is called when everything is on disk but not yet visible. Raises
    OSError (no space, read-only); earlier checkpoints then stay unchanged, and the incomplete directory is removed.
    """
    shards = options.get("shards")
    checkpoints.mkdir(parents=True, exist_ok=True)
    final = checkpoints / f"step_{state['step']:08d}"
    partial = checkpoints / f".{final.name}.partial"
    stale_names = (".step_*.partial", ".latest.replaced.partial", ".best.replaced.partial", ".shards_*")
    for stale in (path for name in stale_names for path in checkpoints.glob(name)):
        if stale != shards:  # left by a run that was killed while saving
            shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir()
        if shards:
            os.replace(shards, partial / "shards")
        _write(partial, model, tokenizer, optimizer_state, state, options.get("card", ""))
        before()
        replaced = checkpoints / f".{final.name}.replaced.partial"
        if final.exists():  # moved aside rather than removed: a complete checkpoint exists at every moment
            os.replace(final, replaced)
        os.replace(partial, final)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    flush(checkpoints)
    for link in ["latest", "best"] if options["is_best"] else ["latest"]:
        _point(checkpoints / link, final.name)
    _prune(checkpoints, options["keep"])
    return final


def _write(
    directory: Path,
    model: SavedModel,
    tokenizer: Tokenizer,
    optimizer_state: Mapping[str, Tensor],
    state: dict[str, Any],
    card: str,
) -> None:
    """Write all files into `directory`, flush them, and verify them by reading them back."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in optimizer_state.items()}
    path = directory / "trainer_state.safetensors"
    digests = write_model(directory, model, tokenizer) | {path.name: write_tensors(path, tensors)}
    if card:  # without a digest: users may edit it
        (directory / "README.md").write_text(card, encoding="utf-8", errors="replace")  # a file's name may be no text
    digests = write_state(directory, state, digests)
    # A write may fail silently: verify this checkpoint before it replaces older ones.
    for name, digest in digests.items():
        _check_digest(directory / name, digest)
    _read_state(directory)


def write_model(directory: Path, model: SavedModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Write the files of a Hugging Face model; returns the SHA-256 of the weights by their file's name."""
    named = ((name, silenced(name, parameter.detach(), model.config)) for name, parameter in model.named_parameters())
    weights = {name: weight.cpu().contiguous() for name, weight in named}
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    digests = {"model.safetensors": write_tensors(directory / "model.safetensors", weights)}
    start_id = tokenizer.start_ids[0] if tokenizer.start_ids else tokenizer.end_id
    config = to_hugging_face(model.config, model.vocab_size, tokenizer.end_id, start_id) | {"torch_dtype": dtype}
    _write_json(directory / "config.json", config | {CORE: source.core_hash(), **_variant_hash(model.config)})
    keep_copy(model.config.attention_class, directory)
    ids = {"bos_token_id": start_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.end_id}
    _write_json(directory / "generation_config.json", ids)
    tokenizer.save(directory)
    return digests


def write_state(directory: Path, state: dict[str, Any], digests: dict[str, str]) -> dict[str, str]:
    """Write trainer_state.json with the digests of all other files, and flush everything; returns the digests."""
    written = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*"))}
    hashed = {name: path for name, path in written.items() if path.is_file() and name not in (*digests, "README.md")}
    digests = digests | {name: sha256(path) for name, path in hashed.items()}
    content = {**state, "sha256": digests}
    _write_json(directory / "trainer_state.json", {**content, "own_sha256": own_sha256(content)})
    for path in (*directory.rglob("*"), directory):
        flush(path)
    return digests


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_state(directory: Path) -> dict[str, Any]:
    """The verified content of `trainer_state.json`; MinitfError if it is damaged."""
    path = directory / "trainer_state.json"
    state = read_json(path)
    if state.pop("own_sha256", None) != own_sha256(state):
        raise MinitfError(f"{path} is damaged: its content is not what was saved")
    digests = state.get("sha256")
    if not isinstance(digests, dict) or not {"model.safetensors", "config.json", "tokenizer.json"} <= digests.keys():
        raise MinitfError(f"{path} is damaged: it does not list the files of the checkpoint")
    return state


def own_sha256(content: dict[str, Any]) -> str:
    """The SHA-256 of the content of `trainer_state.json` without `own_sha256`."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _point(link: Path, target: str) -> None:
    """Make `link` lead to the checkpoint `target` next to it; a copy where the system has no links."""
    temporary = link.with_name(f".{link.name}.new")
    if temporary.is_dir() and not temporary.is_symlink():  # left by a run that was killed while copying
        shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
    except OSError:  # Windows without the privilege, some file systems
        shutil.copytree(link.with_name(target), temporary)
    copied = link.with_name(f".{link.name}.replaced.partial")
    if link.is_dir() and not link.is_symlink():  # a copy of the run that followed its links
        os.replace(link, copied)
    os.replace(temporary, link)
    shutil.rmtree(copied, ignore_errors=True)


def _prune(checkpoints: Path, keep: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`, except those `latest` and `best` link to."""
    linked = {os.path.realpath(checkpoints / link) for link in LINKS}
    steps = sorted((p for p in checkpoints.iterdir() if STEP_NAME.fullmatch(p.name)), key=step_of)
    for directory in [] if keep is None else steps[:-keep]:
        if os.path.realpath(directory) not in linked and not directory.is_symlink():
            discard(directory)


def discard(directory: Path) -> None:
    """Remove a checkpoint. Renamed first: a run killed during the removal leaves no incomplete one."""
    removed = directory.with_name(f".{directory.name}.removed.partial")
    os.replace(directory, removed)
    shutil.rmtree(removed, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# read


def load_checkpoint(
    run: str | Path, device: str = "auto", prefer: str = "best", log: Callable[[str], None] | None = None
) -> Checkpoint:
    """Load the model and tokenizer that RUN names; DeviceError if `device` does not exist.

    A damaged checkpoint of a run is reported to `log` (default: a line on stderr) and the previous one is tried. If
    none is left, or RUN names the damaged checkpoint itself, a MinitfError names the damaged file.
    """
    candidates = find_checkpoints(run, prefer)
    is_of_run = candidates[0] != Path(run).resolve() and not is_hub_name(str(run))
    for directory, following in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            return _load(directory, device, is_of_run, log or _to_stderr)
        except (DeviceError, UntrustedCode):
            raise
        except (MinitfError, OSError) as error:
            if following is None:
                raise
            (log or _to_stderr)(f"{error}; passed over for {following.name}")
    raise AssertionError("find_checkpoints returns at least one candidate")


def _to_stderr(line: str) -> None:
    print(f"minitf: {line}", file=sys.stderr, flush=True)


def _load(directory: Path, device: str, is_of_run: bool, log: Callable[[str], None]) -> Checkpoint:
    """One checkpoint; one of a run must have digests, a foreign model need not."""
    state = _read_state(directory) if is_of_run or (directory / "trainer_state.json").exists() else {}
    for name, digest in state.get("sha256", {}).items():
        if directory.resolve() not in (directory / name).resolve().parents:
            raise MinitfError(
                f"{directory / 'trainer_state.json'} is refused: {name[:50]!r} leads out of the checkpoint"
            )
        _check_digest(directory / name, digest)
    try:
        content = read_json(directory / "config.json")
        config, vocab_size = from_hugging_face(content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RequestError) as error:
        raise MinitfError(f"{directory / 'config.json'}: cannot use this model: {one_line(error, 300)}") from None
    config = replace(config, attention_class=copy_in(config.attention_class, directory))
    attention_class(config.variant, config.attention_class)  # refuses code that is not trusted
    weights = load_weights(directory, config.tie_embeddings)
    _check_shapes(directory, config, vocab_size, weights)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > vocab_size:
        raise MinitfError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size:,} tokens and its model only {vocab_size:,}"
        )
    model = Transformer(config, vocab_size)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise MinitfError(
            f"{directory / 'model.safetensors'} does not fit its config.json: {one_line(error, 300)}"
        ) from None
    model = model.to(choose_device(device)).eval()
    if difference := source.other_core(content.get(CORE)):
        log(f"{directory}: {difference}")
    elif any(content.get(key, now) != now for key, now in _variant_hash(config).items()):
        log(f"{directory}: minitf/variants/{config.variant}.py was another file then: it computes something else now")
    return Checkpoint(model, tokenizer, directory, state.get("step"), state)


def _variant_hash(config: ModelConfig) -> dict[str, str]:
    return {} if config.variant == STANDARD else {VARIANT: source.file_hash(f"variants/{config.variant}")}


def _check_shapes(directory: Path, config: ModelConfig, vocab_size: int, weights: Mapping[str, Tensor]) -> None:
    """MinitfError unless `weights` fit the config, checked before anything of the model's claimed size is allocated.

    Layers are counted by name and widths compared first, so that a claimed billion layers are not even built on the
    meta device.
    """
    wrong = f"{directory / 'model.safetensors'} does not fit its config.json:"
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.") and name.count(".") > 2}
    if len(layers) != config.num_layers:
        raise MinitfError(f"{wrong} it has {len(layers)} layers instead of {config.num_layers}")
    if config.context_length * config.head_dim > MAX_ROTARY_ENTRIES:
        raise MinitfError(f"{directory / 'config.json'}: a context of {config.context_length:,} positions is too long")
    largest = max((value.numel() for value in weights.values()), default=0)
    widths = (vocab_size * config.hidden_size, config.hidden_size * config.intermediate_size)
    attention = config.hidden_size * config.head_dim * config.num_heads
    if not all(0 < size <= largest for size in (*widths, attention)):
        raise MinitfError(f"{wrong} its largest matrix has {largest:,} entries, fewer than the model's")
    if not all(value.is_floating_point() for value in weights.values()):
        raise MinitfError(f"{wrong} its entries are not real numbers")
    try:
        with torch.device("meta"):
            expected = {name: value.shape for name, value in Transformer(config, vocab_size).named_parameters()}
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:
        raise MinitfError(f"{directory / 'config.json'}: cannot use this model: {one_line(error, 300)}") from None
    for name, shape in expected.items():
        if name not in weights or weights[name].shape != shape:
            found = tuple(weights[name].shape) if name in weights else "missing"
            raise MinitfError(f"{wrong} {name} is {found} instead of {tuple(shape)}")


def load_optimizer_state(directory: Path) -> dict[str, Tensor]:
    """The `optimizer_state` given to `save_checkpoint`; MinitfError without `random_state` and `pending`."""
    tensors = read_tensors(directory / "trainer_state.safetensors")
    for name in ("random_state", "pending"):
        if name not in tensors:
            raise MinitfError(f"{directory / 'trainer_state.safetensors'} has no {name}: it cannot be resumed")
    return tensors


def _check_digest(path: Path, digest: str) -> None:
    if not path.is_file():
        raise MinitfError(f"{path} is missing: this checkpoint is damaged")
    if sha256(path) != digest:
        raise MinitfError(f"{path} is damaged: its content is not what was saved; another checkpoint of the run may be")
