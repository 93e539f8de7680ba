"""Make a dense test weight W (output_features × input_features) and print its statistics.

    python generate_test_weight.py --output_features 2048 --input_features 4096 --output_path ./my_weight.pth
    python generate_test_weight.py --output_features 1024 --input_features 1024 --output_path ./exact.pth \\
        --init_method exact_chain --rank 8

Writes --output_path (.pth, .pt, .safetensors or .npy). An existing file with another content is an error unless
--overwrite is given. Exit codes: 0 well, 2 bad input.
"""

import sys
from pathlib import Path

import torch

from ks import cli, results
from ks.weights import DTYPES, INIT_METHODS, load_weight, make_weight, save_weight

SCRIPT = "generate_test_weight.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_features", type=cli.positive_int, required=True, help="m, the rows of W")
    parser.add_argument("--input_features", type=cli.positive_int, required=True, help="n, the columns of W")
    parser.add_argument("--output_path", required=True, help="file to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(default: float32)")
    parser.add_argument(
        "--init_method", choices=INIT_METHODS, default="xavier_uniform", help="(default: xavier_uniform)"
    )
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="(default: 0)")
    parser.add_argument(
        "--rank", type=cli.positive_int, default=8, help="of exact_chain and lowrank_plus_noise (default: 8)"
    )
    parser.add_argument(
        "--noise",
        type=cli.non_negative_float,
        default=0.1,
        help="lowrank_plus_noise: Frobenius norm of the noise over that of the signal (default: 0.1)",
    )
    parser.add_argument(
        "--alpha", type=cli.non_negative_float, default=1.0, help="power_law: singular values k^-alpha (default: 1.0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another weight at --output_path")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    cli.add_chain_flags(parser)
    return parser


def keep_other_weight(path: Path, weight: torch.Tensor) -> None:
    """Raise ValueError if `path` holds anything but this weight."""
    try:
        same = torch.equal(load_weight(path).tensor, weight)
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"{path} exists and holds something else; choose another --output_path or give --overwrite")


def main(argv=None) -> int:
    config = build_parser().parse_config(argv)
    path = Path(config.output_path)
    with cli.usage_errors(SCRIPT):
        chain = cli.chain_of(config, config.output_features, config.input_features)
        weight = make_weight(
            config.output_features,
            config.input_features,
            config.init_method,
            seed=config.seed,
            chain=chain,
            rank=config.rank,
            noise=config.noise,
            alpha=config.alpha,
        ).to(DTYPES[config.dtype])
        if path.is_dir():
            raise ValueError(f"{path} is a directory; a file name is needed")
        if path.exists() and not config.overwrite:
            keep_other_weight(path, weight)
        results.prepare_output_dir(path.absolute().parent)
        with results.atomic_path(path) as temporary:
            save_weight(weight, temporary)
    if not config.quiet:
        wide = weight.double()
        print(f"{path}: {config.init_method}, {tuple(weight.shape)}, {config.dtype}, seed {config.seed}")
        print(
            f"mean {wide.mean():.4g}, standard deviation {wide.std(correction=0):.4g}, min {wide.min():.4g}, "
            f"max {wide.max():.4g}, Frobenius norm {wide.norm():.4g}"
        )
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
