"""The loss curves of a run: written as CSV and JSON while it trains, read back, watched from elsewhere."""

import math
from pathlib import Path

from ks.errors import UsageError
from ks.files import columns
from ks.files.atomic import finite, write_csv, write_json
from ks.files.layout import RunFiles
from ks.files.rows import read_table


def write_curves(files: RunFiles, rows: list[dict]) -> None:
    """Write the curves of one run as CSV and JSON.

    Args:
        files: of the run.
        rows: one dict per finished epoch, with the keys of `ks.files.columns.CURVES`; grad_norm and population_loss
            may be missing. Further keys are metrics.
    """
    shown = [column for column in columns.CURVES if column.name != "grad_norm" or (rows and "grad_norm" in rows[0])]
    metrics = columns.metric_names(rows)
    write_csv(files.curves_csv, [*columns.names(shown), *metrics], rows)
    keys = {column.name: column.plural for column in shown if column.name != "rank"} | dict(zip(metrics, metrics))
    lists = {key: [row.get(name) for row in rows] for name, key in keys.items()}
    write_json(files.curves_json, {"rank": files.rank, **lists})


def read_curves(path, rank: int | None = None) -> list[dict]:
    """Read a loss-curves CSV, ours or one of the 2025 ksmm scripts (`epoch,train_loss,val_loss,rank`).

    Args:
        path: of the file.
        rank: that its rows must have; any if None.
    Returns:
        one dict per epoch; epoch, rank and segment are integers, the rest, with the metrics, floats (NaN for an empty
        or non-finite cell).
    Raises:
        UsageError: the file cannot be read, columns are missing, a cell is not a number of its range, or the rank is
            another one.
    """
    needed = ("epoch", "train_loss", "val_loss", "rank")
    rows = read_table(path, columns.CURVES, needed, filled=("epoch", "rank"), metrics=True, what="loss curves")
    others = {row["rank"] for row in rows} - {rank}
    if rank is not None and others:
        raise UsageError(f"{path} holds curves of rank {min(others)}, not {rank}")
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def curves_if_any(path) -> list[dict]:
    """Return `read_curves(path)`, or an empty list if the file is missing or cannot be read."""
    try:
        return read_curves(path)
    except UsageError:
        return []


def long_form(rank: int, seed: int | None, curves: list[dict]) -> list[dict]:
    """Return the curves of one run as rows of `ks.files.columns.ALL_CURVES`, one for each epoch and split.

    The rows of the validation split have the metrics too.
    """
    metrics = columns.metric_names(curves)
    losses = {"train": "train_loss", "validation": "val_loss", "population": "population_loss"}
    return [
        {"rank": rank, "seed": seed, "epoch": row["epoch"], "split": split, "loss": row[name]}
        | {"lr": row.get("lr"), "seconds": row.get("epoch_seconds")}
        | ({name: row.get(name) for name in metrics} if split == "validation" else {})
        for row in curves
        for split, name in losses.items()
        if finite(row.get(name)) is not None
    ]


class CurvesTail:
    """The epochs and the last losses in a curves CSV that another process writes; read only when it has changed.

    Args:
        path: of the file, which may not exist yet.

    `epochs` is their number; `val_loss` and `population_loss` are the last known ones, or None.
    """

    def __init__(self, path: Path):
        self.path, self.epochs = path, 0
        self.val_loss: float | None = None
        self.population_loss: float | None = None
        self._stamp: tuple[int, int] | None = None

    def update(self) -> None:
        """Read the file again if it has changed; a file that cannot be read changes nothing."""
        try:
            status = self.path.stat()
        except OSError:
            return
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp == self._stamp or not (rows := curves_if_any(self.path)):
            return
        self._stamp, self.epochs = stamp, len(rows)
        self.val_loss = finite(rows[-1]["val_loss"])
        known = (finite(row.get("population_loss")) for row in reversed(rows))
        self.population_loss = next((loss for loss in known if loss is not None), None)
