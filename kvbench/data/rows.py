"""Rows of text: from a data file or from the Hugging Face hub, each with an id."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from kvbench.data.files import Record, read_records, split_lines
from kvbench.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from kvbench.data.tasks import CorpusSpec

TEXT = "text"
"""Default name of the column that holds the text."""

_HALF = re.compile("[\ud800-\udfff]")


class Row(TypedDict):
    """One text with ``\\n`` as line end, and its id; ids may repeat."""

    id: str
    text: str


def read_rows(path: Path, column: str = TEXT) -> list[Row]:
    """Read the texts of a data file (see :mod:`kvbench.data.files`) or of a folder of plain text files.

    Args:
        column: name of the column that holds the text.

    Raises:
        UserError: the file cannot be read, or a row has no text in that column.
    """
    rows: list[Row] = []
    for record in read_records(path, (column,)):
        rows.append({"id": id_of(record, len(rows)), "text": text_of(record, column)})
    return rows


def hub_rows(spec: CorpusSpec, column: str = TEXT) -> list[Row]:
    """Read the texts of a data set on the hub; ids are row numbers.

    Raises:
        UserError: the data set cannot be loaded, or has no texts in that column.
    """
    dataset = _hub_dataset(spec)
    if column not in dataset.column_names:
        raise UserError(
            f'{spec.hub} has no column "{column}" (it has: {", ".join(dataset.column_names)}).',
            f"{did_you_mean(column, dataset.column_names)}Name the column that holds the text with --column.",
        )
    records = (Record(f"{spec.hub}, row {i}", row) for i, row in enumerate(dataset.select_columns([column])))
    return [{"id": f"{i:05d}", "text": text_of(record, column)} for i, record in enumerate(records)]


def hub_records(spec: CorpusSpec) -> Iterator[Record]:
    """Read the rows of a data set on the hub, with all their columns.

    Raises:
        UserError: the data set cannot be loaded.
    """
    return (Record(f"{spec.hub}, row {i}", dict(row)) for i, row in enumerate(_hub_dataset(spec)))


def _hub_dataset(spec: CorpusSpec) -> Any:
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the error below says it once
    try:
        some = {spec.split: spec.files} if spec.files else None
        dataset = load_dataset(spec.hub, spec.config, split=spec.split, data_files=some)
    except Exception as error:  # the library raises a different type for each way to be offline
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"Cannot load {spec.hub} from the Hugging Face hub ({type(error).__name__}: {reason}).",
            "Check the network, or give a local copy with --data.",
        ) from error
    return dataset


def text_of(record: Record, column: str) -> str:
    """The text in a column of a row.

    Raises:
        UserError: there is no such column, or its value is not a text.
    """
    if column not in record.values:
        there = f"it has: {', '.join(record.values)}" if record.values else "it is no object with columns"
        raise UserError(
            f'{record.where}: the row has no "{column}" of type string ({there}).',
            f"{did_you_mean(column, map(str, record.values))}Name the column that holds the text with --column, or "
            'write rows like {"text": "..."}.',
        )
    value = record.values[column]
    if not isinstance(value, str):
        raise UserError(
            f'{record.where}: the row has no "{column}" of type string (it is {_kind(value)}).',
            "Every row must have a text in that column, which may be empty.",
        )
    return checked_text(value, f'{record.where}: the "{column}"')


def checked_text(text: str, what: str) -> str:
    """The text with ``\\n`` as line end.

    Raises:
        UserError: it contains half of a surrogate pair, which cannot be encoded as UTF-8.
    """
    half = _HALF.search(text)
    if half is not None:
        raise UserError(
            f"{what} holds half of a surrogate pair (\\u{ord(half.group()):04x}, character {half.start()}), which is "
            "no text.", "Write the data again, with whole characters.",
        )
    return split_lines(text)


def id_of(record: Record, number: int) -> str:
    """The id of a row; its number among the rows if it has none.

    Raises:
        UserError: the id is neither a text nor a number.
    """
    value = record.values.get("id", f"{number:05d}")
    is_name = value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    if not is_name:
        raise UserError(
            f'{record.where}: the "id" is {_kind(value)}, not a text or a number.',
            "Give every row a name of its own, or none.",
        )
    name = str(value)
    checked_text(name, f'{record.where}: the "id"')
    return name


def _kind(value: Any) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "int": "a number", "bool": "true or false"}
    if isinstance(value, float):
        return "a number" if math.isfinite(value) else f"{value}"
    return names.get(type(value).__name__, type(value).__name__)
