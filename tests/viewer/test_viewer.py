"""The viewer's modules: forbidden functions, their texts, and that their arithmetic is the model's."""

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import NASTY, NODE, needs_node, run_node

from minitf.attention import gather, match, weigh
from minitf.data.tokenizer_training import train_tokenizer
from minitf.interpretability.attention_maps import AttentionMaps, attention_maps_of_ids
from minitf.interpretability.heads import NAMES, PATTERN_THRESHOLD
from minitf.interpretability.token_labels import join_bytes
from minitf.model import Transformer
from minitf.tensorboard.gate import CODES
from minitf.tokenizer import TokenizerConfig
from minitf.viewer import FOLDER, MODULES, viewer_page

TAB = FOLDER.parent / "tensorboard/static/tab.js"
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in [*(FOLDER / name for name in MODULES), TAB]}


def imports(source: str) -> list[tuple[list[str], str]]:
    found = re.findall(r'^import \{([^}]*)\} from "\./([\w.]+)";', source, flags=re.MULTILINE)
    assert len(found) == len(re.findall(r"^import\b", source, flags=re.MULTILINE))
    return [([name.strip() for name in names.split(",") if name.strip()], file) for names, file in found]


def test_modules_import_existing_names_from_earlier_modules() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.js")) == sorted(MODULES)
    for place, name in enumerate(MODULES):
        for names, file in imports(SOURCES[name]):
            assert file in MODULES[:place], (name, file)
            exported = re.findall(r"^export (?:async )?(?:function|const) (\w+)", SOURCES[file], flags=re.MULTILINE)
            assert set(names) <= set(exported), (name, file)


@pytest.mark.parametrize("name", SOURCES)
def test_modules_use_no_markup_and_no_external_resources(name: str) -> None:
    source = re.sub(r"/\*.*?\*/|//[^\n]*", "", SOURCES[name], flags=re.DOTALL)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setTimeout\(\"", source
    )
    assert "http" not in source.replace("http:", "", source.count('createElementNS("http:'))
    assert len(SOURCES[name].splitlines()) < 320


def test_both_languages_have_all_texts() -> None:
    texts = SOURCES["texts.js"]
    english, chinese = (
        dict(re.findall(r'(\w+): "((?:[^"\\]|\\.)*)"', texts.split(f"const {name} = {{")[1].split("\n};")[0]))
        for name in ("ENGLISH", "CHINESE")
    )
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key
        assert sorted(re.findall(r"</?\w+>", text)) == sorted(re.findall(r"</?\w+>", chinese[key])), key
    asked = {key for source in SOURCES.values() for key in re.findall(r'\bt\("(\w+)"', source)}
    assert asked <= set(english), asked - set(english)
    assert {f"about_{name}" for name in NAMES} <= set(english)
    assert {name: english[name] for name in NAMES} == NAMES  # as in the terminal and in the pictures
    signs = {"masked", "dot", "divided", "difference", "side_a", "side_b", "compare_readout", "sum_of", "head_short"}
    signs |= {"prompt_next", "prompt_more"}
    assert all(re.search(r"[\u4e00-\u9fff]", text) for key, text in chinese.items() if key not in signs)


def test_the_help_lists_every_key() -> None:
    listed = set(re.findall(r'\["([^"]+)", "keys_', SOURCES["help.js"]))
    single = {key for keys in listed for key in keys.split()} | {str(number) for number in range(10)}
    table = SOURCES["viewer.js"].split("listenToKeys(document, {")[1].split("...Object")[0]
    keys = re.findall(r'(?:^|[ {,])(?:"(.)"|([a-z])): ', table, flags=re.MULTILINE)
    assert len(keys) >= 13
    assert {"Space" if one == " " else one or other for one, other in keys} <= single
    pressed = {key for source in SOURCES.values() for key in re.findall(r'event\.key [!=]== "(\w+)"', source)}
    assert pressed - {"Escape"} <= single


def test_every_refusal_has_a_text() -> None:
    """Of the page itself, and of what the server and the model raise with a code."""
    codes = {code for source in SOURCES.values() for code in re.findall(r'\brefusal\("(\w+)"', source)} | set(
        CODES.values()
    )
    code_at = {"RefusedError": 2, "RequestError": 1, "MinitfError": 1}
    for file in FOLDER.parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in code_at:
                codes |= {
                    ast.literal_eval(one) for one in call.args[code_at[call.func.id] :] if isinstance(one, ast.Constant)
                }
    english = SOURCES["texts.js"].split("const ENGLISH = {")[1].split("\n};")[0]
    assert codes == set(re.findall(r"\brefused_(\w+): ", english))


def test_thresholds_match_those_of_the_server() -> None:
    assert f"THRESHOLDS[score] ?? {PATTERN_THRESHOLD}" in SOURCES["over_training.js"]


@pytest.fixture(scope="module")
def maps() -> AttentionMaps:
    return small_maps(4)


def small_maps(num_kv_heads: int) -> AttentionMaps:
    from helpers import randomise

    from minitf.model import ModelConfig

    model = Transformer(ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=num_kv_heads), 50)
    randomise(model)
    pieces = SimpleNamespace(pieces=lambda ids: [f" {id_}" for id_ in ids])
    return attention_maps_of_ids(model.eval(), pieces, [3, 1, 4, 1, 5, 9, 2, 6], "text", 7)  # type: ignore[arg-type]


READ = """
import { readMap, threeSteps, headLook } from "./maps.js";
import { readFileSync } from "node:fs";
const map = readMap(JSON.parse(readFileSync("map.json")));
const rows = [];
for (let layer = 0; layer < map.layers; layer++)
  for (let head = 0; head < map.heads; head++)
    for (let query = 0; query < map.size; query++) {
      const steps = threeSteps(map.vectors(layer, head), query, map.head_dim);
      const look = headLook(map, layer, head, { measure: "norm" });
      rows.push({ layer, head, query, dots: steps.dots, scores: steps.scores, softmax: steps.weights,
        output: [...steps.output],
        weights: [...Array(map.size).keys()].map((key) => map.weight(layer, head, query, key)),
        norms: [...Array(map.size).keys()].map((key) => look.norm(key)) });
    }
console.log(JSON.stringify(rows));
"""


@needs_node
@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-5), (False, 0.03)])
def test_the_viewer_computes_the_models_three_steps(
    tmp_path: Path, num_kv_heads: int, exact: bool, tolerance: float
) -> None:
    maps = small_maps(num_kv_heads)
    (tmp_path / "map.json").write_text(json.dumps(maps.to_viewer(exact)))
    vectors = maps.vectors
    assert vectors is not None
    mask_TS = torch.full((8, 8), -torch.inf).triu(1)
    scores = torch.cat([match(vectors.q_LHTK[i : i + 1], vectors.k_LGTK[i : i + 1], mask_TS) for i in range(2)])
    outputs = torch.cat([gather(weigh(scores[i : i + 1]), vectors.v_LGTK[i : i + 1]) for i in range(2)])
    for row in run_node(READ, tmp_path):
        layer, head, query = row["layer"], row["head"], row["query"]
        expected = scores[layer, head, query, : query + 1]
        largest = float(expected.abs().max())
        torch.testing.assert_close(
            torch.tensor(row["scores"], dtype=torch.float32), expected, rtol=0, atol=tolerance * max(largest, 1)
        )
        torch.testing.assert_close(
            torch.tensor(row["dots"], dtype=torch.float32),
            expected * 8**0.5,
            rtol=0,
            atol=tolerance * 3 * max(largest, 1),
        )
        weights = maps.weights_LHTS[layer, head, query]
        torch.testing.assert_close(
            torch.tensor(row["weights"], dtype=torch.float32), weights, rtol=0, atol=1e-6 if exact else 1 / 255
        )
        torch.testing.assert_close(
            torch.tensor(row["softmax"], dtype=torch.float32), weights[: query + 1], rtol=0, atol=2 * tolerance
        )
        assert maps.output_norms_LHT is not None
        norms = maps.output_norms_LHT[layer, head]
        torch.testing.assert_close(torch.tensor(row["norms"], dtype=torch.float32), norms, rtol=1e-5, atol=1e-5)
        if exact:
            torch.testing.assert_close(
                torch.tensor(row["output"], dtype=torch.float32), outputs[layer, head, query], rtol=1e-4, atol=1e-4
            )


@needs_node
def test_inconsistent_maps_are_refused(tmp_path: Path, maps: AttentionMaps) -> None:
    good = maps.to_viewer()
    cut = good["weights"][:-8]
    bad = [good | {"weights": cut}, good | {"tokens": good["tokens"][:-1]}, good | {"layers": 3}, {"tokens": []}]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    code = """
import { readMap } from "./maps.js";
import { readFileSync } from "node:fs";
console.log(JSON.stringify(JSON.parse(readFileSync("bad.json")).map((raw) => {
  try { readMap(raw); return "taken"; } catch { return "refused"; }
})));
"""
    assert run_node(code, tmp_path) == ["refused"] * 4


@needs_node
def test_the_page_is_one_script_without_name_clashes(tmp_path: Path, maps: AttentionMaps) -> None:
    page = viewer_page([maps.to_viewer()], "title", {"train": [(0, 1.0)], "val": []})
    script = re.findall(r'<script type="module">(.*?)</script>', page, re.DOTALL)[0]
    main = script.rindex("const data = ")
    code = script[:main] + 'console.log(JSON.stringify(Object.keys(modules["preferences.js"])))'
    assert run_node(code, tmp_path) == ["remembered", "remember", "preferredLanguage", "systemTheme"]


def test_bytes_of_a_character_are_joined() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [])
    for text in ("a 你b", "😀!", "é", "ܐ한", *NASTY):
        if text == "\ud800":
            continue
        tokens = join_bytes(tokenizer.pieces(tokenizer.encode(text)))
        assert len(tokens) == len(text.encode())
        assert "\ufffd" not in "".join(tokens)
        for char in text:
            if len(char.encode()) > 1 and char != "\u2028":
                count = len(char.encode())
                assert [f"{char}({i}/{count})" for i in range(1, count + 1)] == [t for t in tokens if t[0] == char]
    assert join_bytes(["⟨e4⟩", "x⟨bd⟩"]) == ["⟨e4⟩", "x⟨bd⟩"]
    assert join_bytes([" ⟨e4⟩", "⟨bd⟩⟨a0⟩⟨e4⟩", "⟨bd⟩⟨a0⟩."]) == [" 你(1/2)", "你(2/2)你(1/2)", "你(2/2)."]
    assert join_bytes(["⟨e4⟩⟨bd⟩", "⟨a0⟩"]) == ["你(1/2)", "你(2/2)"]
    assert join_bytes(["⟨e4⟩", "⟨f0⟩", "⟨9f⟩", "⟨98⟩", "⟨80⟩"]) == ["⟨e4⟩", *(f"😀({i}/4)" for i in range(1, 5))]


def test_vectors_of_long_texts_are_left_out(make_model: Callable[..., Transformer]) -> None:
    maps = small_maps(4)
    assert maps.vectors is not None
    assert maps.to_viewer()["vectors"]["encoding"] == "int8"
    assert maps.to_viewer(exact=True)["vectors"]["encoding"] == "float32"
    large = type(maps.vectors)(*(torch.zeros(12, 12, 200, 64) for _ in range(4)))
    assert large.to_viewer(exact=False) is None
    assert large.to_viewer(exact=True) is None


@needs_node
def test_the_state_and_the_layout(tmp_path: Path, maps: AttentionMaps) -> None:
    """The tests of viewer.test.js, by node's test runner."""
    assert NODE is not None
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for file in [*(FOLDER / name for name in MODULES), Path(__file__).parent / "viewer.test.js"]:
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "map.json").write_text(json.dumps(maps.to_viewer()))
    done = subprocess.run([NODE, "--test", "viewer.test.js"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
