"""Refinement: each block of a compressed model is trained to give the outputs of the dense block."""

import copy

import pytest
import torch
from networks import normal
from planned import plan_of
from torch import nn

import ks
from ks.errors import UsageError
from ks.model import refine as module
from ks.model.linears import light_copy

WIDTH, BLOCKS = 8, "layers.*"
BATCHES = [normal(4, 6, WIDTH, seed=index) * torch.linspace(0.3, 2, WIDTH) for index in range(10)]


class Block(nn.Module):
    """A residual block with a gate that comes from outside; its outputs are a tuple, as in older transformers."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x, gate=None):
        return (x + self.down(torch.relu(self.up(self.norm(x + self.mix(x))))) * gate, "other")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.dropout = nn.ModuleList(Block() for _ in range(3)), nn.Dropout(0.5)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=index) / 2)

    def forward(self, x, attention_mask=None):
        gate, x = torch.tanh(x).mean(-1, keepdim=True), self.dropout(x)
        for layer in self.layers:
            x, _ = layer(x, gate=gate)
        return x


def compressed(model=None):
    """The model with chains of rank 2 in two of its blocks."""
    model = model or Model()
    names = ("layers.0.up", "layers.0.down", "layers.2.up")
    return ks.compress(model, plan_of(model, dict.fromkeys(names, "lowrank")), quiet=True)


def refined(**options):
    model, small = Model(), compressed()
    return model, small, ks.refine(model, small, BATCHES, BLOCKS, **{"lr": 0.03, "quiet": True} | options)


@torch.no_grad()
def held_out_error(model, small, name, counted=slice(None)):
    """The mean of ‖y − ŷ‖² / ‖y‖² over tokens of every fifth batch, with the outputs of whole passes."""
    outputs = {}
    for each in (model, small):
        handle = each.get_submodule(name).register_forward_hook(
            lambda _, __, out, each=each: outputs[each].append(out[0])
        )
        outputs[each] = []
        for batch in BATCHES[4::5]:
            each.eval()(batch)
        handle.remove()
    y, found = (torch.cat(outputs[each])[:, counted].double() for each in (model, small))
    return ((y - found).square().sum(-1) / y.square().sum(-1)).mean().item()


@pytest.mark.parametrize(("lr", "passes"), [(0.03, 3), (0.25, 6)])  # with 0.25, a later pass is worse than the best
def test_the_held_out_error_falls_and_is_that_of_the_models(lr, passes):
    before = compressed()
    model, small, blocks = refined(lr=lr, passes=passes)
    assert (min(block.passes for block in blocks) < passes) == (lr == 0.25)
    assert [block.name for block in blocks] == ["layers.0", "layers.2"]
    for block in blocks:
        assert block.after < 0.9 * block.before
        assert block.after == pytest.approx(held_out_error(model, small, block.name), rel=1e-4)
    assert blocks[0].before == pytest.approx(held_out_error(model, before, "layers.0"), rel=1e-4)


def test_chains_norms_and_biases_of_blocks_with_chains_change_and_nothing_else():
    model, start = Model(), compressed()
    small = compressed(light_copy(model)).train()
    small.layers[1].eval()
    modes = [each.training for each in small.modules()]
    ks.refine(model, small, BATCHES, BLOCKS, lr=0.03, quiet=True)
    assert [each.training for each in small.modules()] == modes
    changed = {name for name, value in small.named_parameters() if not torch.equal(value, start.get_parameter(name))}
    assert changed == {
        *(f"layers.{index}.{name}" for index in (0, 2) for name in ("norm.weight", "norm.bias", "mix.bias")),
        *(f"layers.{index}.up.{name}" for index in (0, 2) for name in ("block_0", "block_1", "bias")),
        *(f"layers.{index}.down.bias" for index in (0, 2)),
        *("layers.0.down.block_0", "layers.0.down.block_1"),
    }
    for name, value in Model().named_parameters():
        assert torch.equal(model.get_parameter(name), value)  # although the light copy shares it
    assert all(each.grad is None and each.requires_grad for each in (*model.parameters(), *small.parameters()))


def test_a_parameter_that_two_blocks_use_is_not_trained():
    model = Model()
    model.layers[2].norm = model.layers[0].norm
    small = compressed(copy.deepcopy(model))
    ks.refine(model, small, BATCHES, BLOCKS, lr=0.03, quiet=True)
    assert torch.equal(small.layers[0].norm.weight, model.layers[0].norm.weight)
    assert not torch.equal(small.layers[0].mix.bias, model.layers[0].mix.bias)


def test_a_block_that_training_makes_worse_stays_as_it_was_to_the_bit():
    _, small, blocks = refined(lr=0.999)
    assert {block.passes for block in blocks} == {0}
    assert all(block.after == block.before for block in blocks)
    for name, value in compressed().state_dict().items():
        assert torch.equal(small.state_dict()[name], value)


def test_masked_tokens_do_not_count():
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    batches = [{"x": batch, "attention_mask": mask} for batch in BATCHES]
    model, small = Model(), compressed()
    first, _ = ks.refine(model, small, batches, BLOCKS, lr=0.03, quiet=True)
    assert first.after == pytest.approx(held_out_error(model, small, "layers.0", slice(4)), rel=1e-4)


def interrupt_at(monkeypatch, number):
    """Count the blocks that are trained, and raise a KeyboardInterrupt in the one of this number."""
    train, trained = module._Task.train, []

    def counted(task, *arguments):
        trained.append(task.name)
        if len(trained) == number:
            raise KeyboardInterrupt
        return train(task, *arguments)

    monkeypatch.setattr(module._Task, "train", counted)
    return trained


@pytest.mark.parametrize("same_model", [True, False])
def test_an_interrupt_keeps_blocks_and_the_same_call_resumes_to_the_bit(tmp_path, monkeypatch, capsys, same_model):
    _, whole, blocks = refined()
    trained, (model, small) = interrupt_at(monkeypatch, 2), (Model(), compressed().train())
    with pytest.raises(KeyboardInterrupt):
        ks.refine(model, small, BATCHES, BLOCKS, lr=0.03, folder=tmp_path)
    assert torch.equal(small.layers[0].up.block_0, whole.layers[0].up.block_0)
    assert torch.equal(small.layers[2].up.block_0, compressed().layers[2].up.block_0)
    assert small.training
    small = small if same_model else compressed()
    assert ks.refine(model, small, BATCHES, BLOCKS, lr=0.03, folder=tmp_path) == blocks
    assert trained == ["layers.0", "layers.2", "layers.2"]
    for name, value in whole.state_dict().items():
        assert torch.equal(small.state_dict()[name], value)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"1: {blocks[0]}", f"1: {blocks[0]}, from the folder", f"2: {blocks[1]}"]
    assert str(blocks[0]).startswith("layers.0: held-out error ")


@pytest.mark.parametrize("other", ["lr", "batches", "model", "small"])
def test_a_folder_of_another_refinement_is_refused(tmp_path, other):
    refined(folder=tmp_path)
    model, small, batches = Model(), compressed(), BATCHES
    with torch.no_grad():
        for each in {"model": [model], "small": [small]}.get(other, []):
            each.layers[0].mix.weight[0, 0] += 1
    batches = [*BATCHES[:-1], BATCHES[0]] if other == "batches" else BATCHES
    kept = copy.deepcopy(small.state_dict())
    with pytest.raises(UsageError, match=r"layers\.0\.pth is of another refinement; give another folder"):
        ks.refine(model, small, batches, BLOCKS, lr=0.02 if other == "lr" else 0.03, folder=tmp_path, quiet=True)
    for name, value in kept.items():
        assert torch.equal(small.state_dict()[name], value)


class Counting(nn.Module):
    """A block with a state, as a cache is."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.calls += 1
        return x + self.up(x) * self.calls


class Apart(nn.Sequential):
    """Blocks with a step of the model between them."""

    def forward(self, x):
        return self[1](2 * self[0](x))


def stateful():
    return nn.Sequential(Counting(), Counting())


def apart():
    return Apart(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def small_of(model, change=None):
    small = ks.compress(copy.deepcopy(model), plan_of(model), quiet=True)
    return small if change is None else change(small)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Model, {"passes": 0}, "passes 0, lr 0.003: at least one pass"),
        (Model, {"lr": 1.5}, "passes 3, lr 1.5: .* a rate between 0 and 1"),
        (Model, {"held_out": 0.0}, "of 10 batches, 0.0 is to be held out; both parts need"),
        (Model, {"batches": BATCHES[:1]}, "of 1 batches, 0.2 is to be held out; both parts need"),
        (Model, {"blocks": "blocks.*"}, "no module of the model matches 'blocks"),
        (Model, {"blocks": "layers.1.norm"}, "no module that 'layers.1.norm' matches holds a chain"),
        (Model, {"mask": lambda batch: torch.ones(4, 5).bool()}, "block layers.0 .*one entry for each token"),
        (Model, {"blocks": "layers.*.*"}, "block .* does not take the output of .* as its first argument"),
        (stateful, {"blocks": "*"}, "other outputs when they are called again; switch their state off"),
        (apart, {"blocks": "*"}, "block 1 does not take the output of 0 as its first argument"),
    ],
)
def test_what_cannot_be_refined_is_refused_in_one_line(make, options, message):
    model = make()
    small = small_of(model)
    with pytest.raises(UsageError, match=message) as raised:
        ks.refine(model, small, options.pop("batches", BATCHES), options.pop("blocks", BLOCKS), quiet=True, **options)
    assert "\n" not in str(raised.value)


def test_models_that_do_not_belong_together_are_refused():
    model, small = Model(), compressed()
    with pytest.raises(UsageError, match="the dense model holds chains itself; compress a copy"):
        ks.refine(small, small, BATCHES, BLOCKS)
    with pytest.raises(UsageError, match=r"the dense model has no block 'layers\.0'"):
        ks.refine(nn.Sequential(model), small, BATCHES, BLOCKS)
    with pytest.raises(UsageError, match=r"values in torch.float64; refine them in float32"):
        ks.refine(model, small.double(), BATCHES, BLOCKS)
