"""Reading what runs have left. Whatever is wrong with a file is said in one line."""

import csv
import json
import math
from pathlib import Path
from typing import Any

from ptqsam.errors import AssetError
from ptqsam.report.page.blocks import Table

# a cell of a CSV of ours is a path at most
csv.field_size_limit(1 << 16)


def read_csv(path: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a CSV file.

    Args:
        path: the file.
        columns: that it has to have.

    Raises:
        AssetError: it cannot be read, or lacks a column.
    """
    try:
        with path.open(encoding='utf-8', newline='') as file:
            table = csv.DictReader(file, strict=True)
            rows = [{key: value or '' for key, value in row.items() if key is not None} for row in table]
            known = table.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AssetError(f'{path.name} cannot be read ({error})') from None
    if missing := [column for column in columns if column not in known]:
        raise AssetError(f"{path.name} has no column '{missing[0]}'")
    return rows


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        AssetError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f'{path.name} cannot be read ({error})') from None


def number(text: str) -> float | None:
    """A number of a CSV; None where nothing or no number stands."""
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value


def column(rows: list[dict[str, str]], name: str) -> list[float | None]:
    """Numbers of a column."""
    return [number(row[name]) for row in rows]


def csv_table(caption: str, rows: list[dict[str, str]]) -> Table:
    """A CSV as a folded table; a column is numeric if all that stands in it are numbers."""
    heads = tuple(rows[0]) if rows else ()
    numeric = {head for head in heads if all(number(row[head]) is not None for row in rows if row[head])}
    cells = tuple(tuple(number(row[head]) if head in numeric else row[head] for head in heads) for row in rows)
    return Table(caption, heads, cells, folded=True)
