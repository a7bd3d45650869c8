"""Files become numbered rows. A row that cannot be read stands there as a `BadRowError`, with its line."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import DataError, did_you_mean


class BadRowError(Exception):
    """Why one row cannot become a record; never leaves this room."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Row:
    """A parsed value, or the `BadRowError` that stands for it, and its 1-based line."""

    line: int
    value: Any


def rows_from_file(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Yield the rows of a file; its extension says how it is read.

    Raises:
        DataError: the file is missing, empty, of an unknown extension, or damaged as a whole.
    """
    path = Path(path)
    try:
        yield from _reader(path)(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": lambda p: _delimited(p, ","),
        ".tsv": lambda p: _delimited(p, "\t"),
        ".parquet": _parquet,
    }
    known = f"known: {' '.join(readers)}."
    if not os.path.exists(path):  # unlike Path.exists, False for a name that no file system takes
        near = [p.name for p in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise DataError(f"{path} does not exist.{did_you_mean(path.name, near)}")
    if not path.is_file():
        raise DataError(f"{path} is not a file. Name one data file; {known}")
    extension = path.suffix.lower()
    if extension not in readers:
        guess = did_you_mean(extension, readers)
        raise DataError(f"{path} has the extension {path.suffix!r}; {known}{guess}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    return readers[extension]


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield Row(number, _parsed(raw))


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return BadRowError(
            "encoding", f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        )
    except json.JSONDecodeError as error:
        return BadRowError("json", f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; nesting without end
        return BadRowError("json", f"broken JSON: {error}")


def _json(path: Path) -> Iterator[Row]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} on line {line}.") from error
    if not text.lstrip().startswith("["):  # many publish JSONL under this extension
        yield from _jsonl(path)
        return
    yield from _json_list(path, text)


def _json_list(path: Path, text: str) -> Iterator[Row]:
    """Walk the list element by element, so that each keeps the line on which it starts."""
    decoder = json.JSONDecoder()
    at = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: broken JSON in the record that starts on line {line}: {error}"
            ) from error
        yield Row(line, value)
        at = _skip_space(text, at)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            what = "ends in the middle of the list" if at == len(text) else "lacks a comma"
            raise DataError(f"{path}: broken JSON: it {what} after the record that starts on line {line}.")
    if _skip_space(text, at + 1) != len(text):
        raise DataError(f"{path}: broken JSON: there is text after the closing bracket of the list.")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _delimited(path: Path, delimiter: str) -> Iterator[Row]:
    # Bytes that are not UTF-8 travel as surrogates; the check of each string finds them in their row.
    with _long_cells(), path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                text = f"broken quoting between line {line} and line {reader.line_num}: {error}"
                if header is None:
                    raise DataError(f"{path}: the header has {text}.") from error
                yield Row(line, BadRowError("csv", text))
                continue
            if not cells:
                continue
            if header is None:
                header = _header(path, cells)
            elif len(cells) != len(header):
                yield Row(
                    line, BadRowError("columns", f"has {len(cells)} cells, the header has {len(header)}")
                )
            else:
                yield Row(line, dict(zip(header, cells, strict=True)))


def _header(path: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the header names {', '.join(map(repr, twice))} twice. Rename one of them.")
    return header


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses cells over 128 KiB unless this process-wide limit is raised."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from (Row(number, row) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
