"""Shell completion of all commands: settings, presets, flags, runs. `eval "$(python -m minitf.completion bash)"`

Like the help page it reads conf/ and sources and imports nothing heavy: a completion takes a tenth of a second.
"""

import ast
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from minitf.config.presets import COMMANDS, GROUPS, PACKAGE, SECTIONS, Setting, options, settings
from minitf.errors import RequestError

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
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then  # readline inserts only the part after the last "="
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
    """The code a shell evaluates to complete minitf's commands, and `python` where it runs one of them."""
    if shell not in SHELLS:
        raise RequestError(f"no completion for {shell}: there is one for {', '.join(SHELLS)}")
    names = " ".join(f"minitf-{name}" for name in COMMANDS)
    return SHELLS[shell].replace("PYTHON", shlex.quote(sys.executable)).replace("NAMES", names)


def candidates(line: str) -> list[str]:
    """What the last word of `line`, a command up to the cursor, may become; [] leaves it to the shell."""
    match = COMMAND.match(line.lstrip())
    if not match or match[1] not in COMMANDS:
        return []
    command = match[1]
    *before, word = re.split(r"\s+", match[2])
    flags = _flags(command)
    found: list[str] = []
    if before and (choices := flags.get(before[-1])) is not None:  # the value of a flag
        found = _runs() if before[-1] == "--run" else choices
    elif word.startswith("-"):
        found = list(flags)
    elif command == "train":
        found = _overrides(word, before)
    return [choice for choice in found if choice.startswith(word)]


def _overrides(word: str, before: Sequence[str]) -> list[str]:
    """Settings and presets; `before` may say where presets are (-cd)."""
    key, equals, _ = word.partition("=")
    known = {setting.key: setting for section in SECTIONS for setting in settings(section)}
    if not equals:
        return [f"{name}=" for name in (*GROUPS, *known)]
    if key in GROUPS:
        values = list(options(key, before))
    elif key in ("resume", "fork", "init_from"):
        values = _runs()
    else:
        values = _values(known[key]) if key in known else []
    return [f"{key}={value}" for value in values]


def _values(setting: Setting) -> list[str]:
    """The values a setting's comment lists: "auto | explicit (...) | sdpa (...)"."""
    if setting.type == "bool":
        return ["true", "false"]
    alternatives = re.sub(r"\([^)]*\)", "", setting.comment.partition(";")[0])
    listed = alternatives.rpartition(":")[2]
    words = [part.split()[0] for part in listed.split("|") if part.split()]
    return words if len(words) > 1 else []


DEPTHS = ("*", "*/*", "*/*/*")  # as in checkpoints/locate.py, which imports much more


def _runs() -> list[str]:
    """`latest`, and the run directories under runs/, newest first."""
    found = [path.parents[1] for depth in DEPTHS for path in Path("runs").glob(f"{depth}/checkpoints/latest")]
    return ["latest", *sorted(map(str, found), reverse=True)]


def _flags(command: str) -> dict[str, list[str] | None]:
    """The flags that the source of a command's parser adds, with the choices of each; None: it takes no value."""
    tree = ast.parse((PACKAGE / f"{COMMANDS[command].replace('.', '/')}.py").read_text(encoding="utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name))
    constants = {ast.unparse(node.targets[0]): node.value for node in assigned}
    found: dict[str, list[str] | None] = {"--help": None}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func).rpartition(".")[2] != "add_argument":
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        named = given.get("choices")
        named = constants.get(named.id) if isinstance(named, ast.Name) else named
        listed = named.elts if isinstance(named, ast.Tuple | ast.List) else []
        choices = None if "action" in given else [str(item.value) for item in listed if isinstance(item, ast.Constant)]
        names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
        found |= {name: choices for name in names if name.startswith("-")}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """`bash`, `zsh` or `fish`: print the code it evaluates. `query LINE`: print the candidates."""
    args = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(args[:1]):
        print(f"{(__doc__ or '').splitlines()[0]}\nusage: minitf-completion {'|'.join(SHELLS)}")
        return 0
    if args[:1] == ["query"] and len(args) == 2:
        print("\n".join(candidates(args[1])))
        return 0
    if len(args) != 1:
        raise RequestError('name the shell: eval "$(python -m minitf.completion bash)" (or zsh, or fish)')
    print(script(args[0]), end="")
    return 0
