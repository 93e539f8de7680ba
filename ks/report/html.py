"""The report of a study: one page in one file, with its figures inside, that needs neither network nor scripts."""

from collections.abc import Iterable
from html import escape
from pathlib import PurePath
from typing import Any

import pandas as pd

from ks.files import columns
from ks.files.atomic import atomic_path
from ks.files.layout import SweepFiles
from ks.files.status import Status
from ks.report.command import reproducing_command
from ks.report.figures.draw import study_figures
from ks.report.figures.svg import inline_svg
from ks.report.speed import measured_batches
from ks.report.study import MEAN_SQUARED_ERROR, Study

FIGURE_SIZE = (5.2, 4.2)  # inches; in this width, text is legible on a phone
CAPTIONS = {
    "loss_curves": "Loss by epoch; where there are floors, dashed: no chain of the rank gets below its own.",
    "final_losses": "Where every rank ends, beside its floor if it has one.",
    "floor": "What each rank could reach at best, and what training reached.",
    "gap": "How much of the output energy more epochs could still save.",
    "front": "Loss against size: which family loses least with so many parameters.",
    "latency": "Loss against the measured time of a forward pass; right of the line, dense is faster.",
}
GLOSSARY = (
    "Energy lost is E‖Wx − Ŵx‖² / E‖Wx‖² of the outputs: 0% is dense, 100% is predicting 0. The floor is the least "
    "loss that any chain of the rank can have; where two numbers stand, it lies between them. "
)
SHARES_OF_ENERGY = (0.5, 0.9, 0.99)

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5a5a5a; --line: #d8d8d8; --page: #fff; --card: #f6f6f4; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --soft: #a8a8a4; --line: #3c3c3a; --page: #161616; --card: #212120; }
  figure svg { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0.4rem 0; max-width: 48rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 48rem; margin: 0.3rem 0; }
ul { padding-left: 1.2rem; }
.soft, figcaption, th, dt { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 3.6rem; }
th.verdict, td.verdict { text-align: left; white-space: normal; min-width: 11rem; }
.figures { columns: 26rem; column-gap: 1.4rem; }
figure { margin: 0 0 1.4rem; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: 0.85rem; }
pre { background: var(--card); padding: 0.7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.85rem; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dt { margin-top: 0.4rem; } }
@media print {
  @page { margin: 15mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  h1 { font-size: 15pt; } h2 { break-after: avoid; }
  figure, tr, pre, dl { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 8.5pt; } th, td { padding: 0.15rem 0.3rem; }
  th.verdict, td.verdict { min-width: 0; }
  .figures { columns: 2; }
}
"""


def write_report(study: Study, files: SweepFiles, *, log_scale: bool = False, title: str | None = None) -> None:
    """Write the report of a study atomically.

    Args:
        study: with its answer and its config, as far as they are known.
        files: of the sweep.
        log_scale: logarithmic loss axes.
        title: instead of the name of the study in the figures.
    """
    look: dict[str, Any] = {"log_scale": log_scale, "title": title or "", "figsize": FIGURE_SIZE}
    drawn = study_figures(study, metrics=study.metrics, **look)
    figures = {name: inline_svg(figure, name) for name, figure in drawn.items()}
    with atomic_path(files.report) as temporary:
        temporary.write_text(report_page(study, figures), encoding="utf-8")


def report_page(study: Study, figures: dict[str, str]) -> str:
    """Return the page as HTML.

    Args:
        study: with its answer and its config, as far as they are known.
        figures: <svg> elements, by the name of the figure.
    """
    name = study.title or study.name
    first, *others = study.answer or (name,)
    remarks = study.config.advice if study.config else []
    sections = [
        ("Weight", _definitions(_weight(study))),
        ("Inputs", _definitions(_inputs(study))),
        ("Ranks", _table(study)),
        ("Figures", '<div class="figures">' + "".join(_figure(*drawn) for drawn in figures.items()) + "</div>"),
        ("Remarks", _items(remarks)),
        ("Provenance", _definitions(_provenance(study))),
        ("Command", _command(study)),
    ]
    body = "\n".join(f"<section>\n<h2>{title}</h2>\n{content}\n</section>" for title, content in sections if content)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="soft">{escape(name)}</p>
<h1>{escape(first)}</h1>
{_items(others)}
</header>
{body}
<footer>
<p class="soft">{GLOSSARY if study.loss_label == MEAN_SQUARED_ERROR else ""}Latency is the median time of a forward
pass.</p>
</footer>
</body>
</html>
"""


def _items(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _definitions(pairs: dict[str, str | None]) -> str:
    known = {term: text for term, text in pairs.items() if text}
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in known.items())
    return f"<dl>{items}</dl>" if items else ""


def _figure(name: str, svg: str) -> str:
    caption = CAPTIONS.get(name, "A metric by epoch, on the validation samples.")
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _weight(study: Study) -> dict[str, str | None]:
    config = study.config
    if config is None:
        return {}
    weight = config.problem.weight
    path = config.arguments.get("weight_path")
    shape = weight.shape and f"{weight.shape[0]} × {weight.shape[1]}, {weight.shape[0] * weight.shape[1]:,} parameters"
    return {
        "file": PurePath(path).name if isinstance(path, str) else None,
        "key": weight.key,
        "shape (out × in)": shape,
        "dtype": weight.dtype,
        "chain": study.chain,
        "criterion": _criterion(study),
        "spectrum": _spectrum(study),
        "sha256": weight.sha256,
    }


def _criterion(study: Study) -> str | None:
    criterion = study.config and study.config.settings.get("criterion")
    if criterion is None or study.loss_label == MEAN_SQUARED_ERROR:
        return None
    return f"{criterion}; losses are those of outputs in units of the root mean square of W x, and no floor holds"


def _spectrum(study: Study) -> str | None:
    """Return how many directions carry most of the output energy, from the floors of low-rank chains."""
    lost = study.floor[study.floor["chain"] == "lowrank"].set_index("rank")["relative_loss"]
    if lost.empty:
        return None
    ranks = [lost.index[lost <= 1 - share + 1e-12].min() for share in SHARES_OF_ENERGY]
    if any(map(pd.isna, ranks)):
        return None
    shares = " / ".join(f"{share:.0%}" for share in SHARES_OF_ENERGY)
    return f"{shares} of the output energy in the first {' / '.join(map(str, ranks))} of {lost.index.max()} directions"


def _inputs(study: Study) -> dict[str, str | None]:
    if study.config is None or study.config.problem.inputs.kind is None:
        return {}
    inputs = study.config.problem.inputs
    if inputs.kind == columns.ISOTROPIC:
        std = f", standard deviation {inputs.std:g}" if inputs.std is not None else ""
        return {"kind": f"isotropic{std}; those of a real layer differ"}
    path, count, held_out = study.config.arguments.get("inputs"), inputs.count or 0, inputs.held_out_count or 0
    return {
        "kind": f"measured{', around their mean' if inputs.centred else ''}",
        "file": PurePath(path).name if isinstance(path, str) else None,
        "key": inputs.key,
        "samples": f"{count:,}, and {held_out:,} held out",
        "effective rank": f"{inputs.effective_rank:.1f}" if inputs.effective_rank is not None else None,
        "sha256": inputs.sha256,
    }


def _table(study: Study) -> str:
    """Return the ranks as a table, without columns that are empty."""
    rows = study.summary.to_dict("records")
    cells: dict[str, list[str]] = {
        "rank": [f"{row['rank']}" for row in rows],
        "energy lost": [_text(row["relative_loss"], "{:.2%}") for row in rows],
        "floor": [_floor(row, study.predict_zero_loss) for row in rows],
        "verdict": [_verdict(row) for row in rows],
        "held out": [_text(row["held_out_relative_loss"], "{:.2%}") for row in rows],
        "gap to the floor": [_text(row["optimality_gap"], "{:.2%}") for row in rows],
        "validation loss": [_text(row["final_val_loss"], "{:.4g}") for row in rows],
        "parameters": [_text(row["parameters"], "{:,.0f}") for row in rows],
        "share of dense": [_text(row["compression_ratio"], "{:.1%}", lambda ratio: 1 / ratio) for row in rows],
    }
    for batch in measured_batches(rows):
        times = [[_text(row[f"{kind}latency_ms_batch_{batch}"], "{:.3g}") for kind in ("", "dense_")] for row in rows]
        cells[f"ms at batch {batch} (dense)"] = [f"{chain} ({dense})" if chain else "" for chain, dense in times]
    for metric in study.metrics:
        cells[f"final {metric}"] = [_text(row.get(f"{columns.FINAL}{metric}"), "{:.4g}") for row in rows]
    shown = {header: column for header, column in cells.items() if any(column)}
    if "energy lost" in shown:
        shown.pop("validation loss", None)
    classes = [' class="verdict"' if header == "verdict" else "" for header in shown]
    head = "".join(f'<th scope="col"{kind}>{escape(header)}</th>' for kind, header in zip(classes, shown))
    lines = (
        "".join(f"<td{kind}>{escape(cell or '–')}</td>" for kind, cell in zip(classes, line))
        for line in zip(*shown.values())
    )
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _text(value, form: str, change=lambda value: value) -> str:
    return "" if pd.isna(value) else form.format(change(value))


def _verdict(row: dict) -> str:
    """Return the verdict of a rank, after its status if that is not plainly ok."""
    known = [str(row[name]) for name in ("status", "verdict") if not pd.isna(row[name])]
    return ", ".join(known[1:] if known[0:1] == [Status.OK] and len(known) > 1 else known)


def _floor(row: dict, predict_zero_loss: float | None) -> str:
    if pd.isna(row["loss_floor"]) or predict_zero_loss is None:
        return ""
    lower, upper = (row[name] / predict_zero_loss for name in ("loss_floor", "loss_floor_upper"))
    exact = row["loss_floor_is_exact"]
    return f"{lower:.2%}" if pd.isna(exact) or exact else f"{lower:.2%} to {upper:.2%}"


def _provenance(study: Study) -> dict[str, str | None]:
    if study.config is None:
        return {}
    found = study.config.provenance.items()
    known = {name: str(value) for name, value in found if isinstance(value, (str, int, float))}
    cores = f"{known['cpu']}, {known['cpu_cores']} cores" if {"cpu", "cpu_cores"} <= known.keys() else known.get("cpu")
    hardware = [known["gpu"], f"CUDA {known.get('cuda')}"] if "gpu" in known else [cores]
    return {
        "started": known.get("started"),
        "device": ", ".join(filter(None, hardware)),
        "platform": known.get("platform"),
        "versions": ", ".join(f"{name} {known[name]}" for name in ("python", "torch") if name in known),
        "git revision": known.get("git_revision"),
    }


def _command(study: Study) -> str:
    if study.config is None or not study.config.arguments:
        return ""
    return f"<pre><code>{escape(reproducing_command(study.config.arguments))}</code></pre>"
