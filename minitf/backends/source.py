"""What attention.py, model.py, loss.py, optim.py and rope.py say, as hashes: an edit of theirs never goes unnoticed.

Rounding hides small edits (`softmax(0.99 * scores)` in bfloat16), so a backend that implements a part of these files
anew is recorded as an implementation of a certain text of it. The hashes are of the syntax tree, without comments,
docstrings and layout, one for each function, method and constant, the same on every version of Python.

After an edit that the backends follow: `python -m minitf.backends.source` records the files as they are.
"""

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("source.json")
MODULES = ("rope", "attention", "loss", "model", "optim")
# The definitions that turn ids into logits: a checkpoint is of the architecture they describe.
FORWARD = ("model.Block", "model.Transformer.hidden", "model.Transformer.logits")
# All of the core, with what trains it.
CORE = (*FORWARD, "loss.LinearCrossEntropy", "optim.Optimizer")


@dataclass(frozen=True)
class Definition:
    """A function, a constant, or a member of a class: the hash of its syntax and the definitions it names."""

    digest: str
    names: frozenset[str]


def content(part: object, source: str) -> str:
    """A part of a syntax tree as text, without docstrings, comments and layout: the same on every Python."""
    match part:
        case ast.JoinedStr():  # Python 3.12 parses formatted strings in another way
            return ast.get_source_segment(source, part) or ""
        case ast.Expr(value=ast.Constant(value=str())):  # a docstring
            return ""
        case ast.AST():
            given = [(name, value) for name, value in ast.iter_fields(part) if value is not None and value != []]
            return f"{type(part).__name__}({', '.join(f'{name}={content(value, source)}' for name, value in given)})"
        case list():
            return f"[{', '.join(content(one, source) for one in part)}]"
    return repr(part)


@functools.cache
def definitions(package: Path = PACKAGE) -> dict[str, Definition]:
    """All definitions of the core by name, for example `attention.weigh`, `attention.Attention.forward`."""
    sources = {module: (package / f"{module}.py").read_text(encoding="utf-8") for module in MODULES}
    trees = {module: ast.parse(source) for module, source in sources.items()}
    known = {f"{module}.{name}" for module, tree in trees.items() for name, _ in _statements(tree)}
    found = {}
    for module, tree in trees.items():
        scope = {name: f"{module}.{name}" for name, _ in _statements(tree)} | _imported(tree, known)
        for name, statement in _statements(tree):
            for member, nodes in _members(statement):
                words = {node.id for part in nodes for node in ast.walk(part) if isinstance(node, ast.Name)}
                digest = hashlib.sha256(content(nodes, sources[module]).encode()).hexdigest()[:12]
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


def _members(statement: ast.stmt) -> Iterator[tuple[str, list[ast.AST]]]:
    """The parts of a statement: a class's methods, and `class` for the rest of it."""
    if not isinstance(statement, ast.ClassDef):
        yield "", [statement]
        return
    rest: list[ast.AST] = [*statement.bases, *statement.keywords, *statement.decorator_list]
    for member in statement.body:
        if isinstance(member, ast.FunctionDef):
            yield member.name, [member]
        else:
            rest.append(member)
    yield "class", rest


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


def recorded() -> dict[str, Any]:
    """What RECORD holds: the hashes of the definitions that the backends implement, and of the files they are in."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


@functools.cache
def text_hash(package: Path = PACKAGE) -> str:
    """One hash of the files as they are, comments included. If it is the recorded one, nothing needs to be parsed."""
    text = "".join((package / f"{module}.py").read_text(encoding="utf-8") for module in MODULES)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def edited(roots: Iterable[str], package: Path = PACKAGE) -> list[str]:
    """The definitions reached from `roots` that are not as recorded."""
    record = recorded()
    if text_hash(package) == record["text"]:
        return []
    known, before = definitions(package), record["definitions"]
    return [name for name in reached(roots, package) if known[name].digest != before.get(name)]


def file_hash(module: str, package: Path = PACKAGE) -> str:
    """One hash of a file of the package, for example `variants/sink`."""
    source = (package / f"{module}.py").read_text(encoding="utf-8")
    return hashlib.sha256(content(ast.parse(source).body, source).encode()).hexdigest()[:16]


def core_hash(package: Path = PACKAGE) -> str:
    """One hash of the forward pass: what a checkpoint is a checkpoint of."""
    record = recorded()
    if text_hash(package) == record["text"]:
        return str(record["core"])
    return parsed_core_hash(package)


def parsed_core_hash(package: Path = PACKAGE) -> str:
    """`core_hash` without the short cut of `text_hash`."""
    known = definitions(package)
    content = "".join(f"{name}={known[name].digest};" for name in reached(FORWARD, package))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def other_core(before: object) -> str | None:
    """How a checkpoint of the core `before` differs from one of this core, in a sentence; None if it does not."""
    now, same = core_hash(), recorded()["forward"]
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
    core, same = parsed_core_hash(), recorded()["forward"] if RECORD.exists() else []
    digests = {name: definition.digest for name, definition in sorted(definitions().items())}
    content = {"text": text_hash(), "core": core, "forward": sorted({*same, core}), "definitions": digests}
    RECORD.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{RECORD.name}: {len(digests)} definitions, forward pass {core}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
