"""The registry of the configuration: groups and presets of conf/, sections and settings of the dataclasses.

Everything is read from files, and nothing is imported for it: `--help` and shell completion answer in a tenth of a
second. The comment next to a field is its documentation, the first comment of a preset is its description.
"""

import ast
import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]
# A wheel has conf/ inside the package, a checkout next to it.
CONF = next((path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir()), PACKAGE / "conf")
# Console command -> the module of minitf that holds its `main` and its parser.
COMMANDS = {
    "train": "cli.train",
    "generate": "cli.generate",
    "evaluate": "cli.evaluate",
    "attention": "interpretability.page",
    "export": "checkpoints.gguf",
    "benchmark": "benchmark.__main__",
    "completion": "config.shell_completion",
}
GROUPS = ("experiment", "data", "tokenizer", "model", "optim", "trainer")
# Section of the config -> the module and the dataclass that own it.
SECTIONS = {
    "": ("config/schema", "Config"),
    "data": ("data/config", "DataConfig"),
    "tokenizer": ("tokenizer", "TokenizerConfig"),
    "model": ("model", "ModelConfig"),
    "optim": ("optim", "OptimConfig"),
    "trainer": ("training/trainer_config", "TrainerConfig"),
    "attention": ("interpretability/attention_maps", "AttentionConfig"),
}
MODEL_SIZE = ("num_layers", "hidden_size", "num_heads", "context_length")
DERIVED_SIZE = ("num_kv_heads", "head_dim", "intermediate_size")  # follow from MODEL_SIZE unless they are set
# Keys that may be `auto`: the run decides. In the dataclasses `auto` is 0, and None for max_minutes.
AUTO = {
    *(f"model.{name}" for name in (*MODEL_SIZE, *DERIVED_SIZE)),
    "tokenizer.vocab_size",
    *(f"trainer.{name}" for name in ("max_minutes", "micro_batch_size", "threads")),
    *(f"trainer.{name}_every" for name in ("log", "eval", "save", "attention")),
}
# Keys that take a number or a word; OmegaConf's own unions break where configs are merged.
WORDED = {"trainer.keep_checkpoints", "trainer.snapshots"}
DEFAULTS = {
    "None": "null", "True": "true", "False": "false", "''": '""',
    "field(default_factory=list)": "[]", "field(default_factory=dict)": "{}",
}  # fmt: skip


class Setting(NamedTuple):
    key: str
    type: str
    default: str
    comment: str


def settings(section: str) -> Iterator[Setting]:
    """The settings of one section of the config, in the order of its dataclass."""
    module, name = SECTIONS[section]
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    # Parsing the class instead of the module saves a fifth of the time of --help.
    (class_source,) = re.findall(rf"^class {name}\b.*\n(?:(?: .*)?\n)*", source, re.MULTILINE)
    lines = class_source.splitlines()
    (definition,) = ast.parse(class_source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        field = node.target.id
        if section == "" and field in SECTIONS:
            continue
        key = f"{section}.{field}" if section else field
        comment = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :].partition("#")[2].strip()
        yield Setting(key, ast.unparse(node.annotation), "auto" if key in AUTO else _default(node.value), comment)


def _default(value: ast.expr | None) -> str:
    """A field's default as one writes it in YAML."""
    text = ast.unparse(value) if value else ""
    if text.startswith("field(default_factory=lambda: "):
        text = text.removeprefix("field(default_factory=lambda: ").removesuffix(")")
    return DEFAULTS.get(text, text).strip("'")


def folders(flags: Sequence[str] = ()) -> list[Path]:
    """Where Hydra searches for presets, in this order: conf/, or --config-path in place of it, and --config-dir."""
    named = dict(pairwise(part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])))
    main = named.get("--config-path") or named.get("-cp")
    own = named.get("--config-dir") or named.get("-cd")
    return [Path(main) if main else CONF, *([Path(own)] if own else [])]


def options(group: str, flags: Sequence[str] = ()) -> dict[str, str]:
    """The presets of a config group with their descriptions; of two with one name Hydra takes the first."""
    found: dict[str, str] = {}
    for folder in folders(flags):
        for path in sorted((folder / group).glob("*.yaml")):
            lines = path.read_text(encoding="utf-8").splitlines()
            comments = [line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line]
            found.setdefault(path.stem, comments[0] if comments else "")
    return found


def all_keys() -> list[str]:
    """Every key that can be set, sections included."""
    return [s.key for section in SECTIONS for s in settings(section)] + [section for section in SECTIONS if section]


def nearest(word: str, valid: Sequence[str]) -> str:
    """ "; did you mean ...?" for the closest valid word, or a pointer to --help."""
    last = word.rsplit(".", 1)[-1]
    close = [key for key in valid if len(last) > 1 and _initials(key) == last]  # lr
    close = close or difflib.get_close_matches(word, valid, n=1, cutoff=0.4)
    close = close or [key for key in valid if key.rsplit(".", 1)[-1] == last]  # right name, wrong section
    close = close or difflib.get_close_matches(last, valid, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else "; see --help for the list"


def _initials(key: str) -> str:
    return "".join(part[:1] for part in key.rsplit(".", 1)[-1].split("_"))
