"""The schema of conf/: the owners' dataclasses put together, composed by Hydra, with errors that help.

Only this module knows OmegaConf; everybody else gets plain dataclasses.
"""

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitf.config.help import CONF, GROUPS, all_keys, nearest, options
from minitf.data.config import DataConfig
from minitf.errors import MinitfError, RequestError
from minitf.interpretability.attention_maps import AttentionConfig
from minitf.model import ModelConfig
from minitf.optim import OptimConfig
from minitf.system.files import write_whole
from minitf.system.safe_io import check_size
from minitf.tokenizer import TokenizerConfig
from minitf.training.trainer_config import TrainerConfig

# What follows from a model's size unless it is set.
DERIVED = ("num_kv_heads", "head_dim", "intermediate_size")
MAX_CONFIG_BYTES = 1 << 20  # a run's own is 2 kB, with long lists of files more


@dataclass
class Config:
    name: str = ""  # of the run, whose directory is runs/NAME/DATE_TIME; default: the experiment's or the data's
    seed: int = 0  # of all that is random: first weights, order of the text, dropout
    run_dir: str | None = None  # the run's directory, instead of runs/NAME/DATE_TIME
    resume: str | None = None  # go on with this run (or latest) in its own directory, with its own config
    init_from: str | None = None  # start from the weights, shape, tokenizer of a run, checkpoint, hub model OWNER/NAME
    data: DataConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    model: ModelConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    attention: AttentionConfig = MISSING

    # No setting, and not saved: nobody asked for the size that `model` has, and there is a time to choose one for.
    size_is_open = False

    def __post_init__(self) -> None:
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise RequestError(f"seed={self.seed} must fit into 64 bits")


def register_schema() -> None:
    """Make the schema known to Hydra, which checks every key and type of conf/ and the command line against it."""
    ConfigStore.instance().store(name="schema", node=Config)


def compose_config(overrides: Sequence[str]) -> Config:
    """The config of `overrides` (`group=option`, `key=value`) over conf/; RequestError if they do not fit."""
    check_overrides(overrides)
    register_schema()
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            composed = compose("config", list(overrides), return_hydra_config=True)
        return to_config(composed, composed.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise RequestError(_explain(error)) from None


def to_config(composed: DictConfig, choices: Any) -> Config:
    """Plain dataclasses of a composed config; `choices` are Hydra's: the option taken of each group."""
    try:
        sections = {key: composed[key] for key in Config.__dataclass_fields__}
        opened = _open_size(sections["model"]) if choices.get("model") == "auto" else {}
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), sections, {"model": opened}))
    except OmegaConfBaseException as error:
        raise RequestError(_explain(error)) from None
    assert isinstance(config, Config)
    asked = opened != _preset("mini") or any(sections["model"][key] for key in DERIVED)
    # The same steps are to be the same run on every machine.
    config.size_is_open = not asked and config.trainer.minutes is not None
    config.name = config.name or str(choices.get("experiment") or choices["data"])
    if not re.fullmatch(r"[\w.+-]+", config.name) or config.name.startswith("."):
        raise RequestError(f"name={config.name!r} must be a plain directory name: letters, digits, _ . + -")
    return config


def model_sizes(model: ModelConfig) -> dict[str, ModelConfig]:
    """`model` in each of the sizes a run chooses from where none is asked for, by the names of their presets."""
    fixed = asdict(model) | dict.fromkeys(DERIVED, 0)
    return {name: ModelConfig(**fixed | _preset(name)) for name in ("nano", "mini", "small")}


def _open_size(model: DictConfig) -> dict[str, int]:
    """What `model=auto` leaves open (0), as in `mini`: the rest of a size of which a part is asked for."""
    return {key: value for key, value in _preset("mini").items() if model[key] == 0}


def _preset(name: str) -> dict[str, int]:
    sizes: dict[str, int] = yaml.safe_load((CONF / f"model/{name}.yaml").read_text(encoding="utf-8"))
    return sizes


def save_config(config: Config, path: Path) -> None:
    """Write the config as composed, to be read again by `load_config`."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of an earlier run, with `overrides` (`key=value` only) on top."""
    parsed = check_overrides(overrides)
    for override in parsed:
        if override.key_or_group in GROUPS:
            raise RequestError(f"{override.input_line}: a resumed run keeps its presets; single keys may change")
    try:
        saved = OmegaConf.create(_read_plain_yaml(path))
        values = OmegaConf.from_dotlist(list(overrides))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved, values))
    except (OmegaConfBaseException, OSError) as error:
        raise RequestError(f"{path}: {_explain(error)}") from None
    except MinitfError:
        raise
    except (Exception, RecursionError) as error:  # the YAML parser's own classes
        raise MinitfError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    assert isinstance(config, Config)
    return config


def _read_plain_yaml(path: Path) -> dict[str, Any]:
    """A run's config.yaml, perhaps a stranger's: plain values only.

    No tags (objects), no anchors and aliases (few lines that unfold to gigabytes), and no interpolations: `${oc.env:X}`
    would read this user's environment.
    """
    check_size(path, MAX_CONFIG_BYTES)
    text = path.read_text(encoding="utf-8")
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise MinitfError(f"{path} is refused: line {event.start_mark.line + 1} is no plain value")
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise MinitfError(f"{path} is damaged: it holds no settings")
    pending: list[Any] = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and "${" in value:
            raise MinitfError(f"{path} is refused: {value[:60]!r} asks for what is not in it")
        pending += (
            [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        )
    return content


def check_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse command line overrides; RequestError names an unknown key, group or option and the nearest valid one."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        if bare := next((word for word in overrides if "=" not in word), ""):
            hint = f"; for your own text: {own_text(bare)}" if Path(bare).exists() else ""
            message = f"{bare!r} is no setting: write group=option or key=value, without spaces around ={hint}"
            raise RequestError(message) from None
        reason = " ".join(str(error).split())
        reason = reason.split(" See http")[0]
        raise RequestError(f"cannot read an argument: {reason}; arguments are group=option or key=value") from None
    keys = all_keys()
    for override in parsed:
        key = override.key_or_group.split("@")[0]
        if key.startswith("hydra"):
            continue
        if key in GROUPS:
            found = list(options(key))
            choices = override.value() if override.is_sweep_override() else [override.value()]
            for choice in [str(c) for c in choices] if isinstance(choices, list) else []:
                if choice not in found:
                    hint = f"; there are {', '.join(found)}"
                    if difflib.get_close_matches(choice, found):
                        hint = nearest(choice, found)
                    elif key == "data" and re.search(r"[./]", choice):
                        hint = f"; for your own text: {own_text(choice)}"
                    raise RequestError(f"{key}={choice}: no such option{hint}")
        elif key not in keys:
            raise RequestError(f"{key}: no such key{nearest(key, [*keys, *GROUPS])}")
    return parsed


def own_text(path: str) -> str:
    """The settings that train on the file or folder `path`, for a shell."""
    return f"data=text {shlex.quote(f'data.files=[{path}]')}"


def check_sweep(overrides: Sequence[str]) -> None:
    """RequestError if a run of the sweep `overrides` would be refused, as far as that shows in one value at a time."""
    parsed = check_overrides(overrides)
    fixed = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    for override in parsed:
        if override.is_choice_sweep():
            for value in override.sweep_string_iterator():
                compose_config([*fixed, f"{override.get_key_element()}={value}"])


def flat(config: Config) -> dict[str, Any]:
    """All settings as one level of `section.key`; what is no number, truth or text as the text of it."""
    result: dict[str, Any] = {}
    for key, value in asdict(config).items():
        result |= (
            {f"{key}.{name}": setting for name, setting in value.items()} if isinstance(value, dict) else {key: value}
        )
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in result.items()}


def changed_settings(config: Config) -> dict[str, Any]:
    """What may differ between runs worth comparing: columns of TensorBoard's HParams, which shows the first few.

    The text, and the settings of model, optimiser, training that are not the usual ones.
    """
    owners: dict[str, Any] = {
        "data": DataConfig(),
        "tokenizer": TokenizerConfig(),
        "model": ModelConfig(),
        "optim": OptimConfig(),
    }
    usual = flat(Config(**owners, trainer=TrainerConfig(), attention=AttentionConfig()))
    compared = ("seed", "tokenizer.", "model.", "optim.", "trainer.")
    left_out = ("_every", "_tokens", "_answers", "_checkpoints", "tokenizer.file")
    changed = {key: value for key, value in flat(config).items() if value != usual[key] and key.startswith(compared)}
    return {"data": config.data.source, **{key: v for key, v in changed.items() if not key.endswith(left_out)}}


def _explain(error: BaseException) -> str:
    """One line of Hydra's or OmegaConf's error: the key, and what is wrong with its value."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    message = lines[0] if lines else type(cause).__name__
    if "???" in message or "MISSING" in message.upper() or "mandatory" in message.lower():
        return f"{key or message} must be given"
    if "is not a ListConfig" in message:
        return f"{key} is a list: write '{key}=[ONE,TWO]'"
    return f"{key}: {message}" if key else message
