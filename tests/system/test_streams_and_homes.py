"""No traceback without a home, without UTF-8, or with closed standard streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitf.errors import MinitfError
from minitf.system import files
from minitf.system.files import cache_root, expand_user


def run(body: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command whose `main` has this body; `shell` redirects its streams."""
    code = f"import sys\nfrom minitf.errors import *\ndef main():\n    {body}\nsys.exit(run_command(main))"
    command = ["sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment})


def test_standard_output_takes_every_character() -> None:
    for encoding, expected in {"ascii": b"a ? ?", "latin-1": b"a ? \xe9", "utf-8:strict": "a 世 é".encode()}.items():
        done = run("print('a \\u4e16 \\xe9')", PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stdout.rstrip(), done.stderr) == (0, expected, b"")
    assert run("print('x\\udcff')", PYTHONIOENCODING="utf-8:strict").stdout == b"x?\n"


def test_a_closed_standard_error_gets_nothing_into_standard_output() -> None:
    done = run("print('note', file=sys.stderr); print('{}')", "2>&-")
    assert (done.returncode, done.stdout) == (0, b"{}\n")
    assert run("raise RequestError('no')", "2>&-").returncode == 2
    assert run("print(sys.stdin.isatty(), sys.stdin.read())", "<&-").stdout == b"False \n"
    assert run("print('lost')", ">&-").returncode == 0


def test_no_file_is_opened_in_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    run(f"file = open({path!r}, 'wb'); import os; os.write(2, b'a warning of a library'); file.close()", "2>&-")
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_standard_output_is_one_line() -> None:
    done = run("print('text')", ">/dev/full")
    assert (done.returncode, done.stderr) == (1, b"minitf: No space left on device\n")


def test_a_name_that_the_locale_cannot_encode_is_one_line() -> None:
    done = run("open('\\u65e5.txt')", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert done.returncode == 2
    assert done.stderr.startswith(b"minitf: '\\u65e5' cannot be written in ascii: set LC_ALL=C.UTF-8")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without HOME and without an entry in /etc/passwd, as `docker run --user` makes; the temporary files."""
    for name in ("HOME", "XDG_CACHE_HOME", "MINITF_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_a_home_has_a_private_cache(no_home: Path) -> None:
    found = cache_root()
    assert found.parent.parent == no_home
    assert found.parent.stat().st_mode & 0o777 == 0o700
    assert cache_root() == found
    found.parent.chmod(0o777)
    with pytest.raises(MinitfError, match="belongs to others: set MINITF_CACHE"):
        cache_root()
    found.parent.rmdir()
    found.parent.symlink_to(no_home)
    with pytest.raises(MinitfError, match="belongs to others"):
        cache_root()


def test_a_name_may_begin_with_a_tilde(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("~/x") == Path("/home/me/x")
    assert expand_user("~draft.txt") == Path("~draft.txt")  # no such user, and no such file
    Path("~").mkdir()
    Path("~/x").touch()
    assert expand_user("~/x") == Path("~/x")
    assert files.cache_root("~/y") == Path("/home/me/y")
