"""What identifies a run or a study, and what differs."""

from ks.training.run_state import changes


def test_changed_settings_are_named_one_by_one():
    assert changes({"num_epochs": 2}, {"num_epochs": 3}) == ""
    assert changes({"num_epochs": 3}, {"num_epochs": 2}) == "num_epochs was 3, now 2"
    assert changes({"num_epochs": None}, {"num_epochs": 2}) == "num_epochs was None, now 2"
    before = {"lr": 0.1, "seed": 0}
    assert changes(before, {"lr": 0.1, "seed": 0}) == ""
    assert (
        changes(before, {"lr": 0.2, "seed": 0, "dtype": "float16"})
        == "lr was 0.1, now 0.2, dtype was None, now float16"
    )
