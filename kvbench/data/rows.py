"""Rows of text: from a data file or from the Hugging Face hub, each with an id."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from kvbench.data.files import Record, read_records, split_lines
from kvbench.errors import UserError

if TYPE_CHECKING:
    from kvbench.data.tasks import CorpusSpec

TEXT = "text"
"""The column that holds the text, where nothing else is said."""

_HALF = re.compile("[\ud800-\udfff]")


class Row(TypedDict):
    """One text, whose lines end with ``\\n``; ids may repeat."""

    id: str
    text: str


def read_rows(path: Path, column: str = TEXT) -> list[Row]:
    """The texts of a data file (see :mod:`kvbench.data.files`) or of a folder of plain texts.

    Args:
        column: what the text is called in it.

    Raises:
        UserError: the file cannot be read, or a row has no text in that column.
    """
    rows: list[Row] = []
    for record in read_records(path, (column,)):
        rows.append({"id": id_of(record, len(rows)), "text": text_of(record, column)})
    return rows


def hub_rows(spec: CorpusSpec, column: str = TEXT) -> list[Row]:
    """The rows of a data set on the hub, numbered.

    Raises:
        UserError: it cannot be reached, or has no texts.
    """
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the sentence below says it once
    try:
        some = {spec.split: spec.files} if spec.files else None
        dataset = load_dataset(spec.hub, spec.config, split=spec.split, data_files=some)
    except Exception as error:  # the library raises a different type for each way to be offline
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"Cannot load {spec.hub} from the Hugging Face hub ({type(error).__name__}: {reason}).",
            "Check the network, or give a local copy with --data.",
        ) from error
    if column not in dataset.column_names:
        raise UserError(
            f'{spec.hub} has no column "{column}" (it has: {", ".join(dataset.column_names)}).',
            "Name the column that holds the text with --column.",
        )
    records = (Record(f"{spec.hub}, row {i}", row) for i, row in enumerate(dataset.select_columns([column])))
    return [{"id": f"{i:05d}", "text": text_of(record, column)} for i, record in enumerate(records)]


def text_of(record: Record, column: str) -> str:
    """The text in a column of a row.

    Raises:
        UserError: there is no such column, or no text in it.
    """
    if column not in record.values:
        there = f"it has: {', '.join(record.values)}" if record.values else "it is no object with columns"
        raise UserError(
            f'{record.where}: the row has no "{column}" of type string ({there}).',
            'Name the column that holds the text with --column, or write rows like {"text": "..."}.',
        )
    value = record.values[column]
    if not isinstance(value, str):
        raise UserError(
            f'{record.where}: the row has no "{column}" of type string (it is {_kind(value)}).',
            "Every row must have a text in that column, which may be empty.",
        )
    return checked_text(value, f'{record.where}: the "{column}"')


def checked_text(text: str, what: str) -> str:
    """The text with ``\\n`` at the ends of its lines.

    Raises:
        UserError: it holds half a character, and cannot be written as UTF-8.
    """
    half = _HALF.search(text)
    if half is not None:
        raise UserError(
            f"{what} holds half of a surrogate pair (\\u{ord(half.group()):04x}, character {half.start()}), which is "
            "no text.", "Write the data again, with whole characters.",
        )
    return split_lines(text)


def id_of(record: Record, number: int) -> str:
    """What a row calls itself; otherwise its number among the rows.

    Raises:
        UserError: its id is no name.
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
