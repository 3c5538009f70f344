"""Tables as spreadsheets save them, row by row: CSV and TSV with their separator found out, and Excel's .xlsx."""

import csv
import datetime
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from configs.preparation.encoding import find_encoding
from configs.settings import say

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def no_twins(names: list[str]) -> None:
    """Raise ValueError for two columns of one name: one of them would silently hide the other."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two columns are named {twice!r}; rename one (columns: {', '.join(names)})")


def read_csv(path: Path) -> Iterator[tuple[str, object]]:
    """(place, row) of a .csv or .tsv file; the separator is said where the name of the file does not say it.

    Raises: ValueError for a quote that is not closed, or two columns of one name.
    """
    csv.field_size_limit(sys.maxsize)
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding=find_encoding(path), newline="") as file:
        first = file.readline()
        told = re.fullmatch(r'"?sep=(.)"?\s*', first)  # what Excel writes, and hides
        if not told:
            file.seek(0)
        separator = told[1] if told else sniff(first, usual)
        if separator != usual:
            say(f"note: {path} is separated by {SEPARATORS.get(separator, repr(separator))}, and read so")
        # strict, or a quote that is never closed would swallow the rows behind it
        before = 1 if told else 0  # lines that the reader does not count
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            no_twins([name for name in reader.fieldnames if name])
            yield from ((f"{path.name} line {reader.line_num + before}", row) for row in reader)
        except csv.Error as error:
            raise ValueError(
                f"line {reader.line_num + before}: {error}; is a quote not closed, or not doubled?"
            ) from error


def sniff(header: str, usual: str) -> str:
    """The separator of a table, from its line of names: the texts below hold commas and semicolons of their own."""
    try:
        return csv.Sniffer().sniff(header, delimiters="".join(SEPARATORS)).delimiter
    except csv.Error:  # one column
        return usual


# --- Excel


def read_xlsx(path: Path) -> Iterator[tuple[str, object]]:
    """(place, row) of the first sheet of a workbook that holds rows; its first row that is not empty has the names.

    A cell is the text that the sheet shows: 42 for 42.0, 5% for 0.05, 2024-01-31; None where it is empty.
    Raises: ValueError where the file is no workbook, or has two columns of one name.
    """
    import openpyxl

    book = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a sheet has beside its cells
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = {}
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # some programs write a size that is too small
            if next(filled(sheet), None):
                sheets[sheet.title] = sheet
        if not sheets:
            return
        name, sheet = next(iter(sheets.items()))
        if len(sheets) > 1:
            say(f"note: of {path}, the first sheet is read ({name}); not read: {', '.join(list(sheets)[1:])}")
        rows = filled(sheet)
        _, names = next(rows)
        names = [(cell or "").strip() for cell in names]
        no_twins([name for name in names if name])
        for number, cells in rows:
            cells += [None] * (len(names) - len(cells))
            yield f"{path.name} row {number}", {n: cell for n, cell in zip(names, cells, strict=False) if n}
    except (zipfile.BadZipFile, zlib.error, KeyError, SyntaxError, EOFError, TypeError, AttributeError) as error:
        why = "it is no workbook, or is damaged or has a password; save it anew as .xlsx, or as CSV UTF-8"
        raise ValueError(why) from error
    finally:
        if book:
            book.close()


def filled(sheet) -> Iterator[tuple[int, list[str | None]]]:
    """(number, texts) of each row of a sheet in which a cell is filled."""
    for number, row in enumerate(sheet.iter_rows(), 1):
        texts = [cell_text(cell) for cell in row]
        if any(texts):
            yield number, texts


def cell_text(cell) -> str | None:
    """The text of a cell, as near to what the sheet shows as its format is simple."""
    from openpyxl.utils.escape import unescape

    value = cell.value
    if value is None or cell.data_type == "e":  # an error such as #N/A is no text
        return None
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        return f"{100 * value:.15g}%" if "%" in cell.number_format else f"{value:.15g}"
    if isinstance(value, datetime.datetime):
        return str(value.date() if value.time() == datetime.time() else value)
    # the format has \r as _x000D_, which some programs write in front of every line break
    return unescape(str(value)).replace("\r\n", "\n")
