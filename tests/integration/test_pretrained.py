"""Pretrained models, any Llama or Qwen3, from a folder or the hub: loaded, trained further and saved like our own."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_text, needs_compiler, randomise, train_here
from hub_stand_in import HubStandIn

from minitf.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from minitf.checkpoints.hugging_face import is_hub_name
from minitf.data.tokenizer_training import train_tokenizer
from minitf.errors import MinitfError, RequestError
from minitf.generate import GenerationRequest, Options, Sampling, encode_prompt, generate, generate_text
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer, TokenizerConfig

transformers: Any = pytest.importorskip("transformers", reason="install the extra minitf[test]")

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# Small models shaped like well-known ones: grouped heads, odd sizes, tied embeddings, epsilons, frequencies.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": ("Llama", {
        "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }),
    "TinyLlama": ("Llama", {
        "num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }),
    "Llama-3.2": ("Llama", {
        "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
    }),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "yarn": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 10000.0}}),
    "Qwen3-0.6B": ("Qwen3", {
        "head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }),
    "Qwen3-8B": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": False, "rms_norm_eps": 1e-3}),
    "Qwen3 with yarn": ("Qwen3", {
        "head_dim": 16, "rope_parameters": {**YARN, "rope_theta": 1e6, "beta_fast": 16.0, "attention_factor": 1.2},
    }),
}  # fmt: skip


def build(name: str, vocab_size: int) -> Any:
    """A model of transformers in the shape of `name`, with random weights."""
    family, changes = SHAPES[name]
    shape = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**(shape | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomise(model)
    return model


def logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(ids_BT)
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    theirs = build(name, tokenizer.vocab_size + 7)  # real models have unused rows, too
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    ours = load_checkpoint(tmp_path).model
    ids_BT = torch.randint(tokenizer.vocab_size, (2, 128))
    expected = logits(theirs, ids_BT)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(ours, ids_BT), expected, rtol=0, atol=1e-4)

    # And back: transformers and minitf both read the saved model as the same one.
    again = save_checkpoint(tmp_path / "saved", ours, tokenizer, {}, {"step": 1}, is_best=True, keep=1)
    back = transformers.AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32)
    torch.testing.assert_close(logits(back, ids_BT), expected, rtol=0, atol=1e-4)
    assert asdict(load_checkpoint(again).model.config) == asdict(ours.config)


@needs_compiler
@pytest.mark.parametrize("name", ["SmolLM2", "Llama-3.2", "Qwen3 with yarn"])
def test_every_engine_generates_what_transformers_generates(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    theirs = build(name, tokenizer.vocab_size)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model = load_checkpoint(tmp_path).model
    prompt = tokenizer.encode("The cat sat on")
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=60, min_new_tokens=60, do_sample=False, eos_token_id=None
    )
    for engine in ("torch", "native"):
        steps = generate(model, GenerationRequest(prompt, Sampling(temperature=0), engine=engine))
        assert [int(next(steps).ids_B) for _ in range(60)] == expected[0, len(prompt) :].tolist(), engine


def test_old_and_new_spellings_of_rope_scaling_are_read_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = build("Llama-3.2", tokenizer.vocab_size)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    new = load_checkpoint(tmp_path).model.config
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"]
    content |= {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    old = load_checkpoint(tmp_path).model.config
    assert old == new
    assert old.rope_scaling == LLAMA3
    assert old.rope_theta == 500000.0


def test_missing_config_values_have_the_defaults_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = build("Qwen3-8B", tokenizer.vocab_size)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for name in ("tie_word_embeddings", "attention_bias", "rope_parameters", "layer_types", "use_sliding_window"):
        content.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps({**content, "rope_theta": 10000.0, "sliding_window": None}))
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids_BT = torch.randint(tokenizer.vocab_size, (1, 64))
    ours = load_checkpoint(tmp_path).model
    torch.testing.assert_close(logits(ours, ids_BT), logits(reloaded, ids_BT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_in_shards_are_loaded(tokenizer: Tokenizer, tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = build("TinyLlama", tokenizer.vocab_size).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    ours = load_checkpoint(tmp_path).model
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    ids_BT = torch.randint(tokenizer.vocab_size, (1, 64))
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ids_BT)
    torch.testing.assert_close(logits(ours, ids_BT), expected, rtol=0, atol=1e-4)
    next(iter(tmp_path.glob("model-00002-*"))).unlink()
    with pytest.raises(MinitfError, match=r"model-00002-of-.* is missing"):
        load_checkpoint(tmp_path)


def test_pickled_weights_are_never_opened(tokenizer: Tokenizer, tmp_path: Path) -> None:
    build("SmolLM2", tokenizer.vocab_size).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(MinitfError, match="pickle"):
        load_checkpoint(tmp_path)


def test_an_index_cannot_name_files_outside_its_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    build("SmolLM2", tokenizer.vocab_size).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer.save(tmp_path)
    with pytest.raises(MinitfError, match="outside"):
        load_checkpoint(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    build("SmolLM2", tokenizer.vocab_size - 1).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(MinitfError, match="tokenizer has 300 tokens and its model only 299"):
        load_checkpoint(tmp_path)


def llama_tokenizer(directory: Path) -> Any:
    """A tokenizer like Llama's: <s> before every text, </s> after it, and a token that ends a turn of a chat."""
    import tokenizers

    backend = train_tokenizer(TokenizerConfig(kind="byte"), []).backend
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    start = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=start)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    theirs.save_pretrained(directory)
    return theirs


def test_a_models_own_start_and_end_tokens_are_kept(tmp_path: Path) -> None:
    theirs = llama_tokenizer(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.end_token == "<|im_end|>"  # its eos_token, not the first known end token
    assert ours.start_ids == [theirs.bos_token_id]
    assert ours.encode("a cat") == theirs("a cat", add_special_tokens=False)["input_ids"]
    assert encode_prompt(ours, "a cat") == theirs("a cat")["input_ids"]
    ours.save(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (again.bos_token, again.eos_token) == ("<s>", "<|im_end|>")
    assert again("a cat")["input_ids"] == theirs("a cat")["input_ids"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    build("SmolLM2", tokenizer.vocab_size + 20).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_a_pretrained_model_generates_is_evaluated_inspected_and_trained_further(
    pretrained: Path, workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from minitf.cli import evaluate
    from minitf.cli.generate import main as generate_main
    from minitf.interpretability import page as attention_page

    (workdir / "mine.txt").write_text(make_text(100), encoding="utf-8")
    assert generate_main(["The cat", "--run", str(pretrained), "--max-tokens", "5", "--temperature", "0"]) == 0
    assert evaluate.main(["--run", str(pretrained), "--file", "mine.txt", "--json"]) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert attention_page.main(["The cat sat", "--run", str(pretrained), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["weights"][0]) == 9

    own = [word for word in tiny if not word.startswith(("model.", "tokenizer"))]
    short = ["model.context_length=32", "optim=adamw", "trainer.max_steps=40", "run_dir=runs/on/one"]
    assert train_here(*own, f"init_from='{pretrained}'", *short) == 0
    further = load_checkpoint("runs/on/one").model
    assert further.config.context_length == 32
    assert further.vocab_size == load_checkpoint(pretrained).model.vocab_size
    assert evaluate.main(["--run", "runs/on/one", "--file", "mine.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] < before - 0.5
    assert train_here("resume=runs/on/one", "trainer.max_steps=42") == 0


def test_the_default_context_is_that_of_the_model(pretrained: Path, workdir: Path, tiny: list[str]) -> None:
    own = [word for word in tiny if not word.startswith(("model.", "tokenizer", "trainer.max_steps"))]
    assert train_here(*own, f"init_from='{pretrained}'", "trainer.max_steps=1", "run_dir=runs/on/one") == 0
    assert load_checkpoint("runs/on/one").model.config.context_length == 128
    assert train_here(*own, f"init_from='{pretrained}'", "model.num_layers=1") == 2


def test_the_cache_is_as_long_as_the_requested_text(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(pretrained)
    made = []
    new_cache = Transformer.new_cache
    monkeypatch.setattr(Transformer, "new_cache", lambda *a: made.append(a[2]) or new_cache(*a))
    options = Options(max_tokens=5, sampling=Sampling(temperature=0))
    short = generate_text(checkpoint.model, checkpoint.tokenizer, "The", options)[0]
    assert max(made) < 10
    longer = Options(max_tokens=200, sampling=Sampling(temperature=0))  # more than the context of 128
    assert generate_text(checkpoint.model, checkpoint.tokenizer, "The", longer)[0].startswith(short)
    assert max(made) == 128


# The hub


def test_a_name_that_could_be_a_path_is_no_hub_name(workdir: Path) -> None:
    (workdir / "here").mkdir()
    assert is_hub_name("HuggingFaceTB/SmolLM2-135M")
    assert is_hub_name("Qwen/Qwen3-0.6B@main")
    for name in ("latest", "runs/kjv", "here/model", "/tmp/a", "./a/b", "a/b/c", "../a", "gpt2"):
        assert not is_hub_name(name), name


@pytest.fixture
def hub(pretrained: Path) -> Iterator[HubStandIn]:
    files = {path.name: path.read_bytes() for path in pretrained.iterdir()}
    unwanted = {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"import os", "onnx/model.safetensors": b"other"}
    with HubStandIn(
        {"someone/small": {**files, **unwanted}, "someone/gated": files}, gated={"someone/gated"}
    ) as stand_in:
        yield stand_in


GENERATE = """
import sys
from minitf.errors import run_command
from minitf.cli.generate import main
for name in sys.argv[1:]:
    arguments = ["The cat", "--run", name, "--max-tokens", "4", "--temperature", "0"]
    print(run_command(lambda: main(arguments)), file=sys.stderr)
"""


@pytest.fixture
def generate_from_hub(hub: HubStandIn, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Generate from each in one new process, since the hub's client reads its settings when it is imported.

    Each exit status is a line of stderr, after the messages.
    """

    def run(*names: str, **changes: str) -> subprocess.CompletedProcess[str]:
        import os

        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **changes}
        return subprocess.run(
            [sys.executable, "-c", GENERATE, *names], env=environment, capture_output=True, text=True,
            cwd=tmp_path,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_a_hub_model_is_fetched_once_without_pickle_or_code(
    hub: HubStandIn, generate_from_hub: Callable[..., subprocess.CompletedProcess[str]], pretrained: Path
) -> None:
    done = generate_from_hub("someone/small")
    assert done.stderr.endswith("\n0\n"), done.stderr
    assert done.stdout.startswith("The cat")
    fetched = {request.rsplit("/resolve/", 1)[1].split("/", 1)[1] for request in hub.requests if "/resolve/" in request}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert fetched == wanted
    hub.requests.clear()
    again = generate_from_hub("someone/small", HF_HUB_OFFLINE="1")
    assert again.stderr.endswith("\n0\n"), again.stderr
    assert (again.stdout, hub.requests) == (done.stdout, [])


@pytest.mark.slow
def test_an_error_of_the_hub_is_one_line(
    hub: HubStandIn, generate_from_hub: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    wrong = {
        "someone/absent": "neither here nor on the hub",
        "someone/gated": "gated",
        "someone/small@v9": "revision",
    }
    for status, wanted, changes in (
        (2, wrong, {}),
        (1, {"someone/small": "HF_HUB_OFFLINE"}, {"HF_HUB_OFFLINE": "1"}),
        (1, {"someone/small": "127.0.0.1:9"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    ):
        done = generate_from_hub(*wanted, **changes)
        said = [line for line in done.stderr.splitlines() if line and "Fetching" not in line]  # a progress bar
        assert said[1::2] == [str(status)] * len(wanted), done.stderr
        for line, (name, words) in zip(said[::2], wanted.items(), strict=True):
            assert line.startswith(f"minitf: {name}")
            assert words in line


def test_a_missing_folder_is_not_requested_from_the_hub(workdir: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        load_checkpoint("runs/none")


def test_our_own_models_have_no_start_token(make_model: Callable[..., Transformer], tokenizer: Tokenizer) -> None:
    assert tokenizer.start_ids == []
