"""C sources become libraries, ahead or when they are needed; whatever fails on the way is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from minitf.backends.cpu import build as c_sources
from minitf.backends.cpu import compiler as c_library
from minitf.backends.cpu.compiler import CLibrary
from minitf.system import cpuinfo as processor


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("MINITF_CACHE", str(directory))
    return directory


@pytest.fixture
def library(tmp_path: Path) -> CLibrary:
    source = tmp_path / "answer.c"
    source.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    return CLibrary((source,))


def answer(library: CLibrary) -> int | str:
    found = library.load()
    return found if isinstance(found, str) else int(found.answer())


def no_compiler(*args: object, **kwargs: object) -> None:
    raise AssertionError("compiled once more")


def test_a_library_is_compiled_once(library: CLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(library) == 42
    monkeypatch.setattr(c_library, "_Compilation", no_compiler)
    assert answer(library) == 42
    library.compile_ahead()
    (built,) = cache.iterdir()
    assert built.name.startswith("answer_")


def test_ahead_it_is_compiled_beside_and_waited_for(
    library: CLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.compile_ahead()
    assert len(c_library._ahead) == 1
    monkeypatch.setattr(c_library, "_Compilation", no_compiler)
    library.compile_ahead()
    assert answer(library) == 42
    assert not c_library._ahead
    assert len(list(cache.iterdir())) == 1


def test_what_changed_is_compiled_anew(library: CLibrary, cache: Path) -> None:
    assert answer(library) == 42
    library.sources[0].with_name("answer.h").write_text("#define ANSWER 7\n")
    assert answer(library) == 7


@pytest.mark.parametrize("ahead", [False, True])
def test_what_does_not_compile_has_one_line(library: CLibrary, cache: Path, ahead: bool) -> None:
    library.sources[0].write_text("int answer(void) { return; oops }\n")
    if ahead:
        library.compile_ahead()
    said = answer(library)
    assert isinstance(said, str)
    assert "did not compile answer.c" in said
    assert "error" in said
    assert "\n" not in said
    assert not list(cache.iterdir())


@pytest.mark.parametrize("ahead", [False, True])
def test_a_cache_that_cannot_be_is_no_end(
    library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINITF_CACHE", str(tmp_path / "file/cache"))
    if ahead:
        library.compile_ahead()
    assert "did not compile answer.c: " in str(answer(library))


def test_an_end_before_it_is_needed_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "slow"
    compiler.write_text("#!/bin/sh\necho $$ > pid\nexec sleep 60\n")
    compiler.chmod(0o755)
    program = f"""
import time
from pathlib import Path
from minitf.backends.cpu.compiler import CLibrary
CLibrary((Path({__file__!r}),), compiler={str(compiler)!r}).compile_ahead()
while not Path("pid").exists() or not Path("pid").read_text():
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=30)
    assert not list(cache.iterdir())
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@pytest.mark.parametrize(("flags", "kernels"), [({"avx512_bf16"}, "linear.c"), (set(), "rows.c")])
def test_ahead_is_what_the_processor_will_train_with(
    flags: set[str], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(processor, "flags", lambda: flags)
    monkeypatch.setattr(CLibrary, "compile_ahead", lambda library: begun.append(library.sources[0].name))
    c_sources.compile_ahead()
    assert begun == [kernels, "decode.c"]


def test_before_torch_is_imported_the_command_has_compilers_at_work(tmp_path: Path) -> None:
    program = """
import sys
import minitf.backends.cpu.build, minitf.train

def begin():
    assert "torch" not in sys.modules
    print("begun")

minitf.backends.cpu.build.compile_ahead = begin
minitf.train.main(["trainer.dry_run=oops"])
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "begun\n"
    assert "trainer.dry_run" in ended.stderr
