"""What a study leaves on disk: names, columns, atomic writes, reading back. Plain csv and json, no pandas."""

import csv
import glob
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

CURVE_COLUMNS = ("epoch", "train_loss", "val_loss", "rank", "population_loss", "lr", "epoch_seconds")
# Names of the same columns as lists in the JSON file.
CURVE_LISTS = {"epoch": "epochs", "train_loss": "train_losses", "val_loss": "val_losses"}
CURVE_LISTS |= {"population_loss": "population_losses", "lr": "lrs", "grad_norm": "grad_norms"}
SUMMARY_COLUMNS = (
    "rank",
    "final_train_loss",
    "final_val_loss",
    "min_train_loss",
    "min_val_loss",
    "min_train_epoch",
    "min_val_epoch",
    "num_epochs",
    "status",
    "population_loss",
    "loss_floor",
    "loss_floor_upper",
    "loss_floor_is_exact",
    "optimality_gap",
    "excess",
    "relative_loss",
    "parameters",
    "compression_ratio",
    "saturated",
    "verdict",
    "num_seeds",
    "final_train_loss_se",
    "final_val_loss_se",
    "population_loss_se",
    "train_seconds",
)
RUN_COLUMNS = ("rank", "seed", *SUMMARY_COLUMNS[1:10], "train_seconds")
ALL_CURVES_COLUMNS = ("rank", "seed", "epoch", "split", "loss", "lr", "seconds")
FLOOR_COLUMNS = ("chain", "rank", "parameters", "loss_floor", "relative_loss")


@dataclass(frozen=True)
class RunFiles:
    """The files of one training run: `prefix` names them, `directory` holds them."""

    directory: Path
    prefix: str
    rank: int

    def _path(self, ending: str) -> Path:
        return self.directory / f"{self.prefix}_{ending}"

    @property
    def curves_csv(self) -> Path:
        return self._path(f"rank_{self.rank}_loss_curves.csv")

    @property
    def curves_json(self) -> Path:
        return self._path(f"rank_{self.rank}_loss_curves.json")

    @property
    def final(self) -> Path:
        return self._path("final.pth")

    @property
    def best(self) -> Path:
        return self._path("best.pth")

    @property
    def resume(self) -> Path:
        return self._path("resume.pth")

    @property
    def lock(self) -> Path:
        return self.directory / f".{self.prefix}.lock"

    @property
    def config(self) -> Path:
        return self._path("config.json")

    @property
    def training_log(self) -> Path:
        return self._path("training_log.json")

    @property
    def log(self) -> Path:
        return self.directory / "train.log"

    def epoch_checkpoint(self, epoch: int) -> Path:
        return self._path(f"epoch_{epoch}.pth")

    def remove(self) -> None:
        """Delete what an earlier run of the same name left, its epoch checkpoints too."""
        stale = [self.curves_csv, self.curves_json, self.final, self.best, self.config, self.training_log, self.resume]
        for path in stale + list(self.directory.glob(f"{glob.escape(self.prefix)}_epoch_*.pth")):
            path.unlink(missing_ok=True)


def rank_files(output_dir, rank: int, seed: int | None = None) -> RunFiles:
    """The files of one rank of a sweep: in rank_R, or for a further seed in rank_R/seed_S."""
    folder = Path(output_dir) / f"rank_{rank}"
    return RunFiles(folder if seed is None else folder / f"seed_{seed}", f"rank_{rank}", rank)


@dataclass(frozen=True)
class SweepFiles:
    """The files of a sweep beside its rank folders."""

    directory: Path
    prefix: str

    @property
    def summary_csv(self) -> Path:
        return self.directory / f"{self.prefix}_summary.csv"

    @property
    def summary_json(self) -> Path:
        return self.directory / f"{self.prefix}_summary.json"

    @property
    def runs_csv(self) -> Path:
        return self.directory / f"{self.prefix}_runs.csv"

    @property
    def all_curves_csv(self) -> Path:
        return self.directory / f"{self.prefix}_all_curves.csv"

    @property
    def lock(self) -> Path:
        return self.directory / ".sweep.lock"

    @property
    def floor_csv(self) -> Path:
        return self.directory / f"{self.prefix}_floor.csv"

    @property
    def config(self) -> Path:
        return self.directory / f"{self.prefix}_config.json"

    def remove_outputs(self) -> None:
        """Delete summary, runs and figures of an earlier sweep: nothing may outlive the results it was made of."""
        for path in (self.summary_csv, self.summary_json, self.runs_csv, self.all_curves_csv):
            path.unlink(missing_ok=True)
        for name in ("loss_curves", "final_losses", "floor"):
            for suffix in ("png", "svg", "pdf"):
                self.figure(name, suffix).unlink(missing_ok=True)

    def figure(self, name: str, suffix: str = "png") -> Path:
        return self.directory / f"{self.prefix}_{name}.{suffix}"


@contextmanager
def atomic_path(path):
    """A temporary path in the folder of `path`; what was written there replaces `path` in one step, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value):
    """The value with every NaN or infinity in it replaced by None: JSON has no such numbers, CSV gets an empty cell."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


def save_tensors(value, path) -> None:
    """torch.save, atomically; a full disk is an OSError."""
    import torch

    buffer = io.BytesIO()  # torch's own file writer raises an unspecific RuntimeError
    torch.save(value, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_json(path, value) -> None:
    """Write JSON atomically; NaN and infinities become null."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=2, allow_nan=False, default=str) + "\n")


def write_csv(path, columns, rows) -> None:
    """Write dicts as CSV atomically; missing, None and non-finite cells are empty."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(finite(row) for row in rows)


def write_curves(files: RunFiles, rows: list[dict]) -> None:
    """Write the curves of one run as CSV and JSON.

    Args:
        files: where.
        rows: one dict per finished epoch with the keys of `CURVE_COLUMNS` and, where asked for, grad_norm; losses in
            squared units of the output, times in seconds; population_loss only where it was computed.
    """
    columns = [*CURVE_COLUMNS, *(["grad_norm"] if rows and "grad_norm" in rows[0] else [])]
    write_csv(files.curves_csv, columns, rows)
    plurals = {name: CURVE_LISTS.get(name, name) for name in columns if name != "rank"}
    curves = {plural: [row.get(name) for row in rows] for name, plural in plurals.items()}
    write_json(files.curves_json, {"rank": files.rank, **curves})


def all_curves_rows(rank: int, seed: int, curves: list[dict]) -> list[dict]:
    """Curves of one run in long form: a row for each epoch and split (train, validation, population where computed)."""
    columns = {"train": "train_loss", "validation": "val_loss", "population": "population_loss"}
    return [
        {"rank": rank, "seed": seed, "epoch": row["epoch"], "split": split, "loss": row[column]}
        | {"lr": row.get("lr"), "seconds": row.get("epoch_seconds")}
        for row in curves
        for split, column in columns.items()
        if finite(row.get(column)) is not None
    ]


def read_json(path) -> dict | list | None:
    """Parse a JSON file; None if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def read_curves(path) -> list[dict]:
    """Read a loss-curves CSV, ours or one of the 2025 scripts (`epoch,train_loss,val_loss,rank`).

    Returns:
        one dict per epoch: epoch and rank are integers, the rest floats (NaN where the cell is empty).
    Raises:
        ValueError: columns missing, or a cell that is not a number.
    """
    path = Path(path)
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in CURVE_COLUMNS[:4] if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        try:
            rows = [{name: float(cell) if cell else math.nan for name, cell in row.items()} for row in reader]
            return [row | {"epoch": int(row["epoch"]), "rank": int(row["rank"])} for row in rows]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def curves_if_any(path) -> list[dict]:
    """`read_curves`, but empty where the file is missing or cannot be read."""
    try:
        return read_curves(path)
    except (OSError, ValueError):
        return []


def find_runs(results_dir) -> list[tuple[int, int | None]]:
    """(rank, seed) of every run folder of a sweep, ascending; the first seed's is rank_R itself: None."""
    found = []
    for folder in Path(results_dir).glob("rank_*"):
        rank = folder.name.removeprefix("rank_")
        if not folder.is_dir() or not rank.isdigit():
            continue
        seeds = [path.name.removeprefix("seed_") for path in folder.glob("seed_*")]
        found += [(int(rank), seed) for seed in [None, *sorted(int(seed) for seed in seeds if seed.isdigit())]]
    return sorted(found, key=lambda run: run[0])


def find_curves(results_dir) -> dict[tuple[int, int | None], Path]:
    """The curves files of a results folder by (rank, seed) as `find_runs` names them."""
    paths = {run: rank_files(results_dir, *run).curves_csv for run in find_runs(results_dir)}
    return {run: path for run, path in paths.items() if path.is_file()}


def write_summary(files: SweepFiles, rows: list[dict]) -> None:
    """Write the summary of a sweep as CSV and as JSON (a list of the same rows)."""
    write_csv(files.summary_csv, SUMMARY_COLUMNS, rows)
    write_json(files.summary_json, [{name: row.get(name) for name in SUMMARY_COLUMNS} for row in rows])


def prepare_output_dir(path) -> Path:
    """Create the folder and prove that it can be written.

    Returns:
        the absolute path.
    Raises:
        ValueError: it cannot be created or written, with the reason.
    """
    path = Path(path).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output folder {path} cannot be written: {error.strerror}") from error
    return path


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")


def provenance() -> dict:
    """Command line, versions, host, devices and git revision, for config files."""
    import torch

    root = Path(__file__).resolve().parent
    found = {
        "command": [sys.executable, *sys.argv],
        "started": now(),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "git_revision": _output_of(["git", "describe", "--always", "--dirty", "--abbrev=12"], root),
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": (_output_of(query, root) or "").split("\n")[0] or None,
        }
    return found


def peak_memory(device) -> dict:
    """Peak memory of this process so far in MiB: of the host, and of its CUDA device."""
    import resource

    import torch

    unit = 2**10 if sys.platform != "darwin" else 2**20  # getrusage counts in KiB on Linux, in bytes on macOS
    found = {"peak_host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        found["peak_gpu_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output_of(command: list[str], folder: Path) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
