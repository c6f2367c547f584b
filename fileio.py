"""Everything on disk, under one name: artefacts, rasters, annotation files, and a command line.

python fileio.py doctor RASTER [--rewrite OUT]      measure and mend the layout of a raster
python fileio.py preflight --params params/x.yaml   check the input of a run and plan it
"""

from __future__ import annotations

from artefacts import (
    atomic_path,
    exclusive,
    fingerprint,
    hash_rows,
    identifier_from_tilename,
    is_finished,
    mark_finished,
    recreate_directory,
    write_json,
    write_table,
    write_text,
)
from formats import read_table
from rasters import Raster, Regions, create_raster, read_raster, read_rasters

__all__ = [
    "Raster", "Regions", "atomic_path", "create_raster", "exclusive", "fingerprint", "hash_rows",
    "identifier_from_tilename", "is_finished", "mark_finished", "read_raster", "read_rasters",
    "read_table", "recreate_directory", "write_json", "write_table", "write_text",
]  # fmt: skip
