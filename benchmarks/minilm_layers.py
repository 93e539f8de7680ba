"""Compare chains that are made for measured inputs with those for isotropic ones, on four layers of all-MiniLM-L6-v2.

    python benchmarks/minilm_inputs.py
    python benchmarks/minilm_layers.py --csv build/minilm_layers.csv
    python benchmarks/minilm_layers.py --layers encoder.layer.3.output.dense --ranks 16 --train

The first program writes the moments that this one reads: training and held-out tokens in one file, tokens of other
source files in another. Chains are 4 × 4 grids. Every loss is a share of the output energy tr(W C Wᵀ) of the same
tokens. The program prints two Markdown tables, of losses and of bounds, and writes all numbers as CSV. `--train` also
trains every chain by train_with_random.py at default settings, and adds a third table.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from minilm import ROOT, checkpoint
from timing import place

import ks
from ks.bounds.factorize import factorize
from ks.bounds.floors import chain_bounds
from ks.bounds.population_loss import population_loss
from ks.bounds.tails import tail_energies
from ks.cli import console
from ks.files.atomic import write_csv
from ks.files.weights import load_weight
from ks.moments.read import read_input_moments
from ks.moments.second_moment import SecondMoment, VectorSums

LAYERS = ("0.output.dense", "3.output.dense", "3.intermediate.dense", "3.attention.output.dense")
RANKS = (4, 16, 32, 48)
TABLES = {
    "Losses": {
        "isotropic floor": "isotropic_floor",
        "isotropic optimum, unseen": "isotropic_unseen",
        "grid, training": "upper",
        "grid, held out": "held_out",
        "grid, unseen": "unseen",
        "low-rank, training": "lowrank",
        "low-rank, unseen": "lowrank_unseen",
    },
    "Bounds": {
        "lower": "lower",
        "upper": "upper",
        "upper / lower": "ratio",
        "lower, with a fitted bias": "fit_bias_lower",
        "upper, with a fitted bias": "fit_bias_upper",
        "unseen, with a fitted bias": "fit_bias_unseen",
    },
    "Trained": {"training": "trained", "held out": "trained_held_out", "unseen": "trained_unseen"},
}
COLUMNS = ("layer", "rows", "cols", "rank", "share", "lowrank_rank")
COLUMNS += tuple(dict.fromkeys(name for table in TABLES.values() for name in table.values()))
COLUMNS += ("seconds", "hardware", "torch", "python", "revision")


@dataclass(frozen=True)
class Measured:
    """The weight of a layer, shape (m, n), float64, and the moments of its inputs."""

    key: str
    weight: torch.Tensor
    train: VectorSums
    held_out: VectorSums
    unseen: VectorSums

    def share(self, values, part: VectorSums, centre: torch.Tensor | None = None) -> float:
        """Return the loss of a chain on some inputs, relative to the zero predictor on them.

        Args:
            values: the factors, output side first.
            part: the inputs.
            centre: μ; the chain has the bias (W − Ŵ) μ.
        """
        moment = part.second_moment
        if centre is not None:
            cross = part.mean.outer(centre)
            moment = moment - cross - cross.t() + centre.outer(centre)
        energy = SecondMoment(part.second_moment).output_energy(self.weight)
        return population_loss(self.weight, values, SecondMoment(moment)) * len(self.weight) / energy


def read_layer(layer: str, inputs: Path, unseen: Path) -> Measured:
    key = f"encoder.layer.{layer.removeprefix('encoder.layer.')}.weight"
    weight = load_weight(checkpoint(), key).tensor.double()
    seen, other = (read_input_moments(path, weight.shape[1], key) for path in (inputs, unseen))
    if seen.held_out is None:
        raise SystemExit(f"{inputs} has no held-out part; collect the moments again")
    return Measured(key, weight, seen.train, seen.held_out, other.train)


def bounds_and_chain(
    layer: Measured, chain: ks.Chain, rank: int, moment: SecondMoment, bounds
) -> tuple[float, float, list]:
    """Return a lower bound of the loss and the loss of the best chain known, both per output, and that chain."""
    values = factorize(layer.weight, chain.patterns(rank), moment)
    return bounds.lower(rank), population_loss(layer.weight, values, moment), values


def compare(layer: Measured, ranks: list[int]):
    """Yield a row of numbers for every rank."""
    weight, rows, cols = layer.weight, *layer.weight.shape
    chain, lowrank = ks.make_chain(rows, cols), ks.make_chain(rows, cols, "lowrank")
    centre = layer.train.mean
    seen = SecondMoment(layer.train.second_moment)
    centred = SecondMoment(layer.train.second_moment - centre.outer(centre))
    predict_zero = seen.output_energy(weight) / rows
    isotropic_curve = chain_bounds(weight, chain).curve
    isotropic_curve = isotropic_curve / isotropic_curve[0]
    lowrank_curve = tail_energies(seen.times_root(weight)) / (rows * predict_zero)
    bounds, bounds_centred = (chain_bounds(weight, chain, moment) for moment in (seen, centred))
    for rank in ranks:
        started = time.perf_counter()
        equal_rank = chain.parameters(rank) // (rows + cols)
        isotropic = factorize(weight, chain.patterns(rank))
        lower, upper, values = bounds_and_chain(layer, chain, rank, seen, bounds)
        lower_centred, upper_centred, values_centred = bounds_and_chain(layer, chain, rank, centred, bounds_centred)
        equal = factorize(weight, lowrank.patterns(equal_rank), seen)
        yield {
            "layer": layer.key.removeprefix("encoder.layer.").removesuffix(".weight"),
            "rows": rows,
            "cols": cols,
            "rank": rank,
            "share": chain.parameters(rank) / (rows * cols),
            "lowrank_rank": equal_rank,
            "isotropic_floor": isotropic_curve[rank].item(),
            "isotropic_unseen": layer.share(isotropic, layer.unseen),
            "upper": upper / predict_zero,
            "held_out": layer.share(values, layer.held_out),
            "unseen": layer.share(values, layer.unseen),
            "lowrank": lowrank_curve[equal_rank].item(),
            "lowrank_unseen": layer.share(equal, layer.unseen),
            "lower": lower / predict_zero,
            "ratio": upper / lower,
            "fit_bias_lower": lower_centred / predict_zero,
            "fit_bias_upper": upper_centred / predict_zero,
            "fit_bias_unseen": layer.share(values_centred, layer.unseen, centre),
            "seconds": time.perf_counter() - started,
        }


def trained(layer: Measured, rank: int, inputs: Path) -> dict:
    """Train a chain by the training script; return its losses on all three sets of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, str(ROOT / "train_with_random.py"), "--quiet", "--rank", str(rank)]
        source = ["--weight_path", str(checkpoint()), "--weight_key", layer.key, "--inputs", str(inputs)]
        subprocess.run([*script, *source, "--output_dir", folder], check=True, stdout=sys.stderr)
        factors = ks.load(Path(folder) / "ks_chain_final.pth").factors
    parts = {"trained": layer.train, "trained_held_out": layer.held_out, "trained_unseen": layer.unseen}
    return {name: layer.share(factors, part) for name, part in parts.items()}


def markdown(title: str, names: dict[str, str], rows: list[dict]) -> str:
    lines = [
        f"{title}\n",
        " | ".join(["| layer", "rank (share of dense)", *names]) + " |",
        "| --- " * (2 + len(names)) + "|",
    ]
    for row in rows:
        cells = [f"{row[name]:.3f}" if name == "ratio" else f"{row[name]:.2%}" for name in names.values()]
        lines.append(" | ".join([f"| {row['layer']}", f"{row['rank']} ({row['share']:.0%})", *cells]) + " |")
    return "\n".join(lines) + "\n"


@console.script
def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--inputs", type=Path, default=ROOT / "build/minilm_inputs.safetensors", help="moments file")
    parser.add_argument(
        "--unseen", type=Path, default=ROOT / "build/minilm_inputs_unseen.safetensors", help="moments of unseen text"
    )
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="names of layers, from encoder.layer. on")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="ranks of the grid")
    parser.add_argument("--csv", type=Path, default=ROOT / "build/minilm_layers.csv", help="file of all numbers")
    parser.add_argument("--train", action="store_true", help="train every chain too")
    options = parser.parse_args(argv)
    machine = place(torch.device("cpu"))
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.layers:
        layer = read_layer(name, options.inputs, options.unseen)
        for row in compare(layer, options.ranks):
            rows.append(row | machine | (trained(layer, row["rank"], options.inputs) if options.train else {}))
            write_csv(options.csv, COLUMNS, rows)
            console.note(f"{row['layer']}, rank {row['rank']}: {row['seconds']:.0f} s")
    for title, names in TABLES.items():
        if title != "Trained" or options.train:
            print(markdown(title, names, rows))
    return console.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
