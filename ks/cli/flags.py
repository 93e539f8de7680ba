"""Command-line flags, each defined once as a typed field of a frozen dataclass.

A script's configuration is a dataclass that inherits the groups of flags it takes. Parser, `--help`, the command line
of a training subprocess and the tables of docs/flags.md are made from its fields.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from ks.chain.backend import IMPLS, PRECISIONS
from ks.chain.patterns import FAMILIES
from ks.cli.parser import (
    auto_or,
    file_prefix,
    flag,
    groups,
    integer,
    key,
    metric_name,
    non_negative_float,
    non_negative_int,
    number,
    open_fraction,
    path,
    positive_float,
    positive_int,
    redefault,
    seed_number,
    share,
)
from ks.files.globs import is_glob
from ks.files.layout import FIGURE_FORMATS
from ks.files.make_weight import INIT_METHODS
from ks.files.weights import DTYPES

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFlags:
    TITLE: ClassVar = "weight"
    weight_path: str = flag(
        "", "file of the dense weight: .pth, .pt, .safetensors or .npy", convert=path, required=True
    )
    weight_key: str | None = flag(
        None,
        "name of the tensor, if the file holds several 2-D weights; without it, the error lists their names; the sweep "
        "takes several names, and globs as docs/models.md describes them",
        convert=key,
    )
    transpose: bool = flag(False, "the weight is stored as (in, out) instead of (out, in)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainFlags:
    TITLE: ClassVar = "chain"
    chain: str | None = flag(
        None, "family of chains, described in docs/theory.md", choices=FAMILIES, shown_default="monarch"
    )
    blocks: int = flag(
        4, "monarch: the sides of the grid are the largest divisors of m and n up to this number", convert=positive_int
    )
    num_factors: int = flag(3, "butterfly: number of factors L", convert=integer(2, 64))
    row_splits: tuple[int, ...] | None = flag(
        None,
        "explicit chain, instead of --chain: m_1 … m_L with product m",
        convert=positive_int,
        nargs="+",
        metavar="M",
    )
    col_splits: tuple[int, ...] | None = flag(
        None,
        "explicit chain, instead of --chain: n_1 … n_L with product n",
        convert=positive_int,
        nargs="+",
        metavar="N",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    TITLE: ClassVar = "optimizer"
    num_epochs: int = flag(100, "epochs of each training", convert=positive_int)
    batch_size: int = flag(32, "samples per step", convert=positive_int)
    lr: float = flag(1e-3, "peak learning rate", convert=positive_float)
    weight_decay: float = flag(0.0, "weight decay; decoupled for gauss_newton and adamw", convert=non_negative_float)
    optimizer: str = flag(
        "auto",
        "optimizer; auto is gauss_newton for two or three chainable factors and the mean squared error, else adamw; "
        "sgd has a momentum of 0.9 and needs a far larger --lr",
        choices=("auto", "gauss_newton", "adamw", "adam", "sgd"),
    )
    scheduler: str = flag(
        "cosine", "schedule of the learning rate; cosine falls to zero", choices=("cosine", "plateau", "step", "none")
    )
    scheduler_patience: int = flag(
        10, "plateau: epochs without improvement before a reduction", convert=non_negative_int
    )
    scheduler_factor: float = flag(0.5, "plateau: factor of each reduction", convert=open_fraction)
    step_size: int = flag(30, "step: epochs between reductions", convert=positive_int)
    gamma: float = flag(0.1, "step: factor of each reduction", convert=positive_float)
    max_grad_norm: float = flag(
        1.0,
        "clip gradients to this norm; 0 turns clipping off; gauss_newton never clips",
        convert=non_negative_float,
    )
    init: str = flag(
        "random",
        "initial values: random with the left-most factor zero, or the hierarchical factorisation of W, which is the "
        "optimum for two factors",
        choices=("random", "hierarchical"),
    )
    seed: int = flag(0, "seed of samples and initial values; every rank sees the same samples", convert=seed_number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFlags:
    TITLE: ClassVar = "samples"
    num_samples: int = flag(10000, "random inputs, for training and validation together", convert=positive_int)
    val_split: float = flag(0.2, "share of the samples kept for validation", convert=open_fraction)
    input_std: float = flag(1.0, "σ of the isotropic inputs x ~ N(0, σ²I)", convert=positive_float)
    inputs: str | None = flag(
        None,
        "file with what the layer really sees, as docs/inputs.md describes: moments, or raw samples (N × n) of which "
        "the last --val_split are held out; without it, inputs are isotropic",
        convert=path,
        metavar="FILE",
    )
    inputs_key: str | None = flag(None, "name of the inputs in that file", convert=key, shown_default="--weight_key")
    fit_bias: bool = flag(
        False, "with --inputs: the saved chain has a bias that makes up for the mean of the inputs, (W − Ŵ) E[x]"
    )
    sampling: str = flag(
        "auto",
        "training inputs: whitened is one set whose second moment is exactly that of the inputs, fresh a new set every "
        "epoch, fixed one plain set or the raw samples of --inputs; auto is whitened if there are at least n training "
        "samples, else fresh",
        choices=("auto", "whitened", "fresh", "fixed"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningFlags:
    TITLE: ClassVar = "running"
    impl: str = flag(
        "auto",
        "backend of the chain product: bmm runs anywhere, triton on GPUs; auto is triton where it was measured faster",
        choices=IMPLS,
    )
    float32_precision: str = flag(
        "ieee",
        "precision of float32 products on a GPU; tf32x3 sums three TF32 products in triton and is ieee in bmm",
        choices=PRECISIONS,
    )
    bs_last: bool = flag(False, "use the (features, batch) layout instead of (batch, features)")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto is a GPU if there is one")
    dtype: str = flag(
        "float32", "dtype of the products; half precision keeps float32 master weights", choices=tuple(DTYPES)
    )
    log_grad_norm: bool = flag(
        False,
        "record the gradient norm of every epoch in the curves; gauss_newton's after the division by the curvature",
    )
    log_to: str | None = flag(
        None,
        "also log every epoch to an experiment tracker, whose package must be installed; described in docs/files.md",
        choices=TRACKERS,
    )
    latency_seconds: float = flag(
        1.0,
        "seconds after each training for the latency of its chain and of the dense layer, at batch 1, 32 and 1024; 0 "
        "measures none",
        convert=non_negative_float,
    )
    log_interval: int = flag(100, "steps between the lines that --verbose prints", convert=positive_int)
    verbose: bool = flag(
        False, "print lines within each epoch too; in a sweep, all columns of the summary and the commands of a plan"
    )
    quiet: bool = flag(False, "print errors and warnings only")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    TITLE: ClassVar = "checkpoints"
    save_interval: int = flag(
        10, "epochs between PREFIX_epoch_N.pth checkpoints; 0 writes none", convert=non_negative_int
    )
    resume_interval: float = flag(
        30.0,
        "shortest time in seconds between checkpoints to resume from; each is written at the end of an epoch",
        convert=non_negative_float,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingFlags(WeightFlags, ChainFlags, OptimizerFlags, SampleFlags, RunningFlags, CheckpointFlags):
    """Every flag that the training script and the sweep share, except where the results go."""

    def training_settings(self) -> dict[str, Any]:
        """Return the values of these flags by name."""
        names = (field.name for _, fields in groups(TrainingFlags) for field in fields)
        return {name: getattr(self, name) for name in names}

    def files_read(self) -> list[Path]:
        """Return the paths of the weight and, if they are given, of the inputs."""
        return [Path(path) for path in (self.weight_path, self.inputs) if path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFlags:
    TITLE: ClassVar = "output"
    output_dir: str = flag(
        "./trained_models", "folder for the files that the script writes, created if needed", convert=path
    )
    save_prefix: str = flag("ks_chain", "prefix of the file names", convert=file_prefix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotFlags:
    TITLE: ClassVar = "plots"
    log_scale: bool = flag(False, "draw losses on logarithmic axes")
    title: str | None = flag(None, "title of the figures", aliases=("--plot_title",))
    dpi: int = flag(120, "resolution of png figures in dots per inch", convert=integer(20, 1200))
    figsize: tuple[float, float] | None = flag(
        None,
        "size of each figure in inches",
        convert=number(1, 50),
        nargs=2,
        metavar=("WIDTH", "HEIGHT"),
        shown_default="by figure",
    )
    formats: tuple[str, ...] = flag(("png",), "formats of the figures", nargs="+", choices=FIGURE_FORMATS)
    metric: tuple[str, ...] = flag(
        (),
        "also draw these metrics of train_with_random.py by epoch, each in a figure PREFIX_metric_NAME",
        convert=metric_name,
        nargs="+",
        metavar="NAME",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """Not among the training flags: the sweep answers for all its ranks, and its trainings need not."""

    TITLE: ClassVar = "target"
    target_relative_loss: float | None = flag(
        None,
        "name the smallest rank that can reach this share of the loss of predicting 0; a training says in the end "
        "whether it was reached, and a sweep without --ranks trains the ranks around that one",
        convert=open_fraction,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig(TrainingFlags, OutputFlags):
    """train_with_random.py."""

    TITLE: ClassVar = "one training"
    rank: int = flag(4, "rank of the chain", convert=positive_int)
    resume: bool = flag(
        False,
        "resume an earlier run of the same settings from its checkpoint; with more --num_epochs, a finished one too",
    )
    check: bool = flag(
        False, "try the criterion and the metrics on random batches and print the names of the metrics; train nothing"
    )
    stop_below: float | None = flag(
        None, "end the training once its population loss is at most this share of predicting 0", convert=positive_float
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersFlags:
    """Several weights of a checkpoint at once."""

    TITLE: ClassVar = "layers of a checkpoint"
    weight_key: tuple[str, ...] | None = redefault(
        WeightFlags,
        "weight_key",
        None,
        nargs="+",
        metavar="NAME",
    )
    chains: tuple[str, ...] | None = flag(
        None,
        "families to choose from for each layer, instead of --chain",
        choices=tuple(family for family in FAMILIES if family != "lowrank_butterfly"),
        nargs="+",
        shown_default="monarch lowrank",
    )
    budget: float | None = flag(
        None,
        "parameter budget as a fraction of the dense weights; the plan minimises the total relative loss within it "
        "(--target_relative_loss instead: the fewest parameters at this mean relative loss)",
        convert=share,
    )
    importance: str = flag(
        "equal",
        "weight of each layer's relative loss in the sum: equal; energy, by its output energy; or a JSON file that "
        "gives numbers by name or glob",
        convert=path,
        metavar="equal|energy|FILE",
    )
    rank_multiple: int = flag(1, "choose ranks that are multiples of this number", convert=positive_int)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(LayersFlags, TargetFlags, TrainingFlags, OutputFlags, PlotFlags):  # type: ignore[misc]
    """rank_sweep_study.py."""

    TITLE: ClassVar = "sweep"
    num_epochs: int = redefault(OptimizerFlags, "num_epochs", 50)
    # The folder of a rank holds the last and the best model of its run, and no others.
    save_interval: int = redefault(CheckpointFlags, "save_interval", 0)
    output_dir: str = redefault(OutputFlags, "output_dir", "./rank_sweep_results")
    save_prefix: str = redefault(OutputFlags, "save_prefix", "rank_sweep")
    ranks: tuple[int, ...] | None = flag(
        None, "ranks to train", convert=positive_int, nargs="+", shown_default="2 4 8 16 32 64 128 256 512"
    )
    max_rank: int | None = flag(None, "leave out larger ranks", convert=positive_int)
    stop_at: str = flag(
        "never",
        "end a training early: once it reaches --target_relative_loss, or once it has converged to its floor",
        choices=("never", "target", "floor"),
    )
    stop_ranks: tuple[int, ...] | None = flag(
        None, "the ranks that --stop_at ends", convert=positive_int, nargs="+", shown_default="all"
    )
    seeds: tuple[int, ...] | None = flag(
        None, "train every rank with each of these seeds", convert=seed_number, nargs="+", shown_default="--seed"
    )
    tight_bounds: float = flag(
        30.0,
        "seconds for lower bounds that are not exact (grids with --inputs, three or more factors): up to 30 for the "
        "ranks that the answer names, more also for the other ranks and for tighter bounds; without a number, 3600",
        convert=non_negative_float,
        nargs="?",
        const=3600.0,
        metavar="SECONDS",
        shown_default="30",
    )
    dry_run: bool = flag(False, "print the plan, with --verbose the commands too; train nothing")
    overwrite: bool = flag(
        False,
        "redo the results in --output_dir, also those of another study; without it, finished ranks are kept and "
        "unfinished ones resumed",
    )
    timeout_per_rank: float | None = flag(
        None, "stop a training after this many seconds", convert=positive_float, metavar="SECONDS"
    )
    save_plots: bool = flag(False, "accepted for old command lines; figures are always saved")
    jobs: int | str = flag(
        "auto",
        "trainings at a time; auto is one per CPU core, or --runs_per_gpu per GPU",
        convert=auto_or(positive_int),
    )
    launcher: str = flag(
        "local",
        "where to run: in processes of this machine, inline (one run after the other in this process, for a debugger), "
        "or on a Ray cluster",
        choices=("local", "inline", "ray"),
    )
    ray_address: str = flag(
        "auto", "head of the Ray cluster; auto is the one that this machine has joined", metavar="HOST:PORT"
    )
    gpus: str = flag("auto", "GPUs to use: auto (all), none, or numbers such as 0,1 among the visible ones")
    runs_per_gpu: int = flag(1, "trainings that share a GPU", convert=positive_int)

    def is_of_several_layers(self) -> bool:
        """Return whether the flags ask for the layers of a checkpoint instead of one weight."""
        names = self.weight_key or ()
        asked = self.chains or self.budget or self.importance != "equal" or self.rank_multiple != 1
        return len(names) > 1 or any(is_glob(name) for name in names) or bool(asked)

    def of_layer(self, name: str | None, **changes: Any) -> "SweepConfig":
        """Return the flags for one weight of the checkpoint, without those that choose among layers.

        Args:
            name: of the weight; None if the file holds one weight alone.
            changes: other flags.
        """
        chosen = {"weight_key": name, "chains": None, "budget": None, "importance": "equal", "rank_multiple": 1}
        return dataclasses.replace(self, **(chosen | changes))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotConfig(OutputFlags, PlotFlags):
    """plot_rank_results.py."""

    TITLE: ClassVar = "results"
    results_dir: tuple[str, ...] = flag(
        (), "folder of a sweep, or several to draw in one figure", convert=path, nargs="+", required=True
    )
    show: bool = flag(False, "open a window for each figure")
    report: bool = flag(False, "also write the report of the sweep, PREFIX_report.html")
    verbose: bool = redefault(RunningFlags, "verbose", False, help="print all columns of the summary")
    output_dir: str | None = redefault(  # type: ignore[assignment]
        OutputFlags, "output_dir", None, shown_default="--results_dir"
    )
    save_prefix: str = redefault(OutputFlags, "save_prefix", "rank_sweep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorConfig(ChainFlags):
    """generate_test_weight.py."""

    TITLE: ClassVar = "test weight"
    output_features: int = flag(2048, "m, the rows of W", convert=positive_int)
    input_features: int = flag(4096, "n, the columns of W", convert=positive_int)
    output_path: str = flag("./test_weight.pth", "file to write: .pth, .pt, .safetensors or .npy", convert=path)
    dtype: str = redefault(RunningFlags, "dtype", "float32", help="dtype of the weight")
    init_method: str = flag("xavier_uniform", "kind of weight, described in docs/flags.md", choices=INIT_METHODS)
    seed: int = redefault(OptimizerFlags, "seed", 0, help="seed of the weight")
    rank: int = flag(8, "exact_chain, lowrank_plus_noise: rank of the signal", convert=positive_int)
    noise: float = flag(
        0.1, "lowrank_plus_noise: Frobenius norm of the noise over that of the signal", convert=non_negative_float
    )
    alpha: float = flag(1.0, "power_law: singular values k^-alpha", convert=non_negative_float)
    overwrite: bool = flag(False, "replace another weight at --output_path")
    quiet: bool = redefault(RunningFlags, "quiet", False, help="print nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """example_rank_sweep.py; its other flags go to the sweep."""

    TITLE: ClassVar = "demo"
    output_dir: str = redefault(OutputFlags, "output_dir", "./demo_rank_sweep_results")
