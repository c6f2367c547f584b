"""Everything on disk, under one name: artefacts, rasters, annotation files, and a command line.

python fileio.py doctor RASTER... [--rewrite OUT]   measure and mend the layout of rasters
python fileio.py preflight --params params/x.yaml   check the input of a run and plan it
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from artefacts import (
    FullDiskError,
    Journal,
    address_of,
    append_line,
    atomic_path,
    content_fingerprint,
    exclusive,
    fingerprint,
    hash_rows,
    identifier_from_tilename,
    is_finished,
    mark_finished,
    recreate_directory,
    remove_strays,
    terminable,
    this_machine,
    write_json,
    write_table,
    write_text,
    writing,
)
from formats import (
    ANNOTATION_SUFFIXES,
    PIXEL_COLUMNS,
    X_COLUMNS,
    AnnotationFile,
    annotation_writer,
    files_of,
    read_annotation_file,
    read_colormap,
    read_table,
    scale_pixels,
    write_annotations,
)
from ImageData import InputError
from layout import check_layout, diagnose, raster_fingerprint, rewrite
from rasters import (
    PNG_SIDE,
    Raster,
    Regions,
    check_kinds,
    create_png,
    create_raster,
    on_grid,
    read_raster,
    read_rasters,
    resampled,
    resolution_range,
)

__all__ = [
    "ANNOTATION_SUFFIXES", "PIXEL_COLUMNS", "PNG_SIDE", "X_COLUMNS", "AnnotationFile",
    "FullDiskError", "Journal", "Raster", "Regions", "address_of", "annotation_writer",
    "append_line", "atomic_path", "check_kinds", "check_layout", "content_fingerprint",
    "create_png", "create_raster", "diagnose", "exclusive", "files_of", "fingerprint", "hash_rows",
    "identifier_from_tilename", "is_finished", "main", "mark_finished", "on_grid",
    "raster_fingerprint", "read_annotation_file", "read_colormap", "read_raster", "read_rasters",
    "read_table", "recreate_directory", "remove_strays", "resampled", "resolution_range", "rewrite",
    "scale_pixels", "terminable", "this_machine", "write_annotations", "write_json", "write_table",
    "write_text", "writing",
]  # fmt: skip

DOCTOR_EXIT = 3  # a raster reads slowly and was not rewritten


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; `python fileio.py --help` tells all."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["preflight"]:
        return _preflight(argv[1:])
    args = _parser().parse_args(argv)
    try:
        return _doctor(args.rasters, args.rewrite, args.seconds)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fileio.py", description="Check what a run reads.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor", help="measure how fast windows of rasters read, and mend their layout",
        description="Report the layout of rasters, the windows of 256 px that are read of them "
        "per second, and how many are expected of a tiled copy; both are measured.",
        epilog="Exit code: 0 healthy or rewritten; 1 a raster cannot be used, the message says "
        f"why; 2 the command is not understood; {DOCTOR_EXIT} a raster should be rewritten.",
    )  # fmt: skip
    doctor.add_argument(
        "rasters", nargs="+", metavar="RASTER",
        help="a file, or an address (https://, s3://, gs://, az://)",
    )  # fmt: skip
    doctor.add_argument(
        "--rewrite", metavar="OUT", type=Path,
        help="write a tiled, compressed GeoTIFF with overviews and measure it as well; a file, or "
        "for several rasters a folder",
    )  # fmt: skip
    doctor.add_argument(
        "--seconds", type=float, default=1.0, help="how long to read each (default: %(default)s)"
    )
    commands.add_parser("preflight", help="check the input of a run and plan it", add_help=False)
    return parser


def _doctor(rasters: Sequence[str], out: Path | None, seconds: float) -> int:
    code, into_folder = 0, out is not None and (len(rasters) > 1 or out.is_dir())
    for raster in map(read_raster, rasters):
        diagnosis = diagnose(raster, seconds=seconds)
        sys.stdout.write(diagnosis.report())
        if out is not None:
            copy = rewrite(raster, out / f"{raster.identifier}.tif" if into_folder else out)
            after = diagnose(read_raster(copy), seconds=seconds)
            sys.stdout.write(
                f"  rewritten to {copy}: {diagnosis.windows_per_second:.3g} windows per second "
                f"before, {after.windows_per_second:.3g} after\n"
            )
        elif diagnosis.advisable:
            code = DOCTOR_EXIT
    return code


def _preflight(argv: Sequence[str]) -> int:
    # It plans whole runs and so stands far above this module, which must not import it: it is
    # run as the program that it is.
    program = Path(__file__).with_name("preflight.py")
    before, sys.argv = sys.argv, [str(program), *argv]
    try:
        runpy.run_path(str(program), run_name="__main__")
    except SystemExit as done:
        if isinstance(done.code, str):
            sys.stderr.write(f"{done.code}\n")
            return 1
        return done.code or 0
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
