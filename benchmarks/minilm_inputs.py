"""Collect the moments of the inputs of all-MiniLM-L6-v2 on English text, and of gradients at the outputs.

    pip install --no-deps -r requirements-examples.txt
    python benchmarks/minilm_inputs.py
    python benchmarks/minilm_inputs.py --measure

The program writes build/minilm_inputs.safetensors (50,000 tokens for training, 12,500 held out) and
build/minilm_inputs_unseen.safetensors (20,000 tokens of other source files). The text is the docstrings of pandas,
matplotlib and networkx in a fixed order. The gradients are those of random directions of the sentence embedding, for
the training text alone. The program checks the forward pass on four sentences, and prints effective
rank and condition of every second moment as a Markdown table. `--measure` compares collecting, without and with
gradients, with the bare passes instead.
"""

import argparse
import functools
import sys
import time
from pathlib import Path
from statistics import median

import torch
from minilm import ROOT
from minilm_model import batch_of, load_minilm, split_text

import ks
from ks.cli import console
from ks.files.provenance import cpu_name, peak_memory
from ks.moments.moments_file import InputMoments

SENTENCES = (
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "The stock market fell sharply today.",
    "Shares lost much of their value this morning.",
)
ALL_LAYERS = "encoder.**"
OUTPUTS = "encoder.layer.*.output.dense"
MODEL_NAME = "all-MiniLM-L6-v2"


def check_forward(model) -> None:
    """Check that the embeddings of sentences with one meaning are closer than those of the others."""
    cosines = model.embed(batch_of(list(SENTENCES)))
    cosines = cosines @ cosines.t()
    same, other = cosines[[0, 2], [1, 3]], cosines[:2, 2:]
    console.note(f"cosines of two paraphrases {same[0]:.2f}, {same[1]:.2f}; of other pairs at most {other.max():.2f}")
    if same.min() < other.max() + 0.2:
        raise SystemExit("the forward pass is wrong: unrelated sentences are as close as paraphrases")


def spectrum_table(moments: InputMoments) -> str:
    """Return effective rank (tr C)²/‖C‖_F² and condition of the second moment of every input, as Markdown."""
    lines = ["| input of | width | tokens | effective rank | condition |", "| --- | --- | --- | --- | --- |"]
    for name, sums in moments.train.items():
        second_moment = sums.sum_xx / sums.count
        values = torch.linalg.eigvalsh(second_moment)
        effective_rank = (values.sum().square() / values.square().sum()).item()
        condition = (values[-1] / values[0]).item() if values[0] > 0 else float("inf")
        lines.append(f"| {name} | {sums.width} | {sums.count} | {effective_rank:.1f} | {condition:.1e} |")
    return "\n".join(lines)


def measure(model, batches, rounds: int) -> None:
    """Print the CPU time of the bare passes, and what collecting adds to it and holds in memory, as Markdown.

    With gradients, of random directions of the sentence embedding, collecting stands beside forward and backward.
    Every round takes all variants in turn, and the medians count; CPU time, because other programs may run.
    """

    def collect(layers, loss):
        return ks.collect_input_moments(model, batches, layers, loss=loss, quiet=True)

    @torch.no_grad()
    def forward():
        for batch in batches:
            model(**batch)

    def backward():
        for batch in batches:
            directions(model(**batch), batch).backward()
        model.zero_grad()

    directions = ks.RandomDirections(ks.sentence_embedding)
    bare = {None: ("forward", forward), directions: ("forward and backward", backward)}
    choices = {"`output.dense`": OUTPUTS, "all": ALL_LAYERS}
    kinds = [(name, loss) for loss in bare for name in choices]
    variants = dict(bare.values()) | {kind: functools.partial(collect, choices[kind[0]], kind[1]) for kind in kinds}
    times: dict = {kind: [] for kind in variants}
    found = {kind: variant() for kind, variant in variants.items()}  # a round that warms up
    for _ in range(rounds):
        for kind, variant in variants.items():
            started = time.process_time()
            variant()
            times[kind].append(time.process_time() - started)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = sum(batch["input_ids"].numel() for batch in batches)
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{tokens} tokens and {padded - tokens} of padding in {len(batches)} batches; {cpu_name()}, {threads}\n")
    print("| layers | input tensors | bare passes | bare, CPU s | with collecting, CPU s | factor | sums, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, loss in kinds:
        moments = found[name, loss]
        parts = (moments.train, moments.held_out, moments.gradients, moments.held_out_gradients)
        mib = sum(sums.sum_xx.nbytes + sums.sum_x.nbytes for part in parts for sums in part.values()) / 2**20
        passes, collecting = median(times[bare[loss][0]]), median(times[name, loss])
        cells = f"{bare[loss][0]} | {passes:.1f} | {collecting:.1f} | {collecting / passes:.2f} | {mib:.0f}"
        print(f"| {name} ({len(moments.aliases)}) | {len(moments.train)} | {cells} |")


@console.script
def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=50_000, help="training tokens; a quarter more are held out")
    parser.add_argument("--unseen_tokens", type=int, default=20_000, help="tokens of other source files")
    parser.add_argument("--layers", nargs="+", default=[ALL_LAYERS], help="globs of layers (default: all)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "build", help="folder of both files")
    parser.add_argument("--measure", action="store_true", help="time collecting on 10,000 tokens, write nothing")
    options = parser.parse_args(argv)
    model = load_minilm()
    check_forward(model)
    if options.measure:
        measure(model, split_text(10_000, 0)[0], rounds=5)
        return console.EXIT_OK
    seen, unseen = split_text(options.tokens * 5 // 4, options.unseen_tokens)
    loss = ks.RandomDirections(ks.sentence_embedding)
    moments = ks.collect_input_moments(model, seen, options.layers, loss=loss, model_name=MODEL_NAME)
    of_unseen = ks.collect_input_moments(model, unseen, options.layers, held_out=0, model_name=MODEL_NAME, quiet=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, found in (("minilm_inputs", moments), ("minilm_inputs_unseen", of_unseen)):
        found.save(options.output_dir / f"{name}.safetensors")
        console.note(f"wrote {options.output_dir / name}.safetensors")
    console.note(f"peak memory {peak_memory(torch.device('cpu'))['peak_host_mib']:.0f} MiB")
    print(spectrum_table(moments))
    return console.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
