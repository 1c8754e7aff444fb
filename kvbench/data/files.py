"""Reading data files of all formats, as rows that know their file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kvbench.errors import UserError
from kvbench.parsing import parse_json

Unpack = Callable[[bytes], bytes]
Read = Callable[[bytes, Path, Collection[str]], Iterator["Record"]]


@dataclass(frozen=True)
class Record:
    """A row of a data file.

    Attributes:
        where: file and line, for messages.
        values: values by column; those of columns that were not asked for may be None.
    """

    where: str
    values: dict[str, Any]


def read_records(path: Path, wanted: Collection[str]) -> Iterator[Record]:
    """Read the rows of a data file, or of a folder of plain text files, in order.

    Args:
        wanted: columns that are needed. Plain text has no columns: it is the value of every column in ``wanted``.

    Raises:
        UserError: the file is missing, empty, of an unknown format, damaged, or not UTF-8; or a row is malformed.
    """
    if path.is_dir():
        return _folder(path, wanted)
    raw, read = _opened(path)
    if not raw.strip():
        raise UserError(f"The data file {path} is empty.", f"Give a file with text: {KNOWN}.")
    return read(raw, path, wanted)


def files_of(path: Path) -> list[Path]:
    """The file itself; for a folder, all plain text files in it and its subfolders, sorted by path.

    Links to folders are followed, but no folder is read twice; names that begin with a dot are skipped.

    Raises:
        UserError: the folder has no plain text file, or a subfolder cannot be read.
    """
    if not path.is_dir():
        return [path]
    shown, seen = [], {os.path.realpath(path)}
    for folder, below, names in os.walk(path, onerror=_refuse_folder, followlinks=True):
        inside = {os.path.realpath(Path(folder, n)): n for n in sorted(below, reverse=True) if not n.startswith(".")}
        below[:] = [name for real, name in inside.items() if real not in seen]
        seen.update(inside)
        texts = (Path(folder, n).relative_to(path) for n in names if not n.startswith("."))
        shown += [name for name in texts if _ending(name) == ".txt"]
    if not shown:
        raise UserError(
            f"The data folder {path} cannot be read: it holds no .txt.", f"Give a folder of .txt, or a file: {KNOWN}."
        )
    return [path / name for name in sorted(shown, key=Path.as_posix)]


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(
        f"The data folder {error.filename} cannot be read: {error.strerror}.",
        "Make it readable, or take it out of the folder that is given.",
    ) from error


def split_lines(text: str) -> str:
    """The text with all line ends (of Windows and old Macs too) as ``\\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _opened(path: Path) -> tuple[bytes, Read]:
    """The decompressed content of a file, and the reader of its format."""
    if path.exists() and not path.is_file():
        raise UserError(
            f"The data file {path} cannot be read: it is no regular file, and is read more than once.",
            "Save what comes from it to a file first.",
        )
    ending = _ending(path)
    if ending not in KINDS:
        said = f" ({''.join(path.suffixes[-2:])})" if path.suffix else ""
        raise UserError(f"The data file {path} has no known ending{said}.", f"Known: {KNOWN}.")
    try:
        raw = path.read_bytes()
        return PACKED.get(path.suffix.lower(), bytes)(raw), KINDS[ending]
    except FileNotFoundError:
        raise UserError(f"There is no data file {path}.", "Check the path given to --data.") from None
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"The data file {path} cannot be read: {error}.", DAMAGED) from error


def _ending(path: Path) -> str:
    """The file name ending that gives the format, without that of the compression; empty if there is none."""
    endings = [ending.lower() for ending in path.suffixes]
    return next((ending for ending in reversed(endings[-2:]) if ending not in PACKED), "")


def _folder(path: Path, wanted: Collection[str]) -> Iterator[Record]:
    for file in files_of(path):
        yield from _text(_opened(file)[0], file, wanted, file.relative_to(path).as_posix())


def _decoded(raw: bytes, path: Path) -> str:
    """Decode text, with ``\\n`` as line end.

    Raises:
        UserError: the content is binary, or not UTF-8.
    """
    if b"\0" in raw:
        hint = "Convert it from UTF-16 to UTF-8." if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else f"Known: {KNOWN}."
        raise UserError(f"The data file {path} is binary, not text (byte {raw.index(0)} is 0).", hint)
    try:
        return split_lines(raw.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"The data file {path} is not UTF-8 (line {line}, byte {error.start} of all).", "Convert it to UTF-8."
        ) from None


def _plain(raw: bytes, path: Path, wanted: Collection[str]) -> Iterator[Record]:
    yield from _text(raw, path, wanted, path.name)


def _text(raw: bytes, path: Path, wanted: Collection[str], name: str) -> Iterator[Record]:
    yield Record(str(path), {"id": name, **dict.fromkeys(wanted, _decoded(raw, path))})


def _json_lines(raw: bytes, path: Path, wanted: Collection[str]) -> Iterator[Record]:
    for number, line in enumerate(_decoded(raw, path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _row(_parsed(line, where, "Every line must be one JSON object."), where)


def _json(raw: bytes, path: Path, wanted: Collection[str]) -> Iterator[Record]:
    """One array of rows, or JSON lines, which many ``.json`` files hold."""
    text = _decoded(raw, path)
    if not text.lstrip().startswith("["):
        yield from _json_lines(raw, path, wanted)
        return
    hint = "The file must be one array of JSON objects, or lines of them."
    for number, values in enumerate(_parsed(text, str(path), hint), start=1):
        yield _row(values, f"{path}, row {number}")


def _parsed(text: str, where: str, hint: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        raise UserError(f"{where}{line}: malformed JSON ({error.msg}, column {error.colno}).", hint) from None
    except ValueError as error:
        raise UserError(f"{where}: JSON that cannot be read ({error}).", hint) from None


def _row(values: Any, where: str) -> Record:
    return Record(where, values if isinstance(values, dict) else {})


def _separated(by: str) -> Read:
    def read(raw: bytes, path: Path, wanted: Collection[str]) -> Iterator[Record]:
        text = _decoded(raw, path)
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=by, strict=True)
        header: list[str] = []
        line = 1
        try:
            for fields in rows:
                where, line = f"{path}, line {line}", rows.line_num + 1
                if header and fields:
                    if len(fields) != len(header):
                        raise UserError(
                            f"{where}: the row has {len(fields)} fields, and the first line {len(header)} columns.",
                            "Put a text that holds separators or line ends between double quotes.",
                        )
                    yield Record(where, dict(zip(header, fields, strict=True)))
                elif fields:
                    header = fields
                    _check_names(header, path, wanted)
                    if not {*header} & {*wanted}:
                        _check_separator(text, by, path, wanted)
        except csv.Error as error:
            if not header:
                _check_separator(text, by, path, wanted)
            raise UserError(
                f"{path}, line {line}: malformed {_ending(path)} ({error}).",
                'Put a text that holds separators, line ends or quotes between double quotes, and write " as "".',
            ) from None

    return read


def _check_separator(text: str, by: str, path: Path, wanted: Collection[str]) -> None:
    """Check that the first line is not separated by something else.

    Raises:
        UserError: it is, since that gives the columns that are wanted, or the only ones.
    """
    first = text.lstrip("\n").partition("\n")[0]
    for other, name in _SEPARATORS.items():
        try:
            columns = next(csv.reader([first], delimiter=other, strict=True))
        except csv.Error:
            continue
        if other != by and len(columns) > 1 and ({*columns} & {*wanted} or by not in first):
            ending = {"\t": ".tsv", ",": ".csv"}.get(other)
            raise UserError(
                f"{path} is read as separated by {_SEPARATORS[by]}, and seems to be separated by {name} (its columns "
                f"would be: {', '.join(columns)}).",
                f"Let its name end with {ending}." if ending else "Save it with commas, or with tabs as .tsv.",
            )


def _parquet(raw: bytes, path: Path, wanted: Collection[str]) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(raw))
        names = file.schema_arrow.names
        _check_names(names, path, wanted)
        rows = file.read([name for name in names if name in {"id", *wanted}]).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise UserError(f"The data file {path} cannot be read: {reason}.", DAMAGED) from error
    for number, row in enumerate(rows, start=1):
        yield Record(f"{path}, row {number}", {**dict.fromkeys(names), **row})


def _check_names(names: list[str], path: Path, wanted: Collection[str]) -> None:
    for name in ("id", *wanted):
        if names.count(name) > 1:
            raise UserError(f'The data file {path} has {names.count(name)} columns "{name}".', "Rename one of them.")


def _unpack_streams(start: Callable[[], Any], padding: int = 0) -> Unpack:
    """Make a function that decompresses concatenated streams; the libraries' own ``decompress`` silently ignores a
    damaged stream after the first.

    Args:
        start: creates a decompressor for one stream.
        padding: zero bytes may follow a stream, in multiples of this many.
    """
    def unpack(raw: bytes) -> bytes:
        parts = []
        while raw:
            stream = start()
            parts.append(stream.decompress(raw))
            if not stream.eof:
                raise EOFError("it ends within a packed stream")
            raw = stream.unused_data
            rest = raw.lstrip(b"\0") if padding else raw
            if len(raw) != len(rest) and (len(raw) - len(rest)) % padding == 0:
                raw = rest
        return b"".join(parts)

    return unpack


def _unpack_zst(raw: bytes) -> bytes:
    import pyarrow

    unpacked: bytes = pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), "zstd").read()
    return unpacked


_SEPARATORS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "vertical bars"}
DAMAGED = "It may be damaged; copy it again."
KINDS: dict[str, Read] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _separated(","), ".tsv": _separated("\t"),
    ".parquet": _parquet, ".txt": _plain,
}
PACKED: dict[str, Unpack] = {
    ".gz": gzip.decompress, ".bz2": _unpack_streams(bz2.BZ2Decompressor),
    ".xz": _unpack_streams(lzma.LZMADecompressor, padding=4), ".zst": _unpack_zst,
}
KNOWN = f"{', '.join(KINDS)}, each also packed ({', '.join(PACKED)}), or a folder of .txt"
