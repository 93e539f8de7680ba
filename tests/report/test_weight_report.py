"""The report holds what it must, loads nothing, and names no place on this machine."""

import dataclasses
import html
import json
import re
import shlex

import pytest
from drawn_study import CHAIN, PREDICT_ZERO, make_study
from html_page import Page

import rank_sweep_study
from ks.files.layout import FIGURES, SweepFiles
from ks.files.schema import StudyRecord, convert
from ks.report.figures.draw import inline_svg, study_figures
from ks.report.figures.parts import PANEL_WIDTH
from ks.report.read_results import Study
from ks.report.weight_report import reproducing_command, write_report

HASH = "c2f246c6ae7821dc" * 4
CONFIG = {
    "settings": {},
    "ranks": [2, 4],
    "seeds": [0],
    "title": "weight.pth",
    "answer": ["Rank 4 loses <45%> of the output energy.", "Rank 2 & more."],
    "advice": ["Rank 4 is undertrained. Increase --num_epochs."],
    "arguments": {"weight_path": "/home/someone/models/weight.pth", "ranks": [2, 4], "num_epochs": 10},
    "problem": {
        "chain": CHAIN.describe(), "predict_zero_loss": PREDICT_ZERO,
        "weight": {"sha256": HASH, "shape": [64, 96], "key": "layer.weight", "dtype": "float32"},
        "inputs": {"kind": "measured", "key": "layer", "sha256": "ab" * 32, "count": 5000, "held_out_count": 1200,
                   "effective_rank": 12.34},
    },
    "provenance": {"started": "2026-11-24T16:30:16+00:00", "cpu": "A CPU", "cpu_cores": 2, "torch": "2.13.0",
                   "python": "3.11", "git_revision": "abc", "host": "secret-host",
                   "command": ["/usr/bin/python", "/home/someone/rank_sweep_study.py"]},
}  # fmt: skip


def page_of(tmp_path, study: Study, log_scale=False) -> tuple[str, Page]:
    files = SweepFiles(tmp_path, "p")
    write_report(study, files, study_figures(study, log_scale=log_scale), log_scale=log_scale)
    text = files.report.read_text()
    return text, Page(text)


def measured_study(**changes) -> Study:
    study = make_study([2, 4], times={2: (1.0, 2.0), 4: (3.0, 2.0)}, target=0.5)
    return dataclasses.replace(study, config=convert(CONFIG | changes, StudyRecord, "a test"))


@pytest.mark.parametrize("log_scale", [False, True])
def test_the_report_holds_all_its_parts(tmp_path, log_scale):
    _, page = page_of(tmp_path, measured_study(), log_scale=log_scale)
    assert page.count("figure") == len(FIGURES)
    assert page.count("svg") == 2 + 3 + 4 * 1 + 6 - 1  # panels and legends; gaps have no legend
    assert page.count("h1") == 1
    assert page.count("table") == 2
    for words in (
        *("Rank 4 loses <45%> of the output energy.", "Rank 2 & more.", "layer.weight", "64 × 96", HASH, "float32"),
        *("monarch (rows", "50% / 90% / 99% of the output energy in the first ", "measured"),
        *("5,000, and 1,200 held out", "12.3", "relative loss", "latency ms batch 1", "undertrained"),
        *("Rank 4 is undertrained. Increase", "A CPU, 2 cores", "torch 2.13.0", "2026-11-24", "abc"),
        "python rank_sweep_study.py --weight_path weight.pth --num_epochs 10 --ranks 2 4",
        "outputs that are all 0",  # of the glossary
    ):
        assert words in page.text, words


@pytest.mark.parametrize(
    ("metric", "headings"),
    [
        ("output_energy", ["relative loss", "loss increase, nats per token"]),
        ("model_loss", ["loss increase, nats per token", "energy loss", "loss floor, nats per token"]),
    ],
)
def test_the_loss_of_the_model_is_explained_once_and_stands_beside_the_energy(tmp_path, metric, headings):
    inputs = CONFIG["problem"]["inputs"] | {"gradients_sha256": "cd" * 32, "damping": 0.1}
    study = measured_study(problem=CONFIG["problem"] | {"inputs": inputs})
    summary = study.summary.assign(loss_increase=0.01, energy_loss=0.5, loss_unit="nats", loss_metric=metric)
    text, page = page_of(tmp_path, dataclasses.replace(study, summary=summary))
    heads = re.findall(r"<th [^>]*>(.*?)</th>", text)
    assert [head for head in heads if head in headings] == headings
    assert page.text.count("½ tr(G (W − Ŵ) C (W − Ŵ)ᵀ)") == 1
    assert "the increase of the loss, in nats per token, that is predicted to second order" in page.text
    assert {"<dt>loss increase</dt>", "<dt>energy loss</dt>"} <= {*re.findall("<dt>.*?</dt>", text)}
    assert ("<dt>relative loss</dt>" in text) == (metric == "output_energy")
    assert "damped by 0.1 of its mean diagonal" in page.text
    assert "loss increase" not in page_of(tmp_path, study)[1].text


def test_losses_that_a_linear_axis_squashes_are_on_a_logarithmic_one_too(tmp_path):
    study = make_study([2, 4], num_epochs=1000)
    study.summary["population_loss"] /= 20
    for log_scale, count in ((False, 2), (True, 0)):
        _, page = page_of(tmp_path, study, log_scale=log_scale)
        assert page.count("figure") == len(FIGURES) - 1 + count  # no latency was measured
        assert page.text.count(" Linear axis.") == page.text.count(" Logarithmic axis.") == count


def test_metrics_have_a_figure_and_a_column(tmp_path):
    study = measured_study()
    curves = study.curves.assign(**{"top-5": study.curves["val_loss"]})
    summary = study.summary.assign(**{"final_top-5": [0.125, None]})
    text, page = page_of(tmp_path, dataclasses.replace(study, curves=curves, summary=summary))
    assert page.count("figure") == len(FIGURES) + 1
    assert ">final top-5</th>" in text
    assert "0.125" in page.text


def test_the_report_loads_nothing_runs_nothing_and_holds_no_path_of_this_machine(tmp_path):
    text, page = page_of(tmp_path, measured_study())
    assert page.loads == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    for secret in ("http", "@import", "/home", "someone", "secret-host", "/usr", str(tmp_path)):
        assert secret not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len({*ids})
    used = {*re.findall(r'href="#([^"]*)"', text), *re.findall(r"url\(#?([^)]*)\)", text)}
    assert used
    assert used <= {*ids}


def test_a_page_shows_every_panel_of_a_figure_and_its_legend_in_turn():
    figure = study_figures(measured_study())["latency"]
    page = Page(inline_svg(figure, "latency"))
    boxes = [
        [float(number) for number in attributes["viewbox"].split()] for tag, attributes in page.tags if tag == "svg"
    ]
    wide, (width, height) = 72 * PANEL_WIDTH, 72 * figure.get_size_inches()
    assert [left for left, *_ in boxes] == pytest.approx([0, wide, 2 * wide, (width - wide) / 2], abs=0.1)
    assert {width for _, _, width, _ in boxes} == {round(wide, 1)}
    assert boxes[0][1] == pytest.approx(72 * figure.above, abs=0.1)  # below the heading
    assert boxes[-1][1] + boxes[-1][3] == pytest.approx(height, abs=0.2)
    assert [attributes for _, attributes in page.tags].count({"href": "#latency-figure_1"}) == 3
    assert page.text == figure.finding
    assert all(text.get_visible() for text in figure.texts)


def test_what_a_user_named_is_text_and_never_markup(tmp_path):
    nasty = '<script>alert("x")</script> & $\\frac$ "'
    problem = {"weight": {"key": nasty, "sha256": nasty}, "chain": nasty}
    texts = {"title": nasty, "answer": [nasty, nasty], "advice": [nasty], "arguments": {"weight_path": nasty}}
    study = dataclasses.replace(measured_study(problem=problem, **texts), name=nasty)
    text, page = page_of(tmp_path, study)
    assert page.count("script") == 0
    assert "<script" not in text
    assert nasty in page.text
    assert html.escape(nasty) in text


def test_a_page_for_phone_dark_mode_and_print(tmp_path):
    text, page = page_of(tmp_path, make_study([2, 4]))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media print" in text
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all({"viewbox", "aria-label"} <= attributes.keys() and "width" not in attributes for attributes in svgs)
    assert svgs[0]["aria-label"].startswith("Rank 4 loses ")


def test_a_study_of_2025_has_a_page_too(tmp_path):
    study = make_study([2, 4], title=None, chain=None, predict_zero_loss=None)
    empty = study.summary.assign(relative_loss=None, parameters=None, compression_ratio=None, loss_floor=None)
    study = dataclasses.replace(study, summary=empty, floor=study.floor.iloc[:0])
    _, page = page_of(tmp_path, study)
    assert page.count("figure") == 2
    assert "final val loss" in page.text
    assert "Command" not in page.text


def test_texts_are_set_to_the_left_wherever_their_column_stands(tmp_path):
    study = make_study([2, 4])
    study.summary[["relative_loss", "loss_floor", "optimality_gap"]] = float("nan")
    text, _ = page_of(tmp_path, study)
    styled = re.findall(r'<t[hd][^>]* class="text"[^>]*>(.*?)</t', text)
    assert styled == ["verdict", *study.summary["verdict"].map(str)]


def test_only_a_floor_whose_bounds_differ_by_more_than_rounding_has_two(tmp_path):
    exact = make_study([2, 4])
    exact.summary["loss_floor_upper"] *= 1 + 5e-8
    for study, bracketed in ((make_study([2, 4], spread=1.2), True), (exact, False)):
        assert ("relative floor upper" in page_of(tmp_path, study)[1].text) == bracketed
        assert study.losses["bracketed"].any() == bracketed


ARGUMENTS = [
    *("--weight_path", "/a/b c/w.pth", "--weight_key=-odd", "--ranks", "2", "4", "--inputs", "/d/e.safetensors"),
    *("--output_dir", "/somewhere/results", "--lr", "0.01", "--log_scale", "--jobs", "2"),
]


def record_of(arguments, ranks, seeds=(0,)):
    """Return the record of a study and the arguments in it, as they are read back."""
    recorded = json.loads(json.dumps(vars(rank_sweep_study.build_parser().parse(arguments))))
    return StudyRecord({}, list(ranks), list(seeds), arguments=recorded), recorded


def test_the_command_parses_to_the_same_study_with_files_without_their_folders():
    record, recorded = record_of(ARGUMENTS, [2, 4])
    command = reproducing_command(record)
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "rank_sweep_study.py")
    again = json.loads(json.dumps(vars(rank_sweep_study.build_parser().parse(arguments))))
    names = {"weight_path": "w.pth", "inputs": "e.safetensors", "output_dir": "results"}
    assert again == recorded | names


def test_ranks_and_seeds_that_joined_later_are_in_the_command_and_other_defaults_are_left_out():
    record, _ = record_of(["--weight_path", "w.pth", "--max_rank", "8", "--overwrite"], [2, 4, 16], [0, 1])
    expected = "python rank_sweep_study.py --weight_path w.pth --ranks 2 4 16 --seeds 0 1"
    assert reproducing_command(record) == expected
