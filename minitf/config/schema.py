"""The schema of conf/: the dataclasses of all sections in one `Config`, and the run's config.yaml.

Only config/ knows OmegaConf; everything else gets plain dataclasses. They are built once and never mutated: what the
run decides (the size of a model where no size is set) makes a new `Config` by a `resolve_...` function.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitf.config.overrides import check_overrides, escape_interpolation, explain
from minitf.config.presets import AUTO, CONF, DERIVED_SIZE, GROUPS, MODEL_SIZE, WORDED
from minitf.data.config import DataConfig
from minitf.edits import Relation
from minitf.errors import MinitfError, RequestError
from minitf.interpretability.attention_maps import AttentionConfig
from minitf.model import ModelConfig
from minitf.optim import OptimConfig
from minitf.system.files import write_whole
from minitf.system.safe_io import check_size
from minitf.tokenizer import TokenizerConfig
from minitf.training.trainer_config import TrainerConfig

MAX_CONFIG_BYTES = 1 << 20  # a run's own is 2 kB, more with long lists of files
SIZES = ("nano", "mini", "small")  # presets of conf/model that `model=auto` chooses from, smallest first


@dataclass(kw_only=True)
class Config:
    name: str = ""  # of the run, whose directory is runs/NAME/DATE_TIME; default: the experiment's or the data's
    seed: int = 0  # of everything random: initial weights, order of the text, dropout
    run_dir: str | None = None  # the run's directory, instead of runs/NAME/DATE_TIME
    resume: str | None = None  # resume this run (or latest) in its own directory, with its own config
    fork: str | None = None  # RUN@STEP: a new run that continues this kept checkpoint, with its config and changes
    init_from: str | None = None  # start from the weights, shape, tokenizer of a run, checkpoint, hub model OWNER/NAME
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    optim: OptimConfig
    trainer: TrainerConfig
    attention: AttentionConfig

    def __post_init__(self) -> None:
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise RequestError(f"seed={self.seed} must fit into 64 bits")
        for relation in (*(self.attention.watch or ()), *self.data.watch):
            Relation.parse(relation)  # refused here, before anything is prepared or written

    @property
    def size_is_auto(self) -> bool:
        """Whether the run chooses the model's size, for its time and machine: `resolve_size` then sets it."""
        return isinstance(self.model, AutoModel) and not self.init_from


@dataclass
class AutoModel(ModelConfig):
    """A model whose size is not known yet: fields of it are 0 (`auto`) until a `resolve_...` function sets them."""

    asked: tuple[str, ...] = ()  # keys of the user's own, which no preset of a size changes

    def __post_init__(self) -> None:
        model_sizes(self)  # checks the other fields


OWNERS: dict[str, type] = {
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "trainer": TrainerConfig,
    "attention": AttentionConfig,
}


def _with_auto(section: str) -> type:
    """A section's dataclass for OmegaConf, in which the keys of AUTO also take the word `auto`, others a word."""
    named = {f"{section}.{f.name}": f for f in fields(OWNERS[section])}
    defaults = {key: "auto" if key in AUTO else f.default for key, f in named.items() if key in (*AUTO, *WORDED)}
    either = [(named[key].name, Any, field(default=default)) for key, default in defaults.items()]
    return _importable(make_dataclass(f"{section.title()}Schema", either, bases=(OWNERS[section],)))


def _importable(cls: type) -> type:
    """`cls` as an attribute of this module: a launcher's other processes receive it by name, not by value."""
    cls.__module__ = __name__
    globals()[cls.__name__] = cls
    return cls


# The schema against which Hydra checks conf/ and the command line.
Schema = _importable(
    make_dataclass(
        "Schema",
        [
            (f.name, _with_auto(f.name), field(default=MISSING))
            if f.name in OWNERS
            else (f.name, f.type, field(default=f.default))
            for f in fields(Config)
        ],
    )
)


def checked_values(*layers: Any) -> dict[str, Any]:
    """Plain values of all keys, from OmegaConf `layers` over the schema, the last on top; `auto` is the number of AUTO.

    Raises OmegaConf's errors for unknown keys, wrong types and missing values; RequestError for a word in place of a
    number.
    """
    merged = OmegaConf.merge(OmegaConf.structured(Schema), *layers)
    values: dict[str, Any] = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    for key in AUTO:
        section, name = key.split(".")
        values[section][name] = _number(key, values[section][name])
    return values


def _number(key: str, value: Any) -> float | None:
    kind: type[int] | type[float] = float if key == "trainer.max_minutes" else int
    if value in ("auto", None):
        return None if kind is float else 0
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise RequestError(f"{key}={value} must be a {'' if kind is float else 'whole '}number, or auto") from None


def config_of(values: dict[str, Any], model: type[ModelConfig] = ModelConfig) -> Config:
    """The config of `checked_values`; RequestError if a value is out of range."""
    owners = OWNERS | {"model": model}
    return Config(**values | {section: owner(**values[section]) for section, owner in owners.items()})


def written_values(config: Config) -> dict[str, Any]:
    """`config` as one writes it: sections of plain values, with `auto` for what the run decides."""
    values = asdict(config)
    values["model"].pop("asked", None)
    for key in AUTO:
        section, name = key.split(".")
        if values[section][name] == 0:
            values[section][name] = "auto"
    return {f.name: values[f.name] for f in fields(Schema)}


def size_preset(name: str) -> dict[str, int]:
    """The size in conf/model/NAME.yaml; what follows from it is left to follow."""
    sizes: dict[str, int] = _preset(name)["model"]
    sizes = {key: value for key, value in sizes.items() if key in (*MODEL_SIZE, *DERIVED_SIZE)}
    return dict.fromkeys((*MODEL_SIZE, *DERIVED_SIZE), 0) | sizes


def _preset(name: str) -> dict[str, Any]:
    """All of conf/model/NAME.yaml, by section: a preset may be for the package of the model or for all."""
    content: dict[str, Any] = yaml.safe_load((CONF / f"model/{name}.yaml").read_text(encoding="utf-8"))
    return content if "model" in content else {"model": content}


def model_sizes(model: ModelConfig) -> dict[str, ModelConfig]:
    """`model` in each of the sizes that `model=auto` chooses from, by the names of their presets."""
    values = {f.name: getattr(model, f.name) for f in fields(ModelConfig)}
    asked = getattr(model, "asked", ())
    return {name: ModelConfig(**values | _unasked(name, "model", asked) | size_preset(name)) for name in SIZES}


def _unasked(name: str, section: str, asked: Sequence[str]) -> dict[str, Any]:
    """What the preset of a size sets in a section, without keys that were `asked` for."""
    found = _preset(name).get(section, {})
    return {key: value for key, value in found.items() if f"{section}.{key}" not in asked}


def resolve_size(config: Config, size: str) -> Config:
    """`config` with the model of `size`, the name of a preset that was chosen for the run, and what goes with it."""
    optim = _unasked(size, "optim", getattr(config.model, "asked", ()))
    return replace(config, model=model_sizes(config.model)[size], optim=replace(config.optim, **optim))


def resolve_shape(config: Config, shape: ModelConfig, tokenizer: TokenizerConfig) -> Config:
    """`config` with the `shape` and `tokenizer` of the model it starts from: `init_from`.

    Dropout and the path of attention are the config's, and its context length if it is set and shorter.
    """
    model = config.model
    context_length = min(model.context_length or shape.context_length, shape.context_length)
    shape = replace(shape, attention=model.attention, dropout=model.dropout, context_length=context_length)
    return replace(config, model=shape, tokenizer=tokenizer)


def save_config(config: Config, path: Path) -> None:
    """Write the run's config.yaml, which `load_config` reads."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(written_values(config))))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of an earlier run, with `overrides` (`key=value` only) on top."""
    changes = OmegaConf.create()
    try:
        for override in check_overrides(overrides):
            if override.key_or_group in GROUPS:
                raise RequestError(f"{override.input_line}: a resumed run keeps its presets; single keys may change")
            if override.is_delete():
                raise RequestError(f"{override.input_line}: a setting of a resumed run may change, not disappear")
            OmegaConf.update(changes, override.key_or_group, override.value())
        return config_of(checked_values(OmegaConf.create(_as_text(_read_plain_yaml(path))), changes))
    except (OmegaConfBaseException, OSError) as error:
        raise RequestError(f"{path}: {explain(error)}") from None
    except MinitfError:
        raise
    except (Exception, RecursionError) as error:  # the YAML parser's own classes
        raise MinitfError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None


def _read_plain_yaml(path: Path) -> dict[str, Any]:
    """A run's config.yaml, perhaps from an untrusted source: plain values only.

    No tags (objects), no anchors and aliases (a few lines that expand to gigabytes).
    """
    check_size(path, MAX_CONFIG_BYTES)
    text = path.read_text(encoding="utf-8")
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise MinitfError(f"{path} is refused: line {event.start_mark.line + 1} is no plain value")
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise MinitfError(f"{path} is damaged: it holds no settings")
    return content


def _as_text(value: Any) -> Any:
    """`value` for OmegaConf with all text as it stands: `${oc.env:X}` of a stranger reads nobody's environment."""
    if isinstance(value, dict):
        return {key: _as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_text(inner) for inner in value]
    return escape_interpolation(value) if isinstance(value, str) else value


def flat(config: Config) -> dict[str, Any]:
    """All settings on one level, as `section.key`: numbers, booleans and strings; everything else as its text."""
    values = leaves(written_values(config))
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}


def leaves(values: dict[str, Any]) -> dict[str, Any]:
    """Sections of values as one level of `section.key`."""
    sections = {f"{section}.{name}": value for section in OWNERS for name, value in values.get(section, {}).items()}
    return {key: value for key, value in values.items() if key not in OWNERS} | sections


def changed_settings(config: Config) -> dict[str, Any]:
    """The columns of TensorBoard's HParams, which shows only the first few: what may differ between comparable runs.

    That is the text, and the settings of model, optimiser and training that differ from their defaults.
    """
    usual = flat(Config(**{section: owner() for section, owner in OWNERS.items()}))
    compared = ("seed", "tokenizer.", "model.", "optim.", "trainer.")
    left_out = ("_every", "_tokens", "_answers", "_checkpoints", "tokenizer.file")
    values = {key: value for key, value in flat(config).items() if value != str(None)}
    changed = {key: value for key, value in values.items() if value != usual[key] and key.startswith(compared)}
    return {"data": config.data.source, **{key: v for key, v in changed.items() if not key.endswith(left_out)}}
