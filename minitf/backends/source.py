"""What attention.py, model.py, loss.py, optim.py and rope.py say, as hashes: an edit of theirs never goes unnoticed.

Rounding hides small edits (`softmax(0.99 * scores)` in bfloat16), so a backend that implements a part of these files
anew is recorded as an implementation of a certain text of it. The hashes are of the tokens without comments,
docstrings and layout, one for each function, method and constant, the same on every version of Python.

After an edit that the backends follow: `python -m minitf.backends.source` records the files as they are.
"""

import ast
import functools
import hashlib
import io
import json
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("source.json")
MODULES = ("rope", "attention", "loss", "model", "optim")
# The definitions that turn ids into logits: a checkpoint is of the architecture they describe.
FORWARD = ("model.Block", "model.Transformer.hidden", "model.Transformer.logits")
# All of the core, with what trains it.
CORE = (*FORWARD, "loss.LinearCrossEntropy", "optim.Optimizer")
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
STRUCTURE = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


@dataclass(frozen=True)
class Definition:
    """A function, a constant, or a member of a class: the hash of its tokens and the definitions it names."""

    digest: str
    names: frozenset[str]


def tokens(source: str) -> Iterator[tuple[int, str]]:
    """Tokens with their lines, without comments, docstrings and layout; of indentation only that there is some."""
    lines = source.splitlines(keepends=True)
    found = list(tokenize.generate_tokens(io.StringIO(source).readline))
    depth, start, previous = 0, (0, 0), "NEWLINE"
    for token, following in zip(found, [*found[1:], found[-1]], strict=True):
        kind = tokenize.tok_name[token.type]
        if kind in ("FSTRING_START", "TSTRING_START"):  # before Python 3.12 a formatted string was one token
            start = token.start if depth == 0 else start
            depth += 1
        elif kind in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if depth == 0:
                yield start[0], _between(lines, start, token.end)
        elif depth == 0 and token.type not in LAYOUT:
            is_docstring = kind == "STRING" and previous in ("NEWLINE", "INDENT", "DEDENT")
            if not (is_docstring and following.type == tokenize.NEWLINE):
                yield token.start[0], kind if token.type in STRUCTURE else token.string
            previous = kind


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    part = lines[start[0] - 1 : end[0]]
    part[-1] = part[-1][: end[1]]
    part[0] = part[0][start[1] :]
    return "".join(part)


@functools.cache
def definitions(package: Path = PACKAGE) -> dict[str, Definition]:
    """All definitions of the core by name, for example `attention.weigh`, `attention.Attention.forward`."""
    sources = {module: (package / f"{module}.py").read_text(encoding="utf-8") for module in MODULES}
    trees = {module: ast.parse(source) for module, source in sources.items()}
    known = {f"{module}.{name}" for module, tree in trees.items() for name, _ in _statements(tree)}
    found = {}
    for module, tree in trees.items():
        scope = {name: f"{module}.{name}" for name, _ in _statements(tree)} | _imported(tree, known)
        by_line: dict[int, list[str]] = defaultdict(list)
        for line, token in tokens(sources[module]):
            by_line[line].append(token)
        for name, statement in _statements(tree):
            for member, lines, nodes in _members(statement):
                content = [token for line in lines for token in by_line[line]]
                while content and content[0] in ("NEWLINE", "INDENT", "DEDENT"):  # of the definition before it
                    content.pop(0)
                words = {node.id for part in nodes for node in ast.walk(part) if isinstance(node, ast.Name)}
                digest = hashlib.sha256("\x00".join(content).encode()).hexdigest()[:12]
                names = frozenset(scope[word] for word in words & scope.keys())
                found[f"{module}.{name}{member and '.'}{member}"] = Definition(digest, names)
    return found


def _statements(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield statement.name, statement
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            yield statement.targets[0].id, statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement


def _members(statement: ast.stmt) -> Iterator[tuple[str, list[int], list[ast.AST]]]:
    """The parts of a statement, their lines and nodes: a class's methods, and `class` for the rest of it."""
    if not isinstance(statement, ast.ClassDef):
        yield "", _lines(statement), [statement]
        return
    others = set(_lines(statement))
    nodes: list[ast.AST] = [*statement.bases, *statement.decorator_list]
    for member in statement.body:
        if isinstance(member, ast.FunctionDef):
            others -= set(_lines(member))
            yield member.name, _lines(member), [member]
        else:
            nodes.append(member)
    yield "class", sorted(others), nodes


def _lines(statement: ast.stmt) -> list[int]:
    first = min([statement.lineno, *(one.lineno for one in getattr(statement, "decorator_list", []))])
    return list(range(first, (statement.end_lineno or first) + 1))


def _imported(tree: ast.Module, known: set[str]) -> dict[str, str]:
    return {
        alias.asname or alias.name: f"{statement.module[7:]}.{alias.name}"
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("minitf.")
        for alias in statement.names
        if f"{statement.module[7:]}.{alias.name}" in known
    }


def reached(roots: Iterable[str], package: Path = PACKAGE) -> list[str]:
    """The definitions `roots` (a class stands for all its members) and all that they name, directly or not."""
    known, found, waiting = definitions(package), set[str](), list(roots)
    while waiting:
        root = waiting.pop()
        for name in known:
            if name not in found and (name == root or name.startswith(f"{root}.")):
                found.add(name)
                waiting.extend(known[name].names)
    return sorted(found)


def recorded() -> dict[str, str]:
    """The hashes of the definitions that the backends implement."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["definitions"]  # type: ignore[no-any-return]


def edited(roots: Iterable[str], package: Path = PACKAGE) -> list[str]:
    """The definitions reached from `roots` that are not as recorded."""
    known, before = definitions(package), recorded()
    return [name for name in reached(roots, package) if known[name].digest != before.get(name)]


def file_hash(module: str, package: Path = PACKAGE) -> str:
    """One hash of a file of the package, for example `variants/sink`."""
    content = "\x00".join(token for _, token in tokens((package / f"{module}.py").read_text(encoding="utf-8")))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def core_hash(package: Path = PACKAGE) -> str:
    """One hash of the forward pass: what a checkpoint is a checkpoint of."""
    known = definitions(package)
    content = "".join(f"{name}={known[name].digest};" for name in reached(FORWARD, package))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def other_core(before: object) -> str | None:
    """How a checkpoint of the core `before` differs from one of this core, in a sentence; None if it does not."""
    now, same = core_hash(), json.loads(RECORD.read_text(encoding="utf-8"))["forward"]
    if before == now or (before in same and now in same):
        return None
    if not isinstance(before, str) or not re.fullmatch("[0-9a-f]{16}", before):  # a foreign model, or damaged
        return None
    names = ", ".join(edited(FORWARD)[:3])
    if before in same:
        return (
            f"it was trained by the standard forward pass, and {names} is edited here: it computes something else now"
        )
    here = f"{names} is edited here, in another way" if names else "here it is the standard one"
    return f"it was trained with an edited forward pass ({before}), and {here}: it computes something else now"


def main() -> int:
    """Record the core as it is: to be run when the backends implement it."""
    same = json.loads(RECORD.read_text(encoding="utf-8"))["forward"] if RECORD.exists() else []
    content = {
        "definitions": {name: definition.digest for name, definition in sorted(definitions().items())},
        "forward": sorted({*same, core_hash()}),
    }
    RECORD.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{RECORD.name}: {len(content['definitions'])} definitions, forward pass {core_hash()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
