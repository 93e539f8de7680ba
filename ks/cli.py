"""Command-line flags, each defined once: one function per group, and a parsed command line as a frozen config."""

import argparse
import math
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import make_dataclass

from ks.patterns import FAMILIES, Chain, make_chain
from ks.tiles import IMPLS, PRECISIONS

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class Parser(argparse.ArgumentParser):
    """No abbreviations, and an error is one line."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def parse_config(self, argv=None):
        """Parse into a frozen object with one attribute per flag; lists become tuples."""
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(self.parse_args(argv)).items()
        }
        return make_dataclass("Config", values, frozen=True)(**values)


@contextmanager
def usage_errors(script: str):
    """Turn a ValueError or OSError in here into one line on stderr and exit code 2, an interrupt into 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from error
    except KeyboardInterrupt as error:
        print(f"{script}: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from error


def interrupt_on_signals() -> threading.Event:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM, also where a shell's `&` has set SIGINT to be ignored.

    Returns:
        an event that is set once a signal came: compiled code may turn the KeyboardInterrupt into another exception.
    """
    interrupted = threading.Event()

    def interrupt(signum, frame):
        interrupted.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    return interrupted


def note(message: str, quiet: bool = False) -> None:
    """A remark for the user, on stderr."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def _number(convert, accept, description: str):
    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


positive_int = _number(int, lambda value: value > 0, "a positive integer")
non_negative_int = _number(int, lambda value: value >= 0, "a non-negative integer")
positive_float = _number(float, lambda value: 0 < value < math.inf, "a positive number")
non_negative_float = _number(float, lambda value: 0 <= value < math.inf, "a non-negative number")


def auto_or(convert):
    """A converter that lets 'auto' through."""
    return lambda text: text if text == "auto" else convert(text)


open_fraction = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1, both excluded")


def add_weight_flags(parser) -> None:
    group = parser.add_argument_group("weight")
    group.add_argument("--weight_path", required=True, help="dense weight: .pth, .pt, .safetensors or .npy")
    group.add_argument("--weight_key", help="its name in the file, where the file holds several 2-D weights")
    group.add_argument("--transpose", action="store_true", help="the weight is stored as (in, out)")


def add_chain_flags(parser) -> None:
    group = parser.add_argument_group("chain")
    group.add_argument("--chain", choices=FAMILIES, help="family of chains (default: monarch)")
    group.add_argument("--blocks", type=positive_int, default=4, help="monarch: largest grid side (default: 4)")
    group.add_argument("--num_factors", type=positive_int, default=3, help="butterfly: number of factors (default: 3)")
    group.add_argument("--row_splits", type=positive_int, nargs="+", metavar="M", help="explicit chain: m_1 … m_L")
    group.add_argument("--col_splits", type=positive_int, nargs="+", metavar="N", help="explicit chain: n_1 … n_L")


def add_training_flags(parser, num_epochs: int = 100) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--num_epochs", type=positive_int, default=num_epochs, help="(default: %(default)s)")
    group.add_argument("--batch_size", type=positive_int, default=32, help="(default: 32)")
    group.add_argument("--lr", type=positive_float, default=1e-3, help="peak learning rate (default: 1e-3)")
    group.add_argument("--weight_decay", type=non_negative_float, default=0.0, help="(default: 0)")
    group.add_argument("--optimizer", choices=("adamw", "adam", "sgd"), default="adamw", help="(default: adamw)")
    group.add_argument(
        "--scheduler",
        choices=("cosine", "plateau", "step", "none"),
        default="cosine",
        help="(default: cosine, to zero)",
    )
    group.add_argument("--scheduler_patience", type=non_negative_int, default=10, help="plateau, epochs (default: 10)")
    group.add_argument("--scheduler_factor", type=open_fraction, default=0.5, help="plateau (default: 0.5)")
    group.add_argument("--step_size", type=positive_int, default=30, help="step, epochs (default: 30)")
    group.add_argument("--gamma", type=positive_float, default=0.1, help="step (default: 0.1)")
    group.add_argument(
        "--max_grad_norm", type=non_negative_float, default=1.0, help="clip the gradient norm, 0 = off (default: 1.0)"
    )
    group.add_argument(
        "--init",
        choices=("random", "hierarchical"),
        default="random",
        help="initial values: random with the left factor zero, or the factorisation of W (default: random)",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="of samples and initial values (default: 0)")

    group = parser.add_argument_group("samples")
    group.add_argument("--num_samples", type=positive_int, default=10000, help="(default: 10000)")
    group.add_argument("--val_split", type=open_fraction, default=0.2, help="share for validation (default: 0.2)")
    group.add_argument("--input_std", type=positive_float, default=1.0, help="σ of the inputs (default: 1.0)")
    group.add_argument(
        "--sampling",
        choices=("auto", "whitened", "fresh", "fixed"),
        default="auto",
        help="training inputs: one set with exact second moment, new ones every epoch, or one plain set "
        "(default: auto, whitened where the samples suffice, else fresh)",
    )

    group = parser.add_argument_group("running")
    group.add_argument("--impl", choices=IMPLS, default="auto", help="backend (default: auto)")
    group.add_argument(
        "--float32_precision",
        choices=PRECISIONS,
        default="ieee",
        help="of float32 products on a CUDA device (default: ieee)",
    )
    group.add_argument("--bs_last", action="store_true", help="(features, batch) layout")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the products; half precision keeps float32 master weights (default: float32)",
    )
    group.add_argument("--log_grad_norm", action="store_true", help="report gradient norms")
    group.add_argument(
        "--log_interval", type=positive_int, default=100, help="steps between lines of --verbose (default: 100)"
    )
    group.add_argument("--verbose", action="store_true", help="report within epochs too")
    group.add_argument("--quiet", action="store_true", help="report errors only")


def add_output_flags(parser, output_dir: str | None, save_prefix: str) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default=output_dir, help=f"(default: {output_dir or '--results_dir'})")
    group.add_argument("--save_prefix", type=_file_prefix, default=save_prefix, help="(default: %(default)s)")


def add_checkpoint_flags(parser, save_interval: int = 10) -> None:
    parser.add_argument(
        "--save_interval",
        type=non_negative_int,
        default=save_interval,
        help="epochs between PREFIX_epoch_N.pth checkpoints, 0 = none (default: %(default)s)",
    )


def add_resume_flags(parser) -> None:
    parser.add_argument(
        "--resume_interval",
        type=non_negative_float,
        default=30.0,
        help="seconds between checkpoints to resume from, written at the end of an epoch (default: 30)",
    )


def add_plot_flags(parser) -> None:
    group = parser.add_argument_group("plots")
    group.add_argument("--log_scale", action="store_true", help="logarithmic loss axes")
    group.add_argument("--title", help="title of the figures")
    group.add_argument("--dpi", type=positive_int, default=120, help="(default: 120)")
    group.add_argument(
        "--figsize", type=positive_float, nargs=2, metavar=("WIDTH", "HEIGHT"), help="inches (default: by figure)"
    )
    group.add_argument("--formats", nargs="+", choices=("png", "svg", "pdf"), default=["png"], help="(default: png)")


def _file_prefix(text: str) -> str:
    if not text or "/" in text or "\\" in text or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name prefix; it must not be empty or hold a path")
    return text


def add_shared_training_groups(parser, num_epochs: int, save_interval: int) -> None:
    """Every flag that the training script and the sweep share, except where the results go."""
    add_weight_flags(parser)
    add_chain_flags(parser)
    add_training_flags(parser, num_epochs)
    add_checkpoint_flags(parser, save_interval)
    add_resume_flags(parser)


def shared_settings(config) -> dict:
    """The values of the shared training flags in a config, by flag name."""
    parser = Parser("")
    add_shared_training_groups(parser, num_epochs=1, save_interval=0)
    names = (action.dest for action in parser._actions if action.dest != "help")
    return {name: getattr(config, name) for name in names}


def to_arguments(settings: dict) -> list[str]:
    """Settings spelled out as a command line that parses to them: True as a bare flag, None and False left out."""
    arguments = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        arguments.append(f"--{name}")
        if isinstance(value, tuple):
            arguments.extend(map(str, value))
        elif value is not True:
            arguments.append(str(value))
    return arguments


def chain_of(config, rows: int, cols: int) -> Chain:
    """The chain family that the flags name, for an m × n weight.

    Raises:
        ValueError: splits together with --chain, or splits that do not fit.
    """
    splits = config.row_splits is not None or config.col_splits is not None
    if splits and config.chain is not None:
        raise ValueError(f"--chain {config.chain} together with --row_splits or --col_splits: give one or the other")
    return make_chain(
        rows,
        cols,
        config.chain or "monarch",
        blocks=config.blocks,
        num_factors=config.num_factors,
        row_splits=config.row_splits,
        col_splits=config.col_splits,
    )


def device_of(name: str):
    """Resolve `--device`.

    Returns:
        a torch.device; auto is CUDA where there is one.
    Raises:
        ValueError: not a device name, or a device that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: {torch.cuda.device_count()} CUDA devices are there; use --device cpu or auto"
        )
    return device
