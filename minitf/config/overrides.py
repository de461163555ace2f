"""Overrides on the command line (`group=option`, `key=value`), and one line for whatever is wrong with them."""

import difflib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import GrammarParseError, InterpolationKeyError, MissingMandatoryValue, ValidationError

from minitf.config.presets import GROUPS, SECTIONS, all_keys, folders, nearest, options, settings
from minitf.errors import RequestError, one_line

# Keys of Hydra's own that have an effect. Any other would be ignored in silence, so it is refused.
HYDRA_ALWAYS = (
    "hydra.searchpath", "hydra.callbacks", "hydra/callbacks", "hydra.job.env_set",
    "hydra/job_logging", "hydra.job_logging", "hydra/hydra_logging", "hydra.hydra_logging",
)  # fmt: skip
HYDRA_RUN = ("hydra.run.dir",)
HYDRA_SWEEP = ("hydra.sweep.dir", "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")


def check_overrides(overrides: Sequence[str], flags: Sequence[str] = (), sweep: bool = False) -> list[Override]:
    """Parse `overrides`. RequestError names an unknown key and the nearest valid one.

    Hydra checks the options of groups when it composes. `flags`: -cd and -cp may bring groups of their own. `sweep`
    allows several values of a key.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise RequestError(_explain_syntax(error, overrides)) from None
    keys = all_keys()
    for override in parsed:
        key = override.key_or_group.split("@")[0]
        if re.match(r"hydra\b", key):
            _check_hydra_key(key, sweep)
            if "/" in key:
                _check_group(override, flags)
        elif key in GROUPS or any((folder / key).is_dir() for folder in folders(flags)):
            _check_group(override, flags)
        elif key not in keys:
            raise RequestError(f"{key}: no such key{nearest(key, [*keys, *GROUPS])}")
        if override.is_sweep_override() and not sweep:
            raise RequestError(f"{override.input_line}: several values of a key are a sweep, which needs -m")
    return parsed


def _check_group(override: Override, flags: Sequence[str]) -> None:
    """RequestError unless options are names, as Hydra takes for granted; it says which names do not exist."""
    group, equals, choice = (override.input_line or "").partition("=")
    if override.is_sweep_override() or not equals:  # ~group
        return
    value = override.value()
    several = value if isinstance(value, list) and not override.is_delete() else [value]
    if all(isinstance(name, str) for name in several):
        return
    raise RequestError(_no_option(group, choice, list(options(group, flags))))


def _check_hydra_key(key: str, sweep: bool) -> None:
    allowed = (*(HYDRA_SWEEP if sweep else HYDRA_RUN), *HYDRA_ALWAYS)
    if not any(key == name or key.startswith(f"{name}.") for name in allowed):
        what = "a sweep" if sweep else "a single run"
        raise RequestError(f"{key} has no effect on {what}; of Hydra's keys these have: {', '.join(allowed)}")


def _explain_syntax(error: HydraException, overrides: Sequence[str]) -> str:
    if bare := next((word for word in overrides if "=" not in word), ""):
        hint = f"; for your own text: {own_text(bare)}" if Path(bare).exists() else ""
        return f"{bare!r} is no setting: write group=option or key=value, without spaces around ={hint}"
    key, _, value = next((word for word in overrides if not _is_readable(word)), overrides[0]).partition("=")
    if not re.fullmatch(r"[\w./+~@-]+", key):
        return f"{key}={value}: cannot be read ({one_line(error)}); arguments are group=option or key=value"
    inner = value.removeprefix("[").removesuffix("]")
    entries = [inner] if Path(inner).exists() else [entry.strip() for entry in inner.split(",")]
    fixed = setting(key, entries if value.startswith("[") else value)
    return f"{key}={value}: cannot be read; values with spaces and signs stand in quotes, as in {fixed}"


def _is_readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def explain(error: BaseException) -> str:
    """An error of Hydra or OmegaConf in one line: the key, and what is wrong with its value."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_missing(error.missing_cfg_file, error.options)
    key = getattr(error, "full_key", None) or ""
    if isinstance(error, InterpolationKeyError | GrammarParseError):
        reason = str(error).splitlines()[0]
        return f"{key}: {reason}; ${{...}} is the value of another key, write \\${{ for the characters themselves"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} must be given"
    if isinstance(error, ValidationError) and _is_list(key):
        return f"{key} is a list: write '{key}=[ONE,TWO]'"
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{key}: {message}" if key else message


def _is_list(key: str) -> bool:
    section = key.rpartition(".")[0]
    return section in SECTIONS and any(s.type.startswith("list") for s in settings(section) if s.key == key)


def _explain_missing(path: str, found: Sequence[str] | None) -> str:
    """A preset, or the primary config, that is in none of the folders searched."""
    group, slash, choice = path.partition("/")
    if group == "hydra":
        group, slash, choice = path.rpartition("/")
    if not slash:
        return f"there is no config {path!r} in the folders searched; --info searchpath lists them"
    return _no_option(group, choice, sorted(found or ()))


def _no_option(group: str, choice: str, found: Sequence[str]) -> str:
    hint = f"; there are {', '.join(found)}" if found else ""
    if difflib.get_close_matches(choice, found):
        hint = nearest(choice, found)
    elif group in ("hydra/launcher", "hydra/sweeper"):
        hint += "; others come with packages, joblib and submitit with pip install 'minitf[sweep]'"
    elif group == "data" and re.search(r"[./]", choice):
        hint = f"; for your own text: {own_text(choice)}"
    return f"{group}={choice}: no such option{hint}"


def own_text(path: str) -> str:
    """The settings that train on the file or folder `path`, for a shell."""
    return f"data=text {setting('data.files', [path])}"


def setting(key: str, value: str | Sequence[str]) -> str:
    """`key=value` to be pasted into a shell, quoted for it and for Hydra."""
    text = quoted(value) if isinstance(value, str) else f"[{','.join(map(quoted, value))}]"
    return shlex.quote(f"{key}={text}")


def quoted(text: str) -> str:
    """`text` as Hydra's grammar writes it: in quotes unless it is plain."""
    plain = re.fullmatch(r"([A-Za-z_/]|\.\.?/)[\w./-]*", text, re.ASCII)
    if plain and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    doubled = re.sub(r'(\\+)(?="|\Z)', r"\1\1", escape_interpolation(text))
    return '"' + doubled.replace('"', r"\"") + '"'


def escape_interpolation(text: str) -> str:
    """`text` as OmegaConf writes it: `${` is these two characters, and begins no interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quote_letters(override: str) -> str:
    """An override whose value may hold letters beyond ASCII, which Hydra's grammar takes only in quotes."""
    key, equals, value = override.partition("=")
    parts = re.findall(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^][{},:="']+|.""", value, re.DOTALL)
    return key + equals + "".join(_quoted_part(part) for part in parts)


def _quoted_part(part: str) -> str:
    if part.isascii() or part[0] in "\"'" or "$" in part or "\\" in part:
        return part
    return re.sub(r"\S(?:.*\S)?", lambda match: quoted(match[0]), part, flags=re.DOTALL)
