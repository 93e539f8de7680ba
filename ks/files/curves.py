"""The loss curves of a run: written as CSV and JSON after every epoch, read back, counted without parsing."""

import csv
import math
from pathlib import Path

from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import finite, write_csv, write_json
from ks.files.layout import RunFiles

REQUIRED = columns.names(columns.CURVES[:4])  # all that the curves of the 2025 ksmm scripts have


def write_curves(files: RunFiles, rows: list[dict]) -> None:
    """Write the curves of one run as CSV and JSON.

    Args:
        files: of the run.
        rows: one dict per finished epoch, with the keys of `ks.files.columns.CURVES`; grad_norm and population_loss
            may be missing.
    """
    shown = [column for column in columns.CURVES if column.name != "grad_norm" or (rows and "grad_norm" in rows[0])]
    write_csv(files.curves_csv, columns.names(shown), rows)
    lists = {column.plural: [row.get(column.name) for row in rows] for column in shown if column.name != "rank"}
    write_json(files.curves_json, {"rank": files.rank, **lists})


def read_curves(path) -> list[dict]:
    """Read a loss-curves CSV, ours or one of the 2025 ksmm scripts (`epoch,train_loss,val_loss,rank`).

    Returns:
        one dict per epoch; epoch and rank are integers, the rest floats (NaN for an empty cell).
    Raises:
        UsageError: the file cannot be read, columns are missing, or a cell is not a number.
    """
    path = Path(path)
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in REQUIRED if name not in (reader.fieldnames or [])]
            if missing:
                raise UsageError(f"{path} lacks the columns {', '.join(missing)}")
            try:
                rows = [{name: float(cell) if cell else math.nan for name, cell in row.items()} for row in reader]
                return [row | {"epoch": int(row["epoch"]), "rank": int(row["rank"])} for row in rows]
            except (TypeError, ValueError, OverflowError, csv.Error) as error:
                raise UsageError(f"{path}, line {reader.line_num}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from error


def curves_if_any(path) -> list[dict]:
    """Return `read_curves(path)`, or an empty list if the file is missing or cannot be read."""
    try:
        return read_curves(path)
    except UsageError:
        return []


def long_form(rank: int, seed: int | None, curves: list[dict]) -> list[dict]:
    """Return the curves of one run as rows of `ks.files.columns.ALL_CURVES`, one for each epoch and split."""
    losses = {"train": "train_loss", "validation": "val_loss", "population": "population_loss"}
    return [
        {"rank": rank, "seed": seed, "epoch": row["epoch"], "split": split, "loss": row[name]}
        | {"lr": row.get("lr"), "seconds": row.get("epoch_seconds")}
        for row in curves
        for split, name in losses.items()
        if finite(row.get(name)) is not None
    ]


class EpochCounter:
    """Counts the epochs in a curves CSV that another process writes, without parsing it.

    Args:
        path: of the file, which may not exist yet.
    """

    def __init__(self, path: Path):
        self.path, self._epochs = path, 0
        self._stamp: tuple[int, int] | None = None

    def __call__(self) -> int:
        """Return the number of finished epochs; the file is read only if it has changed."""
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                self._epochs = max(0, self.path.read_bytes().count(b"\n") - 1)  # less the header
                self._stamp = stamp
        except OSError:
            return 0
        return self._epochs
