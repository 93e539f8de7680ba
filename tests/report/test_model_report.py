"""The page of a checkpoint, from a plan and a summary in a folder."""

import dataclasses

import pytest
from drawn_study import make_plan, make_study
from html_page import Page

from ks.files.atomic import write_json
from ks.files.layout import SweepFiles
from ks.report.figures.draw import plans_figures
from ks.report.model_report import findings, measured_plans, write_model_report
from ks.report.read_results import read_study
from ks.report.summary import write_summary


@pytest.fixture
def written(tmp_path):
    """Return a function that writes the page of a plan of a.weight, of which ranks 2 and 8 were trained."""

    def write(plan) -> tuple[str, Page]:
        files = SweepFiles(tmp_path, "p")
        summary = make_study([2, 8]).summary.assign(weight_key="a.weight", loss_increase=0.75, energy_loss=0.5)
        write_summary(files, summary.where(summary.notna(), None).to_dict("records"))
        record = {"settings": {}, "ranks": [], "seeds": [0], "layers": ["a.weight"], "arguments": {"budget": 0.5}}
        write_json(files.config, record)
        write_json(files.plan_record, record)
        plan.save(files.plan_json)
        measured = measured_plans(tmp_path)
        write_model_report(read_study(files), files, measured, plans_figures([*measured.values()]))
        return files.report.read_text(), Page(files.report.read_text())

    return write


def test_planned_and_trained_stand_beside_each_other_and_ranks_beside_the_plan_below(written):
    plan = make_plan(8, 0.481, None, 0.613, None)
    text, page = written(plan)
    assert "<h1>The trained chains are predicted to cost the model 0.75 nats per token, with 50.00%" in text
    assert "the plan predicts 0.481." in page.text
    assert "a.weight lowrank 8 50.0% 0.481 0.75 0.00% 50.00%" in page.text
    assert "all: sum of increases, mean of energies - - 50.0% 0.481 0.75" in page.text
    assert page.text.partition("Other ranks")[2].partition("a.weight")[2].split()[0] == "2"
    assert page.loads == []  # the layer has no page
    layer = dataclasses.replace(plan.layers[0], interpolated=True)
    assert "50.0% ~0.481 0.75 ~0.00% 50.00%" in written(dataclasses.replace(plan, layers=(layer,)))[1].text


def test_a_plan_that_was_misjudged_is_the_heading_and_its_increases_are_drawn(written):
    text, page = written(make_plan(8, 0.481, 1.284, 0.613, 0.87))
    assert "<h1>WARNING: this plan is predicted to be better" in text
    assert page.count("figure") == 1
    assert "p_plan.json 50.0% 0.481 1.28 2.67" in page.text


def test_only_the_first_of_many_failures_are_listed():
    study = make_study([1, 2, 4, 8])
    failed = dataclasses.replace(study, summary=study.summary.assign(status="diverged", weight_key="a.weight"))
    expected = "Not every run ended well: a.weight, rank 1: diverged; a.weight, rank 2: diverged; a.weight, rank 4: "
    assert findings(failed, None)[0] == f"{expected}diverged; and 1 more."


def test_without_a_plan_the_trained_ranks_are_listed_however_many():
    study = make_study([1, 2, 3, 4, 8, 16])
    study.summary["weight_key"] = ["a.weight", "b.weight"] * 3
    assert findings(study, None) == ["2 layers, at ranks 1, 2, 3, 4, 8, 16."]
