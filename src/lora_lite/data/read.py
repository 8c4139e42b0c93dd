"""Rows from JSONL, JSON, CSV, Parquet, standard input or a data set of the hub, each with the place it came from."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import FileError

Located = tuple[dict[str, Any], str]
"""A row, and where it stands: "rows.jsonl:3"."""
STDIN = "-"
KINDS = "JSONL, JSON, CSV, TSV, Parquet, - (JSONL on standard input), or a data set of the hub as NAME or NAME:SPLIT"
HUB = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[^/\\]+))?")
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_rows(source: str, limit: int | None = None) -> list[Located]:
    """The first `limit` rows of a file, of standard input or of a data set of the hub.

    Raises:
        FileError: nothing is there, it is no text or not of its form, or holds no rows; file and line are named.
    """
    rows = list(itertools.islice(_rows(source), limit))
    if not rows:
        raise FileError(f"{source} holds no rows.")
    return rows


def check_source(source: str) -> None:
    """Refuse a source that is certainly not there, before anything is loaded.

    Raises:
        FileError: it is neither a file nor the name of a data set.
    """
    if source == STDIN or Path(source).exists():
        return
    if not HUB.fullmatch(source) or source.endswith(ENDINGS):
        raise FileError(f"{source!r} is neither 'wordmath' nor a file. Give {KINDS}.")


def _rows(source: str) -> Iterator[Located]:
    if source == STDIN:
        given = sys.stdin
        return _json(given.buffer.read() if hasattr(given, "buffer") else given.read().encode(), "standard input")
    check_source(source)
    path = Path(source)
    if not path.is_file():
        return _data_set(source)
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _parquet(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}.") from None
    if ending in (".csv", ".tsv"):
        return _csv(_text(data, str(path)), str(path), "\t" if ending == ".tsv" else ",")
    return _json(data, str(path))


def _text(data: bytes, where: str) -> str:
    """The bytes as text; a byte order mark is skipped, UTF-16 with a mark is read too."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        if b"\0" in data[:4096]:
            raise FileError(f"{where} is a binary file. Give {KINDS}.") from None
        raise FileError(
            f"{where}:{line}: byte 0x{data[e.start]:02x} is not UTF-8, so the file has another encoding. "
            f"Convert it, for instance: iconv -f latin1 -t utf-8 {where} > utf8.jsonl"
        ) from None
    if "\0" in text[:4096]:
        raise FileError(f"{where} is a binary file. Give {KINDS}.")
    return text


def _json(data: bytes, where: str) -> Iterator[Located]:
    """One object a line, or one array of objects."""
    text = _text(data, where)
    if text.lstrip()[:1] == "[" and (whole := _array(text, where)) is not None:
        for number, row in enumerate(whole, 1):
            yield _checked(row, f"{where}, row {number}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:  # numbers of thousands of digits and deep nesting too
                raise FileError(f"{where}:{number}: not JSON ({e}).") from None
            yield _checked(row, f"{where}:{number}")


def _array(text: str, where: str) -> list[Any] | None:
    """The array that the text is, or None for lines."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":  # a line that is a list: each line is checked by itself
            return None
        raise FileError(f"{where}:{e.lineno}: not JSON ({e}).") from None
    except (ValueError, RecursionError) as e:
        raise FileError(f"{where}: not JSON ({e}).") from None
    return whole if isinstance(whole, list) and (not whole or isinstance(whole[0], dict)) else None


def _checked(row: Any, where: str) -> Located:
    if not isinstance(row, dict):
        raise FileError(f"{where}: a row is a JSON object, got {type(row).__name__}.")
    return row, where


def _csv(text: str, where: str, delimiter: str) -> Iterator[Located]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise FileError(
                    f"{where}:{reader.line_num}: {len([v for v in row.values() if v is not None])} cells in a table "
                    f"of {len(reader.fieldnames or ())} columns."
                )
            yield dict(row), f"{where}:{reader.line_num}"
    except csv.Error as e:
        raise FileError(f"{where}:{reader.line_num}: not CSV ({e}).") from None


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}, row {number}"
    except (pyarrow.ArrowException, OSError) as e:
        raise FileError(f"{path} is no Parquet file, or damaged: {str(e).splitlines()[0]}") from None


def _data_set(source: str) -> Iterator[Located]:
    """A data set of the hub or a folder; the split after a colon, `train` otherwise."""
    import datasets

    found = HUB.fullmatch(source) if not Path(source).is_dir() else None
    name, split = (found["name"], found["split"] or "train") if found else (source, "train")
    try:
        if (Path(name) / "state.json").is_file():
            data: Any = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, split=split)
    except Exception as e:  # the libraries beneath raise many kinds, all for one reason
        raise FileError(
            f"no data set can be loaded from {source!r}: {(str(e).splitlines() or [type(e).__name__])[0]} "
            f"Give a file: {KINDS}."
        ) from None
    for number, row in enumerate(data, 1):
        yield dict(row), f"{source}, row {number}"
