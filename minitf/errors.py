"""Errors a user can act on, and how every command ends: one clear line and an exit status.

Status 0: done. 1: the work failed (`MinitfError`, a full disk, ...). 2: the request was wrong (`RequestError`).
"""

import argparse
import difflib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class MinitfError(Exception):
    """The work failed. The message is one line: what happened, where, and what to do.

    `code` names what happened, with `values`, for a caller that says it in other words or in another language.
    """

    exit_status = 1

    def __init__(self, message: str = "", code: str = "", **values: str | int) -> None:
        super().__init__(message)
        self.code = code
        self.values = values


class RequestError(MinitfError):
    """The request was wrong: a bad key, path, text or combination. Nothing was started."""

    exit_status = 2


class DeviceError(RequestError):
    """The requested device does not exist on this machine."""


class UntrustedCode(RequestError):  # noqa: N818
    """A run brings code of its own that this user has not asked for."""


class Unavailable(MinitfError):  # noqa: N818
    """This machine or this model cannot do it: why. A caller with an alternative takes that instead."""


class CommandParser(argparse.ArgumentParser):
    """argparse with one-line errors and exit status 2; its multi-line usage would hide what was wrong."""

    def error(self, message: str) -> NoReturn:
        kind, _, rest = message.partition("unrecognized arguments: ")
        hint = ""
        if rest.startswith("-") and not kind:
            close = difflib.get_close_matches(rest.split()[0].split("=")[0], self._option_string_actions, 1, 0.75)
            hint = f"; did you mean {close[0]}?" if close else ""
        elif rest and not kind:
            hint = "; a text of several words needs quotes around it"
        self.exit(2, f"minitf: {' '.join(message.split())}{hint or f'; see {self.prog} --help'}\n")


def read_text_argument(text: str | None, what: str) -> str:
    """The text given on the command line, or else standard input unless that is a terminal."""
    if text is not None:
        return text
    if sys.stdin.isatty():
        raise RequestError(f"no {what}: give it as an argument, or pipe it in")
    return decoded_argument(sys.stdin.buffer.read())


def decoded_argument(data: bytes) -> str:
    """A text from standard input without the newline at its end."""
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 (byte {error.start}): convert it first") from None


def one_line(error: object, max_chars: int = 200) -> str:
    """The text of an error without line breaks, cut to `max_chars` characters."""
    return " ".join(str(error).split())[:max_chars]


def out_of_memory(error: Exception) -> bool:
    """Whether Python, PyTorch or a device has run out of memory."""
    phrases = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(phrase in str(error).lower() for phrase in phrases)


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and return its exit status; an error a user can act on becomes one line on stderr."""
    try:
        _prepare_streams()
        status = main() or 0
        sys.stdout.flush()
        return status
    except MinitfError as error:
        print(f"minitf: {error}", file=sys.stderr)
        return error.exit_status
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        where = str(error).strip().splitlines()[0][:200] if str(error) else "Python found no more"
        print(f"minitf: out of memory: {where}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:  # of a file's name: Python encodes names as the locale says
        if error.encoding.lower().replace("-", "") == "utf8":
            raise
        text = error.object[error.start : error.end]
        print(f"minitf: {text!r} cannot be written in {error.encoding}: set LC_ALL=C.UTF-8", file=sys.stderr)
        return RequestError.exit_status
    except BrokenPipeError:  # `generate.py ... | head` closes our stdout: not a failure
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a read-only directory: the system's message with the file
        where = f": {error.filename}" if error.filename else ""
        print(f"minitf: {error.strerror or error}{where}", file=sys.stderr)
        _discard_output()
        return 1
    except KeyboardInterrupt as interruption:  # its text may say what was saved
        print(f"minitf: {interruption}" if str(interruption) else "minitf: interrupted", file=sys.stderr)
        return 130


def _prepare_streams() -> None:
    """Standard streams that exist and take every character: closed ones lead nowhere, others get replacements."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # the next file to be opened would be taken for it
        pass
    os.close(descriptor)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream.errors == "strict" else stream.errors)


def _discard_output() -> None:
    """What could not be written must not be tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
