"""Command-line flags, each defined once as a typed field of a frozen dataclass.

A script's configuration is a dataclass that inherits the groups of flags it takes. Parser, `--help`, the command line
of a subprocess and the tables of docs/flags.md are made from its fields. `MAIN` lists the flags that `--help` shows, in
this order; without it, all. `RETIRED` maps flags of earlier versions to what to do instead.
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
    fraction,
    groups,
    integer,
    key,
    metric_name,
    non_negative_float,
    non_negative_int,
    open_fraction,
    path,
    positive_float,
    positive_int,
    redefault,
    seed_number,
    setting,
)
from ks.errors import UsageError
from ks.files.globs import is_glob
from ks.files.layout import FIGURE_FORMATS, SweepFiles
from ks.files.make_weight import INIT_METHODS
from ks.files.weights import DTYPES
from ks.moments.metric import LossMetric

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFlags:
    TITLE: ClassVar = "weight"
    weight_path: str = flag(
        "", "dense weight: a .pth, .pt, .bin, .ckpt, .safetensors or .npy file", convert=path, required=True
    )
    weight_key: str | None = flag(None, "name of the tensor in a file of several; a sweep takes globs", convert=key)
    transpose: bool = flag(False, "the file stores the weight as (in, out) instead of (out, in)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainFlags:
    TITLE: ClassVar = "chain"
    chain: str | None = flag(None, "family of chains", choices=FAMILIES, shown_default="monarch")
    blocks: int = flag(
        4, "monarch: each side of the grid is the largest divisor of m or n up to this number", convert=positive_int
    )
    num_factors: int = flag(3, "butterfly: number of factors L", convert=integer(2, 64))
    row_splits: tuple[int, ...] | None = flag(
        None,
        "row splits m_1 … m_L of a chain of your own, with product m; use them with --col_splits, without --chain",
        convert=positive_int,
        nargs="+",
        metavar="M",
    )
    col_splits: tuple[int, ...] | None = flag(
        None, "column splits n_1 … n_L of the same chain, with product n", convert=positive_int, nargs="+", metavar="N"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    TITLE: ClassVar = "optimizer"
    num_epochs: int = flag(100, "epochs of each run", convert=positive_int)
    batch_size: int = flag(32, "samples per step", convert=positive_int)
    lr: float = flag(1e-3, "relative peak learning rate (docs/flags.md)", convert=positive_float)
    weight_decay: float = flag(
        0.0, "weight decay: decoupled in gauss_newton and adamw, an L2 term in adam and sgd", convert=non_negative_float
    )
    optimizer: str = flag(
        "auto",
        "auto is gauss_newton where it applies, else adamw",
        choices=("auto", "gauss_newton", "adamw", "adam", "sgd"),
    )
    scheduler: str = flag("cosine", "learning rate schedule", choices=("cosine", "plateau", "step", "none"))
    scheduler_patience: int = flag(
        10, "plateau: epochs without improvement before the rate is reduced", convert=non_negative_int
    )
    scheduler_factor: float = flag(0.5, "plateau: factor by which the rate is reduced", convert=open_fraction)
    step_size: int = flag(30, "step: epochs between two reductions of the rate", convert=positive_int)
    gamma: float = flag(0.1, "step: factor by which the rate is reduced", convert=positive_float)
    max_grad_norm: float = flag(
        1.0,
        "clip the gradient to this norm; 0 turns clipping off, and gauss_newton never clips",
        convert=non_negative_float,
    )
    init: str = flag("random", "initial values; hierarchical factorises the weight", choices=("random", "hierarchical"))
    seed: int = flag(0, "seed of samples and initial values", convert=seed_number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFlags:
    TITLE: ClassVar = "samples"
    num_samples: int = flag(10000, "random inputs, for training and validation", convert=positive_int)
    val_split: float = flag(0.2, "fraction of the samples that is held out for validation", convert=open_fraction)
    input_std: float = flag(1.0, "standard deviation σ of the isotropic inputs x ~ N(0, σ²I)", convert=positive_float)
    inputs: str | None = flag(
        None, "moments or raw samples of the layer's inputs (docs/inputs.md)", convert=path, metavar="FILE"
    )
    inputs_key: str | None = flag(
        None, "name of the inputs in the --inputs file", convert=key, shown_default="--weight_key"
    )
    fit_bias: bool = flag(
        False, "with --inputs: learn the centred outputs, and save the chain with the bias (W − Ŵ) E[x]"
    )
    loss_metric: str | None = flag(
        None,
        "what to minimise; model_loss needs gradients in --inputs",
        choices=tuple(metric.value for metric in LossMetric),
        shown_default="output_energy, for a plan model_loss if it can",
    )
    sampling: str = flag(
        "auto",
        "how to draw the training inputs (docs/theory.md); auto is whitened given at least n samples, else fresh",
        choices=("auto", "whitened", "fresh", "fixed"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningFlags:
    TITLE: ClassVar = "running"
    impl: str = flag("auto", "backend of the chain product; triton needs a GPU", choices=IMPLS)
    float32_precision: str = flag("ieee", "precision of float32 products on a GPU", choices=PRECISIONS)
    bs_last: bool = flag(False, "compute in the (features, batch) layout instead of (batch, features)")
    device: str = flag("auto", "cpu, cuda or cuda:N; auto is the GPU if any")
    dtype: str = flag("float32", "dtype of the products", choices=tuple(DTYPES))
    log_grad_norm: bool = flag(
        False,
        "add the gradient norm of every epoch to the curves; that of gauss_newton is of its preconditioned gradient",
    )
    log_to: str | None = flag(
        None,
        "also log every epoch to an experiment tracker, whose package must be installed (docs/files.md)",
        choices=TRACKERS,
    )
    latency_seconds: float = flag(
        1.0,
        "seconds after each run to measure the latency of the chain and of the dense layer; 0 measures none",
        convert=non_negative_float,
    )
    log_interval: int = flag(100, "with --verbose: steps between two lines", convert=positive_int)
    verbose: bool = flag(False, "print lines within epochs, all columns, all commands")
    quiet: bool = flag(False, "print nothing but results, warnings and errors")
    save_interval: int = flag(
        10, "epochs between two checkpoints PREFIX_epoch_N.pth; 0 writes none", convert=non_negative_int
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingFlags(WeightFlags, ChainFlags, OptimizerFlags, SampleFlags, RunningFlags):
    """Every flag that the training script and the sweep share, except where the results go."""

    RETIRED: ClassVar = {
        "resume_interval": "the resume state is written as often as this costs little time; leave the flag out",
    }

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
    output_dir: str = flag("./trained_models", "folder for the results", convert=path)
    save_prefix: str = flag("ks_chain", "prefix of the file names", convert=file_prefix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotFlags:
    TITLE: ClassVar = "plots"
    RETIRED: ClassVar = {"figsize": "each figure has its size; use --dpi, or --formats svg, which scales"}
    log_scale: bool = flag(False, "draw losses on a logarithmic axis")
    title: str | None = flag(None, "title of the figures", aliases=("--plot_title",))
    dpi: int = flag(150, "resolution of png figures in dots per inch", convert=integer(20, 1200))
    formats: tuple[str, ...] = flag(("png",), "formats of the figures", nargs="+", choices=FIGURE_FORMATS)
    metric: tuple[str, ...] = flag(
        (),
        "metrics of train_with_random.py to draw by epoch, each in a figure PREFIX_metric_NAME",
        convert=metric_name,
        nargs="+",
        metavar="NAME",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """Not among the training flags: the sweep answers for all its ranks, and its runs need not."""

    TITLE: ClassVar = "target"
    target_relative_loss: float | None = flag(
        None,
        "find the smallest rank that reaches this loss, a fraction of the zero predictor's; without --ranks, "
        "ranks around it join the study",
        convert=open_fraction,
    )
    target_loss_increase: float | None = flag(
        None,
        "the same for an increase of the loss of the model per token",
        convert=positive_float,
        metavar="X",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig(TrainingFlags, OutputFlags):
    """train_with_random.py."""

    TITLE: ClassVar = "one run"
    MAIN: ClassVar = (
        *("weight_path", "weight_key", "rank", "num_epochs", "batch_size", "lr", "num_samples"),
        *("chain", "inputs", "loss_metric", "optimizer", "init", "seed", "device", "dtype"),
        *("output_dir", "save_prefix", "resume", "check", "quiet"),
    )
    rank: int = flag(4, "rank of the chain", convert=positive_int)
    resume: bool = flag(
        False, "go on with an earlier run of the same settings; with more --num_epochs, also with a finished one"
    )
    check: bool = flag(False, "try criterion and metrics on a random batch; train nothing")
    stop_below: float | None = flag(
        None,
        "end the run once its population loss is at most this fraction of the zero predictor's",
        convert=positive_float,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersFlags:
    """The layers of a model file at once."""

    TITLE: ClassVar = "layers of a model"
    RETIRED: ClassVar = {"importance": "a plan weighs all layers alike; leave the flag out"}
    weight_key: tuple[str, ...] | None = redefault(WeightFlags, "weight_key", None, nargs="+", metavar="NAME")
    chains: tuple[str, ...] | None = flag(
        None,
        "instead of --chain, families to choose from",
        choices=tuple(family for family in FAMILIES if family != "lowrank_butterfly"),
        nargs="+",
        shown_default="monarch lowrank; lowrank by model_loss",
    )
    budget: float | None = flag(None, "most parameters of a plan, as a fraction of the dense weights", convert=fraction)
    rank_multiple: int = flag(1, "plan only ranks that are multiples of this number", convert=positive_int)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(LayersFlags, TargetFlags, TrainingFlags, OutputFlags, PlotFlags):  # type: ignore[misc]
    """rank_sweep_study.py."""

    TITLE: ClassVar = "sweep"
    MAIN: ClassVar = (
        *("weight_path", "ranks", "max_rank", "num_epochs", "batch_size", "lr", "num_samples"),
        *("output_dir", "save_prefix", "log_scale"),
        *("weight_key", "inputs", "loss_metric", "chain", "target_relative_loss", "target_loss_increase"),
        *("dry_run", "chains", "budget", "tight_bounds"),
        *("optimizer", "seeds", "jobs", "device", "dtype", "overwrite", "quiet", "verbose"),
    )
    RETIRED: ClassVar = {
        "stop_ranks": "--stop_at ends all ranks; rerun with --stop_at never --ranks … to train some to the end",
        "runs_per_gpu": "every GPU trains one rank at a time; leave the flag out",
    }
    num_epochs: int = redefault(OptimizerFlags, "num_epochs", 50)
    # The folder of a rank holds the last and the best model of its run, and no others.
    save_interval: int = redefault(RunningFlags, "save_interval", 0)
    output_dir: str = redefault(OutputFlags, "output_dir", "./rank_sweep_results")
    save_prefix: str = redefault(OutputFlags, "save_prefix", "rank_sweep")
    ranks: tuple[int, ...] | None = flag(
        None, "ranks to train", convert=positive_int, nargs="+", shown_default="2 4 8 16 32 64 128 256 512"
    )
    max_rank: int | None = flag(None, "leave out the ranks above this one", convert=positive_int)
    stop_at: str = flag(
        "never",
        "end a run early: at --target_relative_loss, or when it has converged to its floor",
        choices=("never", "target", "floor"),
    )
    seeds: tuple[int, ...] | None = flag(
        None, "train every rank with each of these seeds", convert=seed_number, nargs="+", shown_default="--seed"
    )
    tight_bounds: float = flag(
        30.0,
        "seconds for tighter lower bounds (of grids with --inputs, and of three or more factors), 0 for none; from 30 "
        "on, also for ranks that the answer does not name; without a number, 3600",
        convert=non_negative_float,
        nargs="?",
        const=3600.0,
        metavar="SECONDS",
        shown_default="30",
    )
    dry_run: bool = flag(False, "print the plan and train nothing")
    overwrite: bool = flag(
        False, "replace the results in --output_dir, also those of another study; without it, finished ranks are kept"
    )
    timeout_per_rank: float | None = flag(
        None, "stop a run after this many seconds", convert=positive_float, metavar="SECONDS"
    )
    save_plots: bool = flag(False, "accepted for old command lines; figures are saved in any case")
    jobs: int | str = flag("auto", "runs at a time; auto is one per core or GPU", convert=auto_or(positive_int))
    launcher: str = flag(
        "local",
        "where to train: local, in processes of this machine; inline, one run after the other in this process, for a "
        "debugger; on a Ray cluster; as a job array of SLURM",
        choices=("local", "inline", "ray", "slurm"),
    )
    ray_address: str = flag(
        "auto", "head of the Ray cluster; auto is the cluster that this machine has joined", metavar="HOST:PORT"
    )
    slurm: tuple[str, ...] = flag(
        (),
        "settings of sbatch for --launcher slurm, such as partition=gpu time=120 gpus_per_node=1",
        convert=setting,
        nargs="+",
        metavar="KEY=VALUE",
    )
    runs_per_job: int = flag(1, "runs of one SLURM job, one after the other", convert=positive_int)
    gpus: str = flag("auto", "GPUs to use: auto (all), none, or numbers such as 0,1 among the visible ones")

    def __post_init__(self) -> None:
        """Let a target in the unit of the loss choose its metric, so that the runs get it.

        Raises:
            UsageError: two targets, a target of another metric, two choices of families, or flags of another launcher.
        """
        if self.chain is not None and self.chains is not None:
            raise UsageError(f"--chain {self.chain} together with --chains: give one or the other")
        if self.launcher != "slurm" and (self.slurm or self.runs_per_job != 1):
            raise UsageError(f"--slurm and --runs_per_job are for --launcher slurm, not for {self.launcher}")
        if self.target_loss_increase is None:
            return
        target = f"--target_loss_increase {self.target_loss_increase:g} together with"
        if self.target_relative_loss is not None:
            raise UsageError(f"{target} --target_relative_loss: give one or the other")
        if self.loss_metric == LossMetric.OUTPUT_ENERGY:
            raise UsageError(f"{target} --loss_metric output_energy: it is a target of model_loss")
        object.__setattr__(self, "loss_metric", LossMetric.MODEL_LOSS.value)  # frozen

    def files(self) -> SweepFiles:
        """Return the files of the sweep in its results folder."""
        return SweepFiles(Path(self.output_dir).absolute(), self.save_prefix, self.metric)

    def is_of_several_layers(self) -> bool:
        """Return whether the flags ask for the layers of a checkpoint instead of one weight."""
        names = self.weight_key or ()
        asked = self.chains or self.budget or self.rank_multiple != 1
        return len(names) > 1 or any(is_glob(name) for name in names) or bool(asked)

    def of_layer(self, name: str | None, **changes: Any) -> "SweepConfig":
        """Return the flags for one weight of the checkpoint, without those that choose among layers.

        Args:
            name: of the weight; None if the file holds one weight alone.
            changes: other flags.
        """
        chosen = {"weight_key": name, "chains": None, "budget": None, "rank_multiple": 1}
        return dataclasses.replace(self, **(chosen | changes))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotConfig(OutputFlags, PlotFlags):
    """plot_rank_results.py."""

    TITLE: ClassVar = "results"
    results_dir: tuple[str, ...] = flag(
        (),
        "folder of a sweep, or folders of several sweeps to compare; one of a checkpoint counts as those of its layers",
        convert=path,
        nargs="+",
        required=True,
    )
    show: bool = flag(False, "open a window for each figure")
    report: bool = flag(False, "also write the report PREFIX_report.html")
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
    init_method: str = flag("xavier_uniform", "kind of weight (docs/flags.md)", choices=INIT_METHODS)
    seed: int = redefault(OptimizerFlags, "seed", 0, help="seed of the weight")
    rank: int = flag(8, "exact_chain, lowrank_plus_noise: rank of the signal", convert=positive_int)
    noise: float = flag(
        0.1, "lowrank_plus_noise: Frobenius norm of the noise over that of the signal", convert=non_negative_float
    )
    alpha: float = flag(1.0, "power_law: singular values k^-alpha", convert=non_negative_float)
    overwrite: bool = flag(False, "replace the file at --output_path if it holds something else")
    quiet: bool = redefault(RunningFlags, "quiet", False, help="print nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """example_rank_sweep.py; its other flags go to the sweep."""

    TITLE: ClassVar = "demo"
    output_dir: str = redefault(OutputFlags, "output_dir", "./demo_rank_sweep_results")
