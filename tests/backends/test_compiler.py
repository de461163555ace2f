"""C sources become libraries, on first use or ahead of it; every failure is one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import needs_compiler

from minitf.backends.cpu import build, compiler
from minitf.backends.cpu.compiler import CLibrary
from minitf.errors import Unavailable
from minitf.system import cpuinfo


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


def answer(library: CLibrary) -> int:
    return int(library.load().answer())


def no_compiler(*args: object, **kwargs: object) -> None:
    raise AssertionError("compiled once more")


@needs_compiler
def test_a_library_is_compiled_once(library: CLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(library) == 42
    monkeypatch.setattr(compiler, "_Compilation", no_compiler)
    assert answer(library) == 42
    library.compile_ahead()
    (built,) = cache.iterdir()
    assert built.name.startswith("answer_")


@needs_compiler
def test_loading_waits_for_a_compilation_ahead(library: CLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_ahead", {})  # other tests may have left one
    library.compile_ahead()
    assert len(compiler._ahead) == 1
    monkeypatch.setattr(compiler, "_Compilation", no_compiler)
    library.compile_ahead()
    assert answer(library) == 42
    assert not compiler._ahead
    assert len(list(cache.iterdir())) == 1


@needs_compiler
def test_a_changed_header_is_compiled_again(library: CLibrary, cache: Path) -> None:
    assert answer(library) == 42
    library.sources[0].with_name("answer.h").write_text("#define ANSWER 7\n")
    assert answer(library) == 7


@needs_compiler
@pytest.mark.parametrize("ahead", [False, True])
def test_a_compile_error_is_one_line(library: CLibrary, cache: Path, ahead: bool) -> None:
    library.sources[0].write_text("int answer(void) { return; oops }\n")
    if ahead:
        library.compile_ahead()
    with pytest.raises(Unavailable, match=r"did not compile answer\.c: .*error") as raised:
        library.load()
    assert "\n" not in str(raised.value)
    assert not list(cache.iterdir())


@needs_compiler
@pytest.mark.parametrize("ahead", [False, True])
def test_a_cache_that_cannot_be_written_makes_it_unavailable(
    library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINITF_CACHE", str(tmp_path / "file/cache"))
    if ahead:
        library.compile_ahead()
    with pytest.raises(Unavailable, match=r"did not compile answer\.c: "):
        library.load()


def test_an_exit_stops_the_compiler_and_leaves_no_file(cache: Path, tmp_path: Path) -> None:
    slow_compiler = tmp_path / "slow"
    slow_compiler.write_text("#!/bin/sh\necho $$ > pid\nexec sleep 3600\n")
    slow_compiler.chmod(0o755)
    program = f"""
import time
from pathlib import Path
from minitf.backends.cpu.compiler import CLibrary
CLibrary((Path({__file__!r}),), compiler={str(slow_compiler)!r}).compile_ahead()
while not Path("pid").exists() or not Path("pid").read_text():
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=900)
    assert not list(cache.iterdir())
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@needs_compiler
def test_a_failure_is_not_repeated(library: CLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.sources[0].write_text("oops\n")
    with pytest.raises(Unavailable, match="error") as first:
        library.load()
    monkeypatch.setattr(compiler, "_Compilation", no_compiler)
    with pytest.raises(Unavailable) as second:
        library.load()
    assert str(first.value) == str(second.value)


@pytest.mark.parametrize(("flags", "kernels"), [({"avx512_bf16"}, "bf16"), (set(), "fp32")])
def test_compiled_ahead_are_the_kernels_of_this_processor(
    flags: set[str], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[CLibrary] = []
    monkeypatch.setattr(cpuinfo, "flags", lambda: flags)
    monkeypatch.setattr(CLibrary, "compile_ahead", lambda library: begun.append(library))
    build.compile_ahead()
    assert begun == [build.kernels(kernels), build.decoding()]


@pytest.mark.slow
def test_the_train_command_compiles_before_it_imports_torch(tmp_path: Path) -> None:
    program = """
import sys
import minitf.backends.cpu.build, minitf.train

def begin():
    assert "torch" not in sys.modules
    print("begun")

minitf.backends.cpu.build.compile_ahead = begin
minitf.train.main(["trainer.dry_run=oops"])
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ended.stdout == "begun\n"
    assert "trainer.dry_run" in ended.stderr
