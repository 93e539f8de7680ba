"""Collected gradients at the outputs of layers against autograd, for models of every kind; the model stays as is."""

import contextlib
from functools import partial

import pytest
import torch
from conftest import refusal
from networks import Attention, Calls, normal, squares
from networks import agrees as sums_agree
from torch.nn import Linear, ReLU, Sequential
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import ks

LAYER = "encoder.layer.0"
ALL = "encoder.**"
agrees = partial(sums_agree, tolerance=1e-5)  # products of gradients are in float32


def collect(model, batches, layers="**", loss=squares, held_out=0.0, **options):
    return ks.collect_input_moments(model, batches, layers, loss=loss, held_out=held_out, quiet=True, **options)


def by_autograd(model, batch, loss=squares):
    """g at the outputs of every nn.Linear, of parameters that require gradients, all calls in one tensor."""
    outputs = {}

    def tap(kept, module, inputs, output):
        kept.append(output)
        return output * 1  # may be changed in place

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                kept = outputs.setdefault(name, [])
                hooks.callback(module.register_forward_hook(partial(tap, kept)).remove)
        value = loss(model(batch), batch)
    found = {}
    for name, each in outputs.items():
        parts = torch.autograd.grad(value, each, retain_graph=True)
        found[name] = torch.cat([part.flatten(0, -2) for part in parts])
    return found


def test_the_gradients_are_those_of_autograd():
    model, x = Attention().eval(), normal(4, 3, 6)
    found = collect(model, [x[:2], x[2:]], ALL, held_out=0.5)
    expected, unseen = by_autograd(model, x[:2]), by_autograd(model, x[2:])
    assert set(found.gradients) == set(found.held_out_gradients) == set(found.aliases)
    for name in expected:
        agrees(found.gradients[f"{name}.weight"], expected[name])
        agrees(found.held_out_gradients[f"{name}.weight"], unseen[name])
    assert (found.loss, found.unit) == ("squares", "nats")


def test_float64_models_are_summed_in_float64():
    model, x = Attention().double().eval(), normal(50, 6).double()
    found, expected = collect(model, [x]).gradients, by_autograd(model, x)
    agrees(found[f"{LAYER}.query.weight"], expected[f"{LAYER}.query"], tolerance=1e-13)


def test_padding_is_left_out_on_both_sides():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    model, x = Attention().eval(), normal(2, 3, 6)
    found = collect(model, [{"x": x, "attention_mask": mask}])
    rows = by_autograd(model, x)[f"{LAYER}.up"].view(2, 3, -1)[mask.bool()]
    agrees(found.gradients[f"{LAYER}.up.weight"], rows)
    assert found.gradients[f"{LAYER}.up.weight"].count == found.train[f"{LAYER}.up"].count == 3


class Blocks(torch.nn.Module):
    """Token vectors from a table or a convolution, then blocks whose forward pass `around` calls."""

    def __init__(self, around, embed, tied=False):
        super().__init__()
        self.around, self.embed = around, embed
        blocks = [Sequential(Linear(6, 8), ReLU(inplace=True), Linear(8, 6)) for _ in range(2)]
        self.blocks = torch.nn.ModuleList([blocks[0], blocks[0]] if tied else blocks)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + self.around(block, x)
        return x


class Unnoticed(torch.nn.Module):
    """Vectors for tokens from a table that is no parameter."""

    def forward(self, tokens):
        return normal(10, 6)[tokens]


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
ROUNDS = {
    "plain": lambda block, x: block(x),
    "reentrant checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=False),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("around", ROUNDS)
def test_checkpointed_and_tied_blocks(around, tied):
    torch.manual_seed(0)
    model = Blocks(ROUNDS[around], torch.nn.Embedding(10, 6), tied)
    found = collect(model, [TOKENS, TOKENS + 1])
    model.around = ROUNDS["plain"]
    parts = [by_autograd(model, TOKENS), by_autograd(model, TOKENS + 1)]
    plain = collect(model, [TOKENS, TOKENS + 1], loss=None)
    assert (plain.loss, plain.gradients, plain.aliases) == ("", {}, found.aliases)
    for name in parts[0]:
        agrees(found.gradients[f"{name}.weight"], torch.cat([part[name] for part in parts]))
        assert found.train[name].count == plain.train[name].count
        assert torch.equal(found.train[name].sum_xx, plain.train[name].sum_xx)
    if tied:
        assert found.gradients["blocks.1.0.weight"].count == 2 * 12


OTHERS = {  # model, and what it is given
    "no parameter gives the first vectors": (lambda: Blocks(ROUNDS["plain"], Unnoticed()), TOKENS),
    "likewise, with a checkpoint": (lambda: Blocks(ROUNDS["checkpoint"], Unnoticed()), TOKENS),
    "the weight is computed": (lambda: Sequential(weight_norm(Linear(6, 8)), Linear(8, 6)), normal(5, 6)),
    "an output is changed in place": (lambda: Sequential(Linear(6, 8), ReLU(inplace=True), Linear(8, 6)), normal(5, 6)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_model_in_which(case):
    model, x = OTHERS[case][0](), OTHERS[case][1]
    found = collect(model, [x]).gradients
    for name, rows in by_autograd(model, x).items():
        agrees(found[f"{name}.weight"], rows)


def state_of(model):
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    modes = [module.training for module in model.modules()]
    return hooks, modes, [(each.requires_grad, id(each.grad)) for each in model.parameters()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("loss", [None, squares])
def test_the_model_is_left_as_it_was(loss, fails):
    model, batches = Attention(), [normal(3, 6).requires_grad_(), normal(3, 7 if fails else 6)]
    model.encoder["layer"][0]["key"].requires_grad_(False).eval()
    model.encoder["layer"][0]["up"].weight.grad = torch.ones(10, 6)
    seen = []

    def look(module, inputs):
        assert not module.training
        seen.append((torch.is_grad_enabled(), any(each.requires_grad for each in module.parameters())))

    model.register_forward_pre_hook(look)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="must match") if fails else contextlib.nullcontext():
        collect(model, batches, loss=loss)
    assert seen[0] == ((False, True) if loss is None else (True, False))
    assert state_of(model) == before
    assert torch.equal(model.encoder["layer"][0]["up"].weight.grad, torch.ones(10, 6))
    assert batches[0].grad is None
    assert torch.is_grad_enabled()


def test_offloading_replaces_parameters_and_they_require_gradients_again():
    model = Sequential(Linear(6, 5), Linear(5, 4))
    model[0].bias.requires_grad_(False)

    def replace(module, inputs):
        for name, each in list(module._parameters.items()):
            module._parameters[name] = torch.nn.Parameter(each.detach().clone(), each.requires_grad)

    model[0].register_forward_pre_hook(replace)
    collect(model, [normal(3, 6)])
    assert [each.requires_grad for each in model.parameters()] == [True, False, True, True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(mode):
    def loss(output, batch):
        return (output[:, :6] * batch).sum()  # keeps the batch for the backward pass

    model = Attention()
    with mode():
        found = collect(model, [normal(3, 6)], loss=loss)
    agrees(found.gradients[f"{LAYER}.query.weight"], by_autograd(model.eval(), normal(3, 6), loss)[f"{LAYER}.query"])
    found.train[f"{LAYER}.query"].sum_xx.add_(1)  # no inference tensor


def test_a_model_of_inference_mode_is_refused():
    with torch.inference_mode():
        model = Attention()
    with refusal("the model was made in inference mode"):
        collect(model, [normal(3, 6)])


def test_autocast_does_not_round_the_sums():
    def loss(output, batch):
        return output.float().square().sum()

    model, x = Attention().eval(), normal(300, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = collect(model, [x], loss=loss), by_autograd(model, x, loss)
    agrees(found.gradients[f"{LAYER}.up.weight"], expected[f"{LAYER}.up"])
    sums_agree(found.train[f"{LAYER}.query"], x)


def test_a_layer_that_held_out_batches_alone_call_has_an_empty_training_part():
    model = Calls(lambda layers, x: layers.first(x) + (layers.second(x) if len(x) == 3 else 0))
    found = collect(model, [normal(2, 5), normal(3, 5)], held_out=0.5)
    for train, held_out, name in (
        (found.train, found.held_out, found.aliases["second.weight"]),
        (found.gradients, found.held_out_gradients, "second.weight"),
    ):
        assert (train[name].count, held_out[name].count) == (0, 3)


def test_moments_of_another_loss_are_refused_before_the_first_batch():
    earlier = collect(Attention(), [normal(3, 6)])
    with refusal("gradients of 'squares' and of 'NextTokenLoss, .*' are not to be merged"):
        collect(Attention(), [], loss=ks.NextTokenLoss(), moments=earlier)


def test_a_layer_without_a_gradient_is_named(capsys):
    model = Calls(lambda layers, x: layers.first(x) + layers.second(x).detach())
    found = ks.collect_input_moments(model, [normal(3, 5)] * 5, "*", loss=squares)
    assert set(found.gradients) == set(found.held_out_gradients) == {"first.weight"}
    assert set(found.aliases) == {"first.weight", "second.weight"}
    assert capsys.readouterr().err.splitlines()[-2] == "second: inputs alone, because the loss gives it no gradient"
    with refusal("the loss squares gives no gradient to any layer of second; give layers"):
        collect(model, [normal(3, 5)], "second")


FAULTS = {
    r"a tensor of shape \(3, 10\); one number, summed over all that counts, is needed": lambda output, batch: output,
    "a float; one number": lambda output, batch: output.sum().item(),
    "nan; a finite one is needed": lambda output, batch: output.sum() * float("nan"),
    "needs no gradient: it does not depend on the model's parameters": lambda output, batch: output.detach().sum(),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_loss_that_is_none_is_refused(message):
    with refusal(message):
        collect(Attention(), [normal(3, 6)], loss=FAULTS[message])


def test_gradients_that_are_not_finite_are_refused():
    with refusal(r"gradients at the outputs of layer encoder.* hold NaN or infinite values"):
        collect(Attention(), [normal(3, 6)], loss=lambda output, batch: (output - output).abs().sqrt().sum())


def test_a_mean_is_warned_of_once_and_a_sum_is_not(capsys):
    batches = [normal(4, 6), normal(4, 6)]
    collect(Attention(), batches, loss=lambda output, batch: output.square().mean())
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: the loss <lambda> is ")
    assert "for its halves together, as a mean is; return a sum" in warning
    found = collect(Attention(), batches)
    collect(Attention(), [normal(1, 6)], loss=lambda output, batch: output.square().mean())  # cannot be cut
    assert capsys.readouterr().err == ""
    assert found.train[f"{LAYER}.query"].count == found.gradients[f"{LAYER}.query.weight"].count == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gradients_on_a_gpu_are_those_of_the_cpu():
    torch.manual_seed(0)
    model = Blocks(ROUNDS["reentrant checkpoint"], torch.nn.Embedding(10, 6))
    expected, on_cpu = by_autograd(model, TOKENS)["blocks.0.0"], collect(model, [TOKENS])
    found = collect(model.cuda(), [TOKENS])  # the batch is moved to the model
    agrees(found.gradients["blocks.0.0.weight"], expected, tolerance=1e-4)
    torch.testing.assert_close(found.train["blocks.0.0"].sum_xx, on_cpu.train["blocks.0.0"].sum_xx)
