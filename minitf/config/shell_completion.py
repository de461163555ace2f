"""Shell completion of all commands: settings, presets, flags, runs. `eval "$(python -m minitf.completion bash)"`

Like the help page it reads conf/ and the sources and imports nothing heavy: an answer takes a tenth of a second.
"""

import ast
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from minitf.config.help import GROUPS, PACKAGE, SECTIONS, options, settings
from minitf.errors import RequestError, run_command

# The module each command's parser is in.
PARSERS = {
    "generate": "cli/generate.py", "evaluate": "cli/evaluate.py", "attention": "interpretability/attention_page.py",
    "export": "checkpoints/export.py", "benchmark": "benchmark/__main__.py",
}  # fmt: skip
COMMAND = re.compile(
    r"(?:\S*python[\d.]* +(?:-m +minitf\.|(?:\S*/)?scripts/)|(?:\S*/)?minitf-)(\w+)(?:\.py)? +(.*)", re.DOTALL
)

BASH = """\
_minitf() {
    local line=${COMP_LINE:0:$COMP_POINT} word cut
    if [[ ! $line =~ (minitf[.-]|scripts/) ]]; then
        _minitf_python_before "$@" 2>/dev/null
        return
    fi
    local IFS=$'\\n'
    COMPREPLY=($(PYTHON -m minitf.completion query "$line" 2>/dev/null))
    word=${line##*[[:space:]]}
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then  # readline puts back the part behind the last "=" only
        cut=${word%"${word##*=}"}
        COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    fi
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
_minitf_python_before() { COMPREPLY=(); }
if [[ $(complete -p python 2>/dev/null) =~ -F\\ ([^ ]+) && ${BASH_REMATCH[1]} != _minitf ]]; then
    eval "_minitf_python_before() { ${BASH_REMATCH[1]} \\"\\$@\\"; }"
fi
complete -o default -o bashdefault -F _minitf python python3 NAMES
"""
ZSH = """\
_minitf() {
    local line="${(j: :)words[1,CURRENT]}"
    if [[ $line != *minitf[.-]* && $line != *scripts/* ]]; then _default; return; fi
    local -a found; found=("${(@f)$(PYTHON -m minitf.completion query "$line" 2>/dev/null)}")
    if [[ -z $found ]]; then _default; return; fi
    local -a open done; open=(${(M)found:#*=}) done=(${found:#*=})
    [[ -n $open ]] && compadd -Q -S '' -- $open
    [[ -n $done ]] && compadd -Q -- $done
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u; }
compdef _minitf python python3 NAMES
"""
FISH = """\
function __minitf
    set -l found (PYTHON -m minitf.completion query (commandline -cp | string collect) 2>/dev/null)
    if test -n "$found[1]"
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
for name in python python3 NAMES
    complete -c $name -f -n "commandline -cp | string match -qr 'minitf[.-]|scripts/'" -a "(__minitf)"
end
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def script(shell: str) -> str:
    """What the shell is to read: completion of minitf's own commands and of `python` where it starts them."""
    if shell not in SHELLS:
        raise RequestError(f"no completion for {shell}: there is one for {', '.join(SHELLS)}")
    names = " ".join(f"minitf-{name}" for name in ("train", *PARSERS))
    return SHELLS[shell].replace("PYTHON", shlex.quote(sys.executable)).replace("NAMES", names)


def candidates(line: str) -> list[str]:
    """Whole words the last word of `line`, a command up to the cursor, may become; [] where the shell knows best."""
    match = COMMAND.match(line.lstrip())
    if not match:
        return []
    command, rest = match[1], match[2]
    *before, word = re.split(r"\s+", rest)
    if command == "train":
        found = _of_train(word)
    elif command not in PARSERS:
        return []
    elif before and before[-1] in (flags := _flags(command)):
        found = _runs() if before[-1] == "--run" else flags[before[-1]]
    else:
        found = list(_flags(command)) if word.startswith("-") else []
    return [choice for choice in found if choice.startswith(word)]


def _of_train(word: str) -> list[str]:
    key, equals, _ = word.partition("=")
    if not equals:
        names = [setting.key for section in SECTIONS for setting in settings(section)]
        return [
            *(f"{name}=" for name in (*GROUPS, *names)),
            *(["-m", "--help", "--cfg"] if word.startswith("-") else []),
        ]
    if key in GROUPS:
        return [f"{key}={option}" for option in options(key)]
    if key in ("resume", "init_from"):
        return [f"{key}={run}" for run in _runs()]
    section = key.rpartition(".")[0]
    known = settings(section) if section in SECTIONS else iter(())
    return [
        f"{key}={value}" for setting in known if setting.key == key for value in _values(setting.type, setting.comment)
    ]


def _values(kind: str, comment: str) -> list[str]:
    """The words a setting can be, of which its comment is the list: "auto | explicit (...) | sdpa (...)"."""
    if kind == "bool":
        return ["true", "false"]
    alternatives = re.sub(r"\([^)]*\)", "", comment.partition(";")[0])
    listed = alternatives.rpartition(":")[2]
    words = [part.split()[0] for part in listed.split("|") if part.split()]
    return words if len(words) > 1 else []


def _runs() -> list[str]:
    """`latest`, and the run directories under runs/, newest first."""
    runs = (
        path.parent.parent for depth in ("*/*", "*/*/*") for path in Path("runs").glob(f"{depth}/checkpoints/latest")
    )
    return ["latest", *sorted(map(str, runs), reverse=True)]


def _flags(command: str) -> dict[str, list[str]]:
    """The flags of a command's parser, as its source adds them, with the choices of each."""
    tree = ast.parse((PACKAGE / PARSERS[command]).read_text(encoding="utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name))
    constants = {ast.unparse(node.targets[0]): node.value for node in assigned}
    found: dict[str, list[str]] = {"--help": []}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            named = next((k.value for k in node.keywords if k.arg == "choices"), None)
            named = constants.get(named.id) if isinstance(named, ast.Name) else named
            listed = named.elts if isinstance(named, ast.Tuple | ast.List) else []
            choices = [str(item.value) for item in listed if isinstance(item, ast.Constant)]
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
            found |= {name: choices for name in names if name.startswith("--")}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """`bash`, `zsh` or `fish`: print what it is to read. `query LINE`: print the candidates."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["query"] and len(args) == 2:
        print("\n".join(candidates(args[1])))
        return 0
    if len(args) != 1:
        raise RequestError('give the shell: eval "$(python -m minitf.completion bash)" (or zsh, or fish)')
    print(script(args[0]), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
