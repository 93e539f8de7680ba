import pytest

from ks.bounds.shares import shares


@pytest.mark.parametrize(
    ("values", "texts"),
    [((0.1, 0.1007), ["10%", "10.07%"]), ((0.1, 0.100001), ["10.0000%", "10.0001%"]), ((1e-5,), ["0.001%"])],
)
def test_shares_tell_different_losses_apart(values, texts):
    assert shares(*values) == [text.replace("10.0000", "10") for text in texts]
