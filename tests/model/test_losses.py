"""The ready losses against formulas written out, and the curvature that their gradients are to give."""

from types import SimpleNamespace

import torch
from conftest import refusal
from networks import normal, squares
from torch.nn.functional import normalize

import ks
from ks.model.losses import FunctionLoss, as_loss

IDS = torch.tensor([[3, 1, 4, 1], [5, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def test_the_next_token_is_predicted_and_padding_and_ignored_labels_do_not_count():
    logits = normal(2, 4, 6)
    log_p = logits.log_softmax(-1)
    pairs = [(0, 0, 1), (0, 1, 4), (0, 2, 1), (1, 0, 2)]  # row, place, next token
    expected = -sum(log_p[pair] for pair in pairs)
    loss, batch = ks.NextTokenLoss(), {"input_ids": IDS, "attention_mask": MASK}
    for output in (logits, SimpleNamespace(logits=logits)):
        torch.testing.assert_close(loss(output, batch), expected)
        assert loss.count(output, batch) == 4
    labels = IDS.clone()
    labels[0, 1:3] = -100
    torch.testing.assert_close(loss(logits, batch | {"labels": labels}), -log_p[0, 2, 1] - log_p[1, 0, 2])
    left = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}
    assert loss.count(logits, left) == 4  # no padding predicts the first token
    for whole in (IDS, [IDS, None]):
        assert loss.count(logits, whole) == 6
    assert (loss.name, loss.unit) == ("NextTokenLoss, labels of the text", "nats")


def test_low_precision_logits_are_summed_in_float32():
    logits = normal(2, 4, 6).bfloat16()
    loss = ks.NextTokenLoss()
    assert torch.equal(loss(logits, IDS), loss(logits.float(), IDS))
    assert loss(logits.double(), IDS).dtype == torch.float64


def test_labels_of_the_model_are_drawn_from_its_distribution_at_the_places_that_count():
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(1, 5001, 4)
    loss, ids = ks.NextTokenLoss("model"), torch.zeros(1, 5001, dtype=torch.long)
    fractions = torch.bincount(loss._drawn(logits).flatten(), minlength=4) / 5001
    torch.testing.assert_close(fractions, logits[0, 0].exp(), atol=0.03, rtol=0)
    assert fractions[3] == 0
    assert not torch.equal(loss._drawn(logits), loss._drawn(logits))
    ids[0, 2000:] = -100
    assert loss.count(logits, ids) == 1999
    entropy = -(logits[0, 0].exp() * logits[0, 0]).nansum()
    torch.testing.assert_close(loss(logits, ids) / 1999, entropy, atol=0.05, rtol=0)
    assert loss.name == "NextTokenLoss, labels of the model"


def test_the_gradients_of_drawn_labels_give_the_fisher_information():
    """At the logits it is diag(p) − p pᵀ, whatever the labels of the data are."""
    logits = normal(4).expand(20_000, 1, 4).requires_grad_()
    loss = ks.ClassifierLoss("model")
    [gradient] = torch.autograd.grad(loss(logits.squeeze(1), None), logits)
    fisher = gradient.squeeze(1).T @ gradient.squeeze(1) / 20_000
    p = normal(4).softmax(0)
    torch.testing.assert_close(fisher, torch.diag(p) - p.outer(p), atol=0.01, rtol=0)


def test_the_loss_of_a_classifier():
    logits, labels = normal(3, 5), torch.tensor([2, -100, 4])
    expected = -logits.log_softmax(-1)[[0, 2], [2, 4]].sum()
    loss = ks.ClassifierLoss()
    for batch in ({"x": normal(3, 7), "labels": labels}, [normal(3, 7), labels]):
        torch.testing.assert_close(loss(logits, batch), expected)
        assert loss.count(logits, batch) == 2
    drawn = ks.ClassifierLoss("model")
    for without in ({"x": normal(3, 7)}, [normal(3, 7)], normal(3, 7)):
        assert drawn.count(logits, without) == 3
    assert drawn.count(logits, {"x": normal(3, 7), "labels": labels}) == 2
    assert drawn.count(normal(2, 4, 5), {"input_ids": IDS, "attention_mask": MASK}) == 6  # one label for every token


def test_random_directions_are_new_for_every_output_and_give_the_squared_jacobian():
    """f = A y: G is AᵀA; and half the squared change of f is ½ δᵀ G δ."""
    matrix = normal(3, 4)
    loss, y = ks.RandomDirections(lambda output, batch: output @ matrix.T), normal(20_000, 4).requires_grad_()
    [gradient] = torch.autograd.grad(loss(y, None), y)
    torch.testing.assert_close(gradient.T @ gradient / len(y), matrix.T @ matrix, atol=0.1, rtol=0)
    [again] = torch.autograd.grad(loss(y, None), y)
    assert (gradient - again).norm(dim=1).min() > 0
    assert loss.count(y, None) == 20_000
    [same] = torch.autograd.grad(ks.RandomDirections(loss.function)(y, None), y)  # the seed is fixed
    assert torch.equal(same, gradient)


def test_a_sentence_embedding_is_the_normalised_mean_of_the_tokens_that_count():
    states = normal(2, 4, 3)
    expected = normalize(torch.stack([states[0].mean(0), states[1, :2].mean(0)]), dim=-1)
    for output in (states, SimpleNamespace(last_hidden_state=states)):
        torch.testing.assert_close(ks.sentence_embedding(output, {"attention_mask": MASK}), expected)
    torch.testing.assert_close(ks.sentence_embedding(states, IDS), normalize(states.mean(1), dim=-1))
    empty = {"attention_mask": torch.zeros_like(MASK)}
    assert torch.equal(ks.sentence_embedding(states, empty), torch.zeros(2, 3))
    assert ks.RandomDirections(ks.sentence_embedding).name == "RandomDirections(sentence_embedding)"


def test_a_plain_function_counts_the_tokens_of_the_batch_and_an_image_once():
    loss = as_loss(squares)
    assert isinstance(loss, FunctionLoss)
    assert (loss.name, loss.unit) == ("squares", "nats")
    assert loss.count(None, {"input_ids": IDS, "attention_mask": MASK}) == 6
    assert loss.count(None, IDS) == loss.count(None, [normal(2, 4, 7), None]) == 8
    assert loss.count(None, normal(2, 3, 8, 8)) == loss.count(None, normal(2, 3)) == 2
    ready = ks.NextTokenLoss()
    assert as_loss(ready) is ready


def test_outputs_and_labels_that_do_not_fit_are_refused():
    logits = normal(2, 4, 6)
    for call, message in {
        lambda: ks.NextTokenLoss("teacher"): "labels 'teacher': 'text' or 'model' is allowed",
        lambda: ks.NextTokenLoss()(logits, IDS[:, :3]): r"tokens of shape \(2, 3\) and torch.int64, logits of shape",
        lambda: ks.NextTokenLoss()(None, IDS): "the output of the model is a NoneType; a tensor .* such a logits, is",
        lambda: ks.ClassifierLoss()(logits[:, 0], {"x": IDS}): r"labels of the batch: none; integers of shape \(2,\)",
        lambda: ks.ClassifierLoss()(logits[:, 0], [IDS, IDS]): r"batch: a tensor of shape \(2, 4\); integers",
        lambda: ks.sentence_embedding(SimpleNamespace(), IDS): "a SimpleNamespace; .* such a last_hidden_state, is",
    }.items():
        with refusal(message):
            call()
