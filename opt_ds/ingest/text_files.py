"""Read text files written by people: UTF-8, or UTF-16 with a byte order mark, gzipped or not, and strict JSON in them.

Errors are worded for the user. Whether a file is gzipped is detected by its content. A JSON object must not contain a
field twice, and NaN is refused.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from opt_ds.decoding.file_kinds import HEAD_BYTES, format_of_content
from opt_ds.errors import UserError
from opt_ds.user_files import is_utf16

_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"  # written by editors on Windows
_JSON_BLOCK = 1 << 20
_RECODED_BLOCK = 1 << 16
_SPACE = " \t\n\r"


class JsonError(ValueError):
    """Why a text is not strict JSON, worded for the user."""


def parse_json(text: str) -> Any:
    """Return the single JSON value in a text. Raise JsonError for anything else."""
    try:
        return _DECODER.decode(text)
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonError(_why_not_json(error)) from None


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a text file, gzipped or not, to read its UTF-8 bytes. UTF-16 is detected by its byte order mark and recoded.

    Raise UserError if the file is missing, truncated or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        _check_is_text(path, head)
        if not head.startswith(_GZIP):
            yield _in_utf8(path, file)
            return
        try:
            with gzip.open(file, "rb") as unpacked:
                yield _in_utf8(path, cast(BinaryIO, unpacked))
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise UserError(f"{path}: the gzip file is truncated or damaged: copy it again") from None


def byte_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of lines that are not blank, without a byte order mark. LF, CRLF and CR end a line."""
    number = 0
    for raw in file:
        for line in raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
            number += 1
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield number, line


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, gzipped or not.

    Line ends are kept. Raise UserError like `open_bytes`, and for other encodings.
    """
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            yield text
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text: save it as UTF-8") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line number, object) of a JSONL file, or (line number, what is wrong with the line)."""
    with open_bytes(path) as file:
        for number, raw in byte_lines(file):
            try:
                value = parse_json(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, f"not UTF-8 text (byte {error.start})"
                continue
            except JsonError as error:
                yield number, f"not JSON: {error}"
                continue
            yield number, value if isinstance(value, dict) else "not a JSON object"


def read_json_array(path: Path) -> Iterator[Any]:
    """Yield the elements of a file that is one JSON array, without loading all of it.

    Visual Genome's files are large.
    """
    with open_text(path) as file:
        reader = _ArrayReader(path, file)
        if reader.next_letter() != "[":
            raise UserError(f"{path}: not a JSON array")
        reader.skip()
        if reader.next_letter() == "]":
            reader.skip()
        else:
            while True:
                yield reader.value()
                letter = reader.next_letter()
                if letter not in (",", "]"):
                    raise UserError(f"{path}: not JSON: {'it is truncated' if not letter else 'a comma or ] is missing'}")
                reader.skip()
                if letter == "]":
                    break
        if reader.next_letter():
            raise UserError(f"{path}: not JSON: more follows after the end of the array")


def read_json(path: Path) -> Any:
    """Return the single JSON value of a file. Raise UserError if the file is missing or contains anything else."""
    with open_text(path) as file:
        try:
            return parse_json(file.read())
        except JsonError as error:
            raise UserError(f"{path}: not JSON: {error}") from None


class _ArrayReader:
    """Decodes the elements of an array from a file, block by block."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._buffer, self._ended = "", False

    def next_letter(self) -> str:
        """Return the next character that is not a space; "" at the end of the file."""
        while True:
            self._buffer = self._buffer.lstrip(_SPACE)
            if self._buffer or not self._read_more():
                return self._buffer[:1]

    def skip(self) -> None:
        """Skip one character."""
        self._buffer = self._buffer[1:]

    def value(self) -> Any:
        """Decode and return the next element."""
        self.next_letter()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer)
            except JsonError as error:
                raise UserError(f"{self._path}: not JSON: {error}") from None
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._read_more():
                    raise UserError(f"{self._path}: not JSON: {_why_not_json(error)}") from None
                continue
            number = isinstance(value, int | float) and not self._buffer[end:].lstrip(_SPACE).startswith((",", "]"))
            if number and self._read_more():  # its digits may continue in the next block
                continue
            self._buffer = self._buffer[end:]
            return value

    def _read_more(self) -> bool:
        # Read at least as much again as is waiting, so that a long element is not decoded once per block.
        block = "" if self._ended else self._file.read(max(_JSON_BLOCK, len(self._buffer)))
        self._ended = not block
        self._buffer += block
        return bool(block)


class _Recoded(io.RawIOBase):
    """The UTF-8 bytes of a UTF-16 text. Reading raises UserError if it is truncated or damaged."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._text = path, io.TextIOWrapper(file, encoding="utf-16", newline="")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            try:
                self._left = self._text.read(_RECODED_BLOCK).encode()
            except UnicodeError:
                raise UserError(f"{self._path}: begins as UTF-16 text, but is truncated or damaged: save it as UTF-8") from None
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _in_utf8(path: Path, file: BinaryIO) -> BinaryIO:
    """Return a UTF-8 file unchanged, and a UTF-16 file recoded."""
    head = file.read(4)
    file.seek(0)
    return cast(BinaryIO, io.BufferedReader(_Recoded(path, file))) if is_utf16(head) else file


def _check_is_text(path: Path, head: bytes) -> None:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise UserError(f"{path}: not UTF-8 text but UTF-32: save it as UTF-8")
    if is_utf16(head):
        return
    if path.suffix.lower() == ".gz" and not head.startswith(_GZIP):
        raise UserError(f"{path}: not a gzip file: rename it without .gz, or copy it again")
    found = format_of_content(head)
    if found is not None and not head.startswith(_GZIP) and found.kind in ("archive", "document"):
        advice = "unpack it, or save the table as CSV in UTF-8" if found.kind == "archive" else found.advice
        raise UserError(f"{path}: {found}, not a text file: {advice}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise JsonError(f'the field "{doubled[:80]}" occurs twice in one object')
    return fields


def _refuse_constant(name: str) -> Any:
    raise JsonError(f"{name} is not a JSON value: write null")


def _why_not_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "a number has too many digits"
    if error.msg.startswith("Extra data"):
        return f"more follows after the value (line {error.lineno}, column {error.colno})"
    rest = error.doc[error.pos :]
    if not rest.strip() or error.msg.startswith("Unterminated string"):
        return "it is truncated" if error.doc.strip() else "it is empty"
    return f"see line {error.lineno}, column {error.colno}"


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse_constant)
