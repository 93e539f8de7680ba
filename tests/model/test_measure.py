"""The loss of a model and the comparison of two, against sums written out; the models stay as they were."""

import contextlib
import copy
import math
from functools import partial

import pytest
import torch
from conftest import refusal
from networks import normal
from torch.nn.functional import cosine_similarity, cross_entropy

import ks
from ks.model import measure

VOCABULARY = 7
IDS = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])


class Language(torch.nn.Module):
    """Logits of the next token, which depend on this one alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(VOCABULARY, 6), torch.nn.Linear(6, VOCABULARY)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.dropout(self.embed(input_ids)))


@pytest.fixture
def pair(monkeypatch):
    """A dense model and one with another head; a call takes as many seconds as the batch has entries, or twice."""
    monkeypatch.setattr(
        measure,
        "interleaved_medians",
        lambda functions, device, seconds, rounds: {
            name: len(function()) * factor for (name, function), factor in zip(functions.items(), (2, 1))
        },
    )
    torch.manual_seed(0)
    dense = Language()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small.head.weight += 0.3 * normal(VOCABULARY, 6)
    return dense, small


BATCHES = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:1]}]
PAIRS = 4 + 2 + 1 + 4  # of a token and the next one


def test_the_mean_is_over_all_tokens_of_all_batches(pair):
    model = pair[0]
    found = ks.measure_loss(model, BATCHES, ks.NextTokenLoss())
    logits = model.eval()(IDS)
    rows = [(0, 5), (1, 3), (2, 2), (0, 5)]
    total = sum(cross_entropy(logits[row, : n - 1], IDS[row, 1:n], reduction="sum").item() for row, n in rows)
    assert found.mean == pytest.approx(total / PAIRS, rel=1e-6)
    assert (found.tokens, found.unit) == (PAIRS, "nats")
    assert found.perplexity == pytest.approx(math.exp(total / PAIRS), rel=1e-6)
    by_function = ks.measure_loss(model, [IDS], lambda output, batch: output.new_tensor(30.0))
    assert (by_function.mean, by_function.tokens) == (2.0, 15)


def test_both_models_are_compared_on_what_counts(pair):
    dense, small = (model.eval() for model in pair)
    found = ks.compare(*pair, BATCHES, ks.NextTokenLoss())
    with torch.no_grad():
        before, after = (torch.cat([model(IDS)[MASK.bool()], model(IDS[0])]) for model in (dense, small))
        places = [(0, 4), (1, 2), (2, 1), (0, 4)]
        log_p, log_q = (torch.cat([model(IDS[row, :n]) for row, n in places]).log_softmax(-1) for model in pair)
    losses = [ks.measure_loss(model, BATCHES, ks.NextTokenLoss()) for model in pair]
    assert found.losses == tuple(losses)
    assert found.tokens == len(before) == 15
    assert found.increase == pytest.approx((losses[1].mean - losses[0].mean) * PAIRS / 15)
    assert found.divergence == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item() / PAIRS, rel=1e-5)
    assert found.cosine == pytest.approx(cosine_similarity(before, after).mean().item(), rel=1e-5)
    assert found.relative_change == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-5)
    numbers = 13 * VOCABULARY
    assert (found.parameters, found.num_bytes) == ((numbers, numbers), (4 * numbers, 4 * numbers))
    assert found.milliseconds == {1: (2000, 1000), 3: (6000, 3000)}


def test_the_increase_of_drawn_labels_is_the_divergence_and_that_of_directions_half_the_squared_change(pair):
    drawn = ks.compare(*pair, BATCHES, ks.NextTokenLoss("model"))
    assert drawn.increase == pytest.approx(drawn.divergence * PAIRS / 15)
    assert drawn.losses is None
    found = ks.compare(*pair, BATCHES, ks.RandomDirections(ks.sentence_embedding))
    with torch.no_grad():
        before, after = (
            torch.cat([ks.sentence_embedding(model.eval()(batch["input_ids"]), batch) for batch in BATCHES])
            for model in pair
        )
    assert found.increase == pytest.approx(((after - before).square().sum() / 2 / 15).item(), rel=1e-4)
    assert found.cosine == pytest.approx((before * after).sum(1).mean().item(), rel=1e-5)
    assert (found.losses, found.divergence) == (None, None)


def test_the_increase_of_a_classifier_of_images_is_per_image():
    torch.manual_seed(0)
    dense, small = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)) for _ in range(2))
    images, labels = normal(6, 3, 4, 4), torch.tensor([0, 1, 2, 3, 4, -100])
    found = ks.compare(dense, small, [(images, labels)], ks.ClassifierLoss())
    assert (found.tokens, found.losses[0].tokens) == (6, 5)
    assert found.increase == pytest.approx((found.losses[1].mean - found.losses[0].mean) * 5 / 6)


def test_without_a_loss_the_outputs_are_compared_alone(pair):
    found = ks.compare(*pair, [IDS])
    assert (found.increase, found.losses, found.divergence, found.unit) == (None, None, None, "")
    assert 0 < found.cosine < 1
    assert "perplexity" not in str(found)
    assert ks.compare(pair[0], pair[0], [IDS]).relative_change == 0


def test_a_comparison_prints_a_line_for_each_quantity(pair):
    lines = str(ks.compare(*pair, BATCHES, ks.NextTokenLoss())).splitlines()
    assert [line[:35].strip() for line in lines[1:]] == [
        "loss, nats",
        "perplexity",
        "increase per token, nats",
        "KL divergence of the logits, nats",
        "mean cosine of the outputs",
        "relative change of the outputs",
        "parameters",
        "MB",
        "forward pass at batch 1, ms",
        "forward pass at batch 3, ms",
    ]
    assert lines[-1].split()[-2:] == ["6,000.0", "3,000.0"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_are_left_as_they_were(pair, fails):
    dense, small = pair
    small.dropout.eval()
    batches = [IDS, IDS + VOCABULARY] if fails else [IDS]
    for call in (partial(ks.measure_loss, dense), partial(ks.compare, dense, small)):
        with pytest.raises(IndexError) if fails else contextlib.nullcontext():
            call(batches, ks.NextTokenLoss())
    assert [module.training for model in pair for module in model.modules()] == [True] * 7 + [False]
    assert all(each.requires_grad and each.grad is None for model in pair for each in model.parameters())


def test_what_cannot_be_measured_is_refused(pair):
    dense, _ = pair
    for call, message in {
        lambda: ks.measure_loss(dense, [], ks.NextTokenLoss()): "nothing counts in these batches; give at least one",
        lambda: ks.compare(*pair, []): "nothing counts in these batches",
        lambda: ks.compare(*pair, [{"input_ids": IDS[:, :1]}], ks.NextTokenLoss()): "nothing counts in these batches",
        lambda: ks.measure_loss(dense, [IDS], ks.NextTokenLoss("model")): "is random, so two models do not compare in",
        lambda: ks.measure_loss(dense, [IDS], ks.RandomDirections(ks.sentence_embedding)): "use ks.compare",
        lambda: ks.measure_loss(dense, [IDS], lambda output, batch: output): "the loss <lambda> is a tensor of shape",
        lambda: ks.compare(dense, dense.embed, [IDS]): r"outputs of shape \(15, 7\) and \(15, 6\) do not compare",
    }.items():
        with refusal(message):
            call()
    squared = measure.MeasuredLoss(1.0, 3, "half the squared change of the outputs")
    with refusal("has no perplexity; one in nats is needed"):
        squared.perplexity  # noqa: B018
