"""Refinement: each block of a compressed model is trained to give the outputs of the dense block."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal
from networks import normal
from planned import bits, plan_of, same_bits
from torch import nn

import ks
from ks.model import refine as module

WIDTH, BLOCKS = 8, "layers.*"
BATCHES = [normal(4, 6, WIDTH, seed=index) * torch.linspace(0.3, 2, WIDTH) for index in range(10)]


class Block(nn.Module):
    """A residual block with a gate that comes from outside; its outputs are a tuple, as in older transformers."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.unused = nn.LayerNorm(3)

    def forward(self, x, gate=None):
        return (x + self.down(torch.relu(self.up(self.norm(x + self.mix(x))))) * gate, "other")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.dropout = nn.ModuleList(Block() for _ in range(3)), nn.Dropout(0.5)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=index) / 2)
        self.layers[1].norm = self.layers[0].norm

    def forward(self, x, attention_mask=None):
        gate, x = torch.tanh(x).mean(-1, keepdim=True), self.dropout(x)
        for layer in self.layers:
            x, _ = layer(x, gate=gate)
        return x


def compressed():
    """The model with chains of rank 2 in two of its blocks."""
    model, names = Model(), ("layers.0.up", "layers.0.down", "layers.2.up")
    return ks.compress(model, plan_of(model, dict.fromkeys(names, "lowrank")), quiet=True)


def refined(**options):
    model, small = Model(), compressed()
    return model, small, ks.refine(model, small, BATCHES, BLOCKS, **{"lr": 0.03, "quiet": True} | options)


@torch.no_grad()
def held_out_error(model, small, name, tokens):
    """The mean of ‖y − ŷ‖² / ‖y‖² over the first tokens of every fifth batch, with the outputs of whole passes."""
    outputs = {model: [], small: []}
    for each, found in outputs.items():
        handle = (
            each.eval().get_submodule(name).register_forward_hook(lambda _, __, out, found=found: found.append(out[0]))
        )
        for batch in BATCHES[4::5]:
            each(batch)
        handle.remove()
    y, small_y = (torch.cat(found)[:, :tokens].double() for found in outputs.values())
    return ((y - small_y).square().sum(-1) / y.square().sum(-1)).mean().item()


@pytest.mark.parametrize(("tokens", "lr", "passes"), [(6, 0.03, 3), (4, 0.03, 3), (6, 0.25, 9)])
def test_the_held_out_error_falls_and_is_that_of_the_models_for_the_tokens_that_count(tokens, lr, passes):
    """With the larger rate, a later pass is worse than the best one."""
    model, small, mask = Model(), compressed(), torch.arange(6).expand(4, 6) < tokens
    batches = [{"x": batch, "attention_mask": mask} for batch in BATCHES]
    blocks = ks.refine(model, small, batches, BLOCKS, lr=lr, passes=passes, quiet=True)
    assert [block.name for block in blocks] == ["layers.0", "layers.2"]
    assert (min(block.passes for block in blocks) < passes) == (lr == 0.25)
    assert blocks[0].before == pytest.approx(held_out_error(model, compressed(), "layers.0", tokens), rel=1e-4)
    for block in blocks:
        assert block.after < 0.9 * block.before
        assert block.after == pytest.approx(held_out_error(model, small, block.name, tokens), rel=1e-4)


def test_chains_norms_and_biases_that_blocks_with_chains_alone_use_change_and_nothing_else():
    model, start, small = Model(), compressed(), compressed().train()
    small.layers[1].eval()
    modes = [each.training for each in small.modules()]
    ks.refine(model, small, BATCHES, BLOCKS, lr=0.03, quiet=True)
    assert [each.training for each in small.modules()] == modes
    changed = {name for name, value in small.named_parameters() if not torch.equal(value, start.get_parameter(name))}
    assert changed == {
        *(f"layers.{index}.{name}" for index in (0, 2) for name in ("mix.bias", "down.bias")),
        *(f"layers.{index}.up.{name}" for index in (0, 2) for name in ("block_0", "block_1", "bias")),
        *("layers.0.down.block_0", "layers.0.down.block_1"),
        *("layers.2.norm.weight", "layers.2.norm.bias"),
    }
    assert same_bits(bits(Model()), bits(model))
    assert all(each.grad is None and each.requires_grad for each in (*model.parameters(), *small.parameters()))


def test_a_block_that_training_makes_worse_stays_as_it_was_to_the_bit():
    _, small, blocks = refined(lr=0.999)
    assert {block.passes for block in blocks} == {0}
    assert all(block.after == block.before for block in blocks)
    assert same_bits(bits(compressed()), bits(small))


def interrupt_at(monkeypatch, number):
    """Count the blocks that are trained, and raise a KeyboardInterrupt in the one of this number."""
    train, trained = module._train, []

    def counted(name, *arguments):
        trained.append(name)
        if len(trained) == number:
            raise KeyboardInterrupt
        return train(name, *arguments)

    monkeypatch.setattr(module, "_train", counted)
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
    assert same_bits(bits(whole), bits(small))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"1: {blocks[0]}", f"1: {blocks[0]}, from the folder", f"2: {blocks[1]}"]
    assert str(blocks[0]).startswith("layers.0: held-out error ")


@pytest.mark.parametrize("other", ["lr", "batches", "model", "small"])
def test_a_folder_of_another_refinement_is_refused(tmp_path, other):
    refined(folder=tmp_path)
    model, small = Model(), compressed()
    with torch.no_grad():
        for each in {"model": [model], "small": [small]}.get(other, []):
            each.layers[0].mix.weight[0, 0] += 1
    batches = [*BATCHES[:-1], BATCHES[0]] if other == "batches" else BATCHES
    kept = bits(small)
    with refusal(r"layers\.0\.pth is of another refinement; give another folder"):
        ks.refine(model, small, batches, BLOCKS, lr=0.02 if other == "lr" else 0.03, folder=tmp_path, quiet=True)
    assert same_bits(kept, bits(small))


class Doubling(nn.Module):
    """A block that may change its input in place, and may use a cache: then it gives other outputs at each call."""

    def __init__(self, in_place=False, use_cache=False):
        super().__init__()
        self.up, self.in_place, self.calls = nn.Linear(WIDTH, WIDTH), in_place, 0
        self.config = SimpleNamespace(use_cache=use_cache)

    def forward(self, x):
        self.calls += self.config.use_cache
        x = x.mul_(2) if self.in_place else 2 * x
        return x + self.up(x) * (1 + self.calls)


def small_of(model):
    return ks.compress(copy.deepcopy(model), plan_of(model), quiet=True)


def refined_network(dtype=torch.float32, **options):
    """The compressed model of one block with large outputs, and this block after its refinement."""
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(9, WIDTH), Doubling(**options)), torch.arange(90).view(10, 3, 3) % 9
    model[0].weight.data *= 1000
    model.config = model[1].config
    small = small_of(model)
    (block,) = ks.refine(model.to(dtype), small, tokens, "1", lr=0.03, quiet=True)
    return small, block


def test_a_block_without_parameters_passes_its_inputs_on():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    assert [block.name for block in ks.refine(model, small_of(model), BATCHES, "*", quiet=True)] == ["0", "2"]


def test_a_block_may_change_its_input_in_place():
    assert refined_network(in_place=True)[1] == refined_network()[1]


def test_a_cache_is_off_during_the_refinement_alone():
    small, block = refined_network(use_cache=True)
    assert block == refined_network()[1]
    assert small.config.use_cache


def test_large_outputs_of_a_dense_model_in_float16_do_not_overflow():
    assert refined_network(torch.float16)[1].before == pytest.approx(refined_network()[1].before, rel=0.02)


def apart():
    """Blocks with a step of the model between them."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model.forward = lambda x: model[1](2 * model[0](x))
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Model, {"passes": 0}, "passes 0, lr 0.003: at least one pass"),
        (Model, {"lr": 1.5}, "passes 3, lr 1.5: .* a rate between 0 and 1"),
        (Model, {"held_out": 0.0}, "of 10 batches, 0.0 is to be held out; both parts need"),
        (Model, {"batches": BATCHES[:1]}, "of 1 batches, 0.2 is to be held out; both parts need"),
        (Model, {"blocks": "blocks.*"}, "no module of the model matches 'blocks"),
        (Model, {"blocks": "layers.0.norm"}, "no module that 'layers.0.norm' matches holds a chain"),
        (Model, {"mask": lambda batch: torch.ones(6, 4).bool()}, "block layers.0 .*one entry for each token"),
        (Model, {"blocks": "layers.*.*"}, "block .* does not take the output of .* as its first argument"),
        (lambda: nn.Sequential(Doubling(use_cache=True)), {"blocks": "*"}, "block 0 has a state: called again"),
        (apart, {"blocks": "*"}, "block 1 does not take the output of 0 as its first argument"),
    ],
)
def test_what_cannot_be_refined_is_refused_in_one_line(make, options, message):
    model = make()
    small = small_of(model)
    with refusal(message):
        ks.refine(model, small, options.pop("batches", BATCHES), options.pop("blocks", BLOCKS), quiet=True, **options)


def test_models_that_share_what_is_trained_and_models_in_float64_are_refused():
    small = compressed()
    with refusal(r"would change the dense model too; compress a copy of it"):
        ks.refine(small, small, BATCHES, BLOCKS)
    with refusal(r"values in torch.float64; refine them in float32"):
        ks.refine(Model(), small.double(), BATCHES, BLOCKS)
