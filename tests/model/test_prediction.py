"""The increase of the loss in words, and the factor of measured over predicted increases."""

import pytest

from ks.model.prediction import measured_over_predicted, per_token


@pytest.mark.parametrize(
    ("increase", "unit", "words"),
    [
        (0.0042, "nats", "0.0042 nats per token (perplexity × 1.004)"),
        (0.000042, "nats", "4.2e-05 nats per token (perplexity × 1.000042)"),
        (0.0123, "nats", "0.0123 nats per token (perplexity × 1.012)"),
        (-0.5, "nats", "-0.5 nats per token (perplexity × 0.6065)"),
        (5000, "nats", "5e+03 nats per token"),
        (0.25, "half the squared change of the outputs", "0.25 per token (half the squared change of the outputs)"),
        (0.25, "", "0.25 per token"),
    ],
)
def test_an_increase_in_nats_is_also_one_of_the_perplexity(increase, unit, words):
    assert per_token(increase, unit) == words


def test_every_plan_counts_alike_in_the_factor():
    assert measured_over_predicted([(0.1, 0.1), (10, 160)]) == pytest.approx(4)
