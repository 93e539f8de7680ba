"""Make a dense test weight W (output_features × input_features) and print its statistics.

    python generate_test_weight.py --output_features 2048 --input_features 4096 --output_path ./my_weight.pth
    python generate_test_weight.py --output_features 1024 --input_features 1024 --output_path ./exact.pth \\
        --init_method exact_chain --rank 8

Writes --output_path (.pth, .pt, .safetensors or .npy). A file there that holds something else is replaced only with
--overwrite. Exit codes: 0 written, 2 bad input, 4 internal error.
"""

import sys
from pathlib import Path

sys.path.insert(0, __file__.rpartition("/")[0])  # python -I and PYTHONSAFEPATH leave the folder of a script out

from ks.cli import console

if __name__ == "__main__":
    console.begin(__file__)

import torch

from ks.cli.flags import GeneratorConfig
from ks.cli.parser import Parser
from ks.errors import UsageError
from ks.files.atomic import atomic_path, prepare_output_dir
from ks.files.make_weight import make_weight
from ks.files.weights import DTYPES, load_weight, save_weight
from ks.training.problem import chain_of


def build_parser() -> Parser[GeneratorConfig]:
    return Parser(GeneratorConfig, __doc__)


def keep_other_weight(path: Path, weight: torch.Tensor) -> None:
    """Raise UsageError if `path` holds anything but this weight."""
    try:
        same = torch.equal(load_weight(path).tensor, weight)
    except UsageError:
        same = False
    if not same:
        raise UsageError(f"{path} exists and holds something else; choose another --output_path or give --overwrite")


@console.script
def main(argv=None) -> int:
    config = build_parser().parse(argv)
    path = Path(config.output_path)
    weight = make_weight(
        config.output_features,
        config.input_features,
        config.init_method,
        seed=config.seed,
        chain=chain_of(config, config.output_features, config.input_features),
        rank=config.rank,
        noise=config.noise,
        alpha=config.alpha,
    ).to(DTYPES[config.dtype])
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a directory; a file name is needed")
        if path.exists() and not config.overwrite:
            keep_other_weight(path, weight)
        prepare_output_dir(path.absolute().parent)
        with atomic_path(path) as temporary:
            save_weight(weight, temporary)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    if not config.quiet:
        wide = weight.double()
        print(f"{path}: {config.init_method}, {tuple(weight.shape)}, {config.dtype}, seed {config.seed}")
        print(
            f"mean {wide.mean():.4g}, standard deviation {wide.std(correction=0):.4g}, min {wide.min():.4g}, "
            f"max {wide.max():.4g}, Frobenius norm {wide.norm():.4g}"
        )
    return console.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
