import pytest

from ks.report.percent import percents


@pytest.mark.parametrize(
    ("values", "texts"),
    [((0.1, 0.1007), ["10%", "10.07%"]), ((0.1, 0.100001), ["10.0000%", "10.0001%"]), ((1e-5,), ["0.001%"])],
)
def test_different_losses_have_different_texts(values, texts):
    assert percents(*values) == [text.replace("10.0000", "10") for text in texts]
