"""The learning problem that the flags describe."""

import pytest

from ks.errors import UsageError
from ks.training.problem import choose_sampling


def test_sampling_choice():
    assert choose_sampling("auto", 10, 10)[0] == "whitened"
    assert choose_sampling("auto", 9, 10)[0] == "fresh"
    assert choose_sampling("fixed", 9, 10)[0] == "fixed"
    with pytest.raises(UsageError, match="needs at least 10 training samples"):
        choose_sampling("whitened", 9, 10)
