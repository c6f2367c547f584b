"""Annotation files: what each format holds, read into one kind of table and written back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ImageData import InputError


def read_table(path: Path, text_columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV whose columns may mix numbers and text.

    Args:
        path: The file.
        text_columns: Columns to keep as they are written, so that the label 01 is not 1, and NA
            no missing one; only an empty cell is missing.

    Raises:
        InputError: The file is missing, empty, or not a table.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"annotation table {path} does not exist; check DF_DIR and DF_FILENAMES")
    try:
        df = pd.read_csv(
            path, low_memory=False, keep_default_na=False, na_values=[""],
            dtype=dict.fromkeys(text_columns, str),
        )  # fmt: skip
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty; expected a header and a row per object") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table in UTF-8: {error}") from error
    if df.empty:
        raise InputError(f"{path} has the columns {list(df.columns)} but no row")
    return df
