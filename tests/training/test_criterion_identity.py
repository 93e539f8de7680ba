"""The identity of what a person edits: the same for the same source, another for whatever changes the result."""

import pytest
import torch
from conftest import METRICS, ROOT, edited_text

from ks.errors import UsageError
from ks.training.criterion_identity import TOOLKIT, edits_of

VERSION = torch.__version__.split("+")[0]


@pytest.fixture
def criterion_of(tmp_path, monkeypatch):
    """Return the identity of a criterion as it stands in the training script."""
    monkeypatch.syspath_prepend(tmp_path)

    def identity(text, metrics=""):
        (tmp_path / "train_with_random.py").write_text(edited_text(text, metrics))
        return edits_of(tmp_path / "train_with_random.py").criterion

    return identity


def test_the_script_as_it_is_has_the_criterion_and_the_metrics_of_the_toolkit():
    assert edits_of(ROOT / "train_with_random.py") == TOOLKIT
    assert TOOLKIT.criterion_is_ours


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("criterion = torch.nn.functional.l1_loss", f"torch.nn.functional.l1_loss of torch {VERSION}"),
        ("criterion = torch.nn.HuberLoss(delta=0.5)", f"torch.nn.HuberLoss(delta=0.5) of torch {VERSION}"),
        ("from torch.nn.functional import l1_loss as criterion", f"torch.nn.functional.l1_loss of torch {VERSION}"),
        ("from ks.training.criterion import mean_squared_error as criterion", "mean_squared_error"),
        ("mse = mean_squared_error\ncriterion = mse", "mean_squared_error"),
    ],
)
def test_a_function_of_a_library_is_identified_by_its_name_and_version(criterion_of, text, identity):
    assert criterion_of(text) == identity


DEFINED = "def criterion(prediction, target):\n    return helper(prediction - target)\n\n"
HELPER = "LIMIT = 0.5\n\n\ndef helper(x):\n    return x.clamp(-LIMIT, LIMIT).square().mean()\n\n"
SAME = DEFINED + HELPER
OTHERS = {
    "another body": SAME.replace("prediction - target", "target - 2 * prediction"),
    "a constant in an if": SAME.replace("LIMIT = 0.5", "if True:\n    LIMIT = 0.6\nelse:\n    LIMIT = 0.5"),
    "changed later": SAME + "LIMIT *= 2\n",
    "a decorator": f"@torch.compile\n{SAME}",
    "an attribute set later": SAME + "helper.fast = True\n",
    "bound twice": SAME + "criterion = torch.nn.functional.mse_loss\n",
    "mse, wrapped": "def criterion(prediction, target):\n    return mean_squared_error(prediction, target)\n",
    "another name imported as ours": "from torch.nn.functional import mse_loss as mean_squared_error\n"
    "criterion = mean_squared_error\n",
}


@pytest.mark.parametrize("case", OTHERS)
def test_whatever_the_criterion_uses_changes_its_identity(criterion_of, case):
    before = criterion_of(SAME)
    assert before.startswith("user-defined sha256 ")
    assert criterion_of(OTHERS[case]) != before
    assert criterion_of(OTHERS[case]) != "mean_squared_error"


def test_two_statements_in_a_line_both_count(criterion_of):
    text = "SHIFT = 1; LIMIT = 0.5\n\n\ndef criterion(p, t):\n    return (p - t - SHIFT).clamp(max=LIMIT).mean()\n"
    found = {criterion_of(text.replace(*change)) for change in (("", ""), ("SHIFT = 1", "SHIFT = 2"), ("0.5", "0.6"))}
    assert len(found) == 3


def test_what_the_criterion_does_not_use_leaves_its_identity(criterion_of):
    before = criterion_of(SAME)
    assert criterion_of(SAME.replace("    return helper", "    # all outputs\n    return  helper")) == before
    assert criterion_of(f"OTHER = 1\n{SAME}\ndef unused():\n    return criterion\n") == before
    assert criterion_of(SAME, metrics="    return {'a': prediction.mean()}") == before


def test_a_file_of_the_user_is_hashed(criterion_of, tmp_path):
    text = "from my_losses import robust\ncriterion = robust"
    (tmp_path / "my_losses.py").write_text("robust = 1")
    before = criterion_of(text)
    assert before.startswith("my_losses.robust sha256 ")
    (tmp_path / "my_losses.py").write_text("robust = 2")
    assert criterion_of(text) != before


def test_metrics_are_none_or_a_hash(tmp_path):
    path, found = tmp_path / "train_with_random.py", []
    for metrics in (METRICS.rstrip(), "    return {'a': prediction.mean()}", "    return {'a': target.mean()}"):
        path.write_text(edited_text(metrics=metrics))
        found.append(edits_of(path).metrics)
    assert found[0] == "none"
    assert all(text.startswith("user-defined sha256 ") for text in found[1:])
    assert found[1] != found[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [("criterion = (", "train_with_random.py, line "), ("other = 3", "defines no criterion at its top level")],
)
def test_a_script_that_cannot_be_read_is_one_line(criterion_of, text, message):
    with pytest.raises(UsageError, match=message):
        criterion_of(text)
