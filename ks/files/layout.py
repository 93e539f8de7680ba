"""Names of the files of a run and of a sweep, and the runs that a results folder holds."""

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FIGURES = ("loss_curves", "final_losses", "floor", "gap", "front", "latency")
FIGURE_FORMATS = ("png", "svg", "pdf")


def metric_figure(metric: str) -> str:
    """Return the name of the figure of a metric."""
    return f"metric_{metric}"


def _file(name: str) -> property:
    """Return a property with the path of a file; the name may hold the fields of its object in braces."""
    return property(lambda files: files.directory / name.format(**vars(files)))


@dataclass(frozen=True)
class RunFiles:
    """The files of one run, in `directory`."""

    directory: Path
    prefix: str
    rank: int

    curves_csv = _file("{prefix}_rank_{rank}_loss_curves.csv")
    curves_json = _file("{prefix}_rank_{rank}_loss_curves.json")
    final = _file("{prefix}_final.pth")
    best = _file("{prefix}_best.pth")
    resume = _file("{prefix}_resume.pth")
    config = _file("{prefix}_config.json")
    training_log = _file("{prefix}_training_log.json")
    log = _file("train.log")
    lock = _file(".{prefix}.lock")

    def epoch_checkpoint(self, epoch: int) -> Path:
        return self.directory / f"{self.prefix}_epoch_{epoch}.pth"

    def results(self) -> list[Path]:
        """Return the files that the trainer writes, without its epoch checkpoints and its lock."""
        curves = [self.curves_csv, self.curves_json]
        return [*curves, self.final, self.best, self.resume, self.config, self.training_log]

    def all(self) -> list[Path]:
        """Return `results` and the log, which the sweep writes."""
        return [*self.results(), self.log]

    def epoch_checkpoints(self) -> list[Path]:
        """Return the epoch checkpoints that exist."""
        return sorted(self.directory.glob(f"{glob.escape(self.prefix)}_epoch_*.pth"))


def run_files(output_dir, rank: int, seed: int | None, first_seed: int | None) -> RunFiles:
    """Return the files of one run of a sweep.

    The first seed's files are in rank_R itself and those of a further seed in rank_R/seed_S, so that adding seeds moves
    nothing.
    """
    folder = Path(output_dir) / f"rank_{rank}"
    return RunFiles(folder if seed == first_seed else folder / f"seed_{seed}", f"rank_{rank}", rank)


def find_runs(results_dir, first_seed: int | None = None) -> list[tuple[int, int | None, RunFiles]]:
    """Return (rank, seed, files) of every run folder of a sweep, by rank.

    Args:
        results_dir: the folder of the sweep.
        first_seed: the seed of the runs in rank_R itself, None if unknown.
    """
    found = []
    for folder in Path(results_dir).glob("rank_*"):
        rank = folder.name.removeprefix("rank_")
        if not folder.is_dir() or not (rank.isascii() and rank.isdigit()):
            continue
        names = [path.name.removeprefix("seed_") for path in folder.glob("seed_*")]
        further = sorted(int(name) for name in names if name.isascii() and name.isdigit())
        for seed in (first_seed, *further):
            found.append((int(rank), seed, run_files(results_dir, int(rank), seed, first_seed)))
    return sorted(found, key=lambda run: run[0])


def layer_folder(output_dir: Path, layer: str) -> Path:
    """Return the results folder of one layer of a checkpoint."""
    return output_dir / layer.replace("/", "_").lstrip(".")


@dataclass(frozen=True)
class SweepFiles:
    """The files of a sweep besides its rank folders, in `directory`; `metrics` are those that it draws."""

    directory: Path
    prefix: str
    metrics: tuple[str, ...] = ()

    summary_csv = _file("{prefix}_summary.csv")
    summary_json = _file("{prefix}_summary.json")
    runs_csv = _file("{prefix}_runs.csv")
    all_curves_csv = _file("{prefix}_all_curves.csv")
    floor_csv = _file("{prefix}_floor.csv")
    config = _file("{prefix}_config.json")
    floors = _file("{prefix}_floors.npz")
    layer_floors_csv = _file("{prefix}_layer_floors.csv")
    plan_json = _file("{prefix}_plan.json")
    plan_csv = _file("{prefix}_plan.csv")
    plan_record = _file("{prefix}_plan_record.json")
    figures_record = _file("{prefix}_figures.json")
    report = _file("{prefix}_report.html")
    lock = _file(".sweep.lock")

    def figure(self, name: str, suffix: str = "png") -> Path:
        return self.directory / f"{self.prefix}_{name}.{suffix}"

    def samples(self, seed: int) -> Path:
        """Return the file of the samples of a seed, which is there while a sweep trains."""
        return self.directory / f".{self.prefix}_samples_{seed}.pth"

    def samples_left(self) -> list[Path]:
        """Return the files of samples that exist, of any seed."""
        return sorted(self.directory.glob(f".{glob.escape(self.prefix)}_samples_*.pth"))

    def outputs(self) -> list[Path]:
        """Return the summary and figures: whatever is made from the results of the runs."""
        names = (*FIGURES, *map(metric_figure, self.metrics))
        figures = [self.figure(name, suffix) for name in names for suffix in FIGURE_FORMATS]
        return [self.summary_csv, self.summary_json, self.runs_csv, self.all_curves_csv, self.report, *figures]

    def metric_figures(self) -> list[Path]:
        """Return the figures of metrics that exist, also of those that are drawn no more."""
        return sorted(self.directory.glob(f"{glob.escape(self.prefix)}_{metric_figure('*')}"))

    def planned(self) -> list[Path]:
        """Return the files of the plan of a checkpoint."""
        return [self.floors, self.layer_floors_csv, self.plan_json, self.plan_csv, self.plan_record]

    def all(self, seeds: Iterable[int] = ()) -> list[Path]:
        """Return every file of the sweep of one weight, with the samples of some seeds, but its lock."""
        return [*self.outputs(), self.floor_csv, self.config, *map(self.samples, seeds)]
