"""Compress the FFN layers of all-MiniLM-L6-v2, and compare sentence embeddings with those of the dense model.

    pip install --no-deps -r requirements-examples.txt
    python benchmarks/minilm_embeddings.py
    python benchmarks/minilm_embeddings.py --calibration mixed --budgets 0.6

The program collects inputs and gradients of the twelve FFN weights by random directions of the normalised sentence
embedding, plans them as low-rank chains, compresses without training, and prints as Markdown the mean cosine between
both embeddings, and the rank correlation of the similarities of all pairs. The texts are 200 unseen docstrings, 200
unseen paragraphs of package descriptions, and ten everyday sentences. The last row is torch's dynamic quantisation to
int8. It writes build/minilm_inputs_CALIBRATION.safetensors.
"""

import argparse
import sys
from itertools import product

import torch
from english import descriptions, docstrings, source_files
from minilm import ROOT
from minilm_model import MiniLM, batch_of, batches, load_minilm

import ks
from ks.cli import console

LAYERS = ("encoder.layer.*.intermediate.dense", "encoder.layer.*.output.dense")
EVERYDAY = (
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "The stock market fell sharply today.",
    "Shares lost much of their value this morning.",
    "She baked a chocolate cake for her birthday.",
    "The train to Berlin leaves at nine.",
    "It has been raining since early morning.",
    "He plays the violin in an orchestra.",
    "The new phone has a better camera.",
    "Doctors recommend eight hours of sleep.",
)
UNSEEN = 200  # texts of each kind
Texts = dict[str, list[str]]


def split_texts() -> tuple[Texts, Texts]:
    """Return texts to calibrate on and unseen ones, by their kind: of other source files and of other packages."""
    files, seen = source_files(), set[str]()
    boundary = len(files) * 3 // 4
    known = {"docstrings": list(docstrings(files[:boundary], seen)), "descriptions": list(descriptions())}
    unseen = {"docstrings": list(docstrings(files[boundary:], seen))[:UNSEEN]}
    unseen["descriptions"] = known["descriptions"][-UNSEEN:]
    known["descriptions"] = known["descriptions"][:-UNSEEN]
    return known, unseen | {"everyday": list(EVERYDAY)}


def calibration(known: Texts, kind: str, tokens: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of one kind of text, or of both in turn, until they hold a number of tokens."""
    if kind != "mixed":
        return batches(known[kind], tokens)
    parts = [batches(texts, tokens // 2) for texts in known.values()]
    return [batch for pair in zip(*parts) for batch in pair]


def embeddings(model: MiniLM, texts: list[str]) -> torch.Tensor:
    return torch.cat([model.embed(batch_of(texts[start : start + 16])) for start in range(0, len(texts), 16)])


def scores(dense: torch.Tensor, small: torch.Tensor) -> str:
    """Return the mean cosine, and Spearman's correlation of the similarities of all pairs."""
    above = torch.ones(len(dense), len(dense)).triu(1).bool()
    ranks = [(each @ each.t())[above].argsort().argsort().double() for each in (dense, small)]
    return f"{(dense * small).sum(1).mean():.3f}, {torch.corrcoef(torch.stack(ranks))[0, 1]:.3f}"


@console.script
def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=55_000, help="tokens of the calibration; a fifth is held out")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.6], help="fractions of the parameters")
    kinds = ("docstrings", "descriptions", "mixed")
    parser.add_argument("--calibration", choices=kinds, default="docstrings", help="the kind of text")
    options = parser.parse_args(argv)
    model, (known, unseen) = load_minilm(), split_texts()
    dense = {kind: embeddings(model, texts) for kind, texts in unseen.items()}

    def show(*cells: str, small: MiniLM) -> None:
        values = [scores(dense[kind], embeddings(small, texts)) for kind, texts in unseen.items()]
        print(f"| {' | '.join([*cells, *values])} |", flush=True)

    loss = ks.RandomDirections(ks.sentence_embedding)
    chosen = calibration(known, options.calibration, options.tokens)
    moments = ks.collect_input_moments(model, chosen, LAYERS, loss=loss, model_name="all-MiniLM-L6-v2", quiet=True)
    moments.save(ROOT / "build" / f"minilm_inputs_{options.calibration}.safetensors")
    print(f"| budget | made for | allocation | {' | '.join(unseen)} |\n{'| --- ' * (3 + len(unseen))}|")
    for budget, metric in product(options.budgets, ("output_energy", "model_loss")):
        given = {"moments": moments, "chains": ("lowrank",), "loss_metric": metric, "quiet": True}
        plan = ks.plan_model(model, LAYERS, budget=budget, **given)
        for allocation, each in (("equal fractions", plan.as_uniform()), ("planned", plan)):
            small = ks.compress(load_minilm(), each, moments=moments, quiet=True)
            show(f"{budget:g}", metric, allocation, small=small)
    show("int8", "", "", small=torch.ao.quantization.quantize_dynamic(load_minilm(), {torch.nn.Linear}))
    return console.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
