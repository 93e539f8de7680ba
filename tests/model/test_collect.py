"""Collected moments against sums computed by hand, for models of every kind; nothing is left on a model."""

import types
from collections import UserDict

import pytest
import torch
from conftest import refusal
from measured import assert_same_moments
from networks import Attention, Calls, Conv1D, agrees, hand_computed, normal, squares

import ks
from ks.model.linears import linears_of

LAYER = "encoder.layer.0"
ALL = "encoder.**"


def collect(model, batches, layers=ALL, **options):
    return ks.collect_input_moments(model, batches, layers, quiet=True, **options)


def test_the_sums_are_those_computed_by_hand_and_layers_with_one_input_share_them():
    model, x = Attention().eval(), normal(4, 3, 6)
    found = collect(model, [x[:2], x[2:]], held_out=0)
    layer = model.encoder["layer"][0]
    agrees(found.train[f"{LAYER}.query"], x)
    with torch.no_grad():
        mixed = layer["query"](x) + layer["key"](x) * layer["value"](x)
        agrees(found.train[f"{LAYER}.output"], mixed)
        agrees(found.train[f"{LAYER}.up"], layer["output"](mixed))
    assert found.held_out == {}
    torch.testing.assert_close(found.second_moment(f"{LAYER}.query.weight"), hand_computed(x)[0] / 12)
    shared = {f"{LAYER}.{name}.weight": f"{LAYER}.query" for name in ("query", "key", "value")}
    own = {f"{LAYER}.{name}.weight": f"{LAYER}.{name}" for name in ("output", "up")}
    assert found.aliases == shared | own
    assert list(found.train) == [f"{LAYER}.{name}" for name in ("query", "output", "up")]


def test_views_of_one_tensor_are_shared_and_copies_are_not():
    same = Calls(lambda layers, x: layers.first(x.view(-1, 5)) + layers.second(x.view(-1, 5)))
    assert set(collect(same, [normal(4, 5)], "**", held_out=0).train) == {"first"}
    copied = Calls(lambda layers, x: layers.first(x) + layers.second(x.clone()))
    assert set(collect(copied, [normal(4, 5)], "**", held_out=0).train) == {"first", "second"}
    other_rows = Calls(lambda layers, x: layers.first(x[:2]) + layers.second(x[2:]))
    assert set(collect(other_rows, [normal(4, 5)], "**", held_out=0).train) == {"first", "second"}


def test_a_tensor_that_is_modified_in_place_is_another_one():
    model = Calls(lambda layers, x: layers.first(x) + layers.second(x.add_(1)))
    found = collect(model, [normal(4, 5)], "**", held_out=0)
    agrees(found.train["first"], normal(4, 5))
    agrees(found.train["second"], normal(4, 5) + 1)


def test_memory_that_is_used_again_is_not_taken_for_a_shared_input():
    def call(layers, x):
        for factor in (1, 2, 3):
            layers.first(x * factor)  # freed before the next one is made, which may have its address
            layers.second(x * -factor)

    found = collect(Calls(call), [normal(400, 5)], "**", held_out=0)
    rows = torch.cat([normal(400, 5) * factor for factor in (1, 2, 3)])
    agrees(found.train["first"], rows)
    agrees(found.train["second"], -rows)


def test_layers_that_stop_sharing_are_refused():
    model = Calls(lambda layers, x: layers.first(x) + layers.second(x if len(x) == 2 else x + 1))
    with refusal("second and first shared their input at first, but not in batch 2; collect"):
        collect(model, [normal(2, 5), normal(3, 5)], "**")


def test_a_layer_that_is_first_called_later_has_sums_of_its_own():
    def call(layers, x):
        layers.first(x)
        if len(x) == 3:
            layers.second(x)

    found = collect(Calls(call), [normal(2, 5), normal(3, 5)], "**", held_out=0)
    assert found.train["first"].count == 5
    agrees(found.train["second"], normal(3, 5))


def test_the_order_of_the_calls_may_change():
    def call(layers, x):
        for layer in (layers.first, layers.second)[:: 1 if len(x) == 2 else -1]:
            layer(x)

    found = collect(Calls(call), [normal(2, 5), normal(3, 5)], "**", held_out=0)
    assert set(found.train) == {"first"}
    assert found.train["first"].count == 5


def test_whole_batches_are_held_out_every_fifth():
    batches = [normal(number, 6, seed=number) for number in range(1, 12)]
    found = collect(Attention(), batches)
    agrees(found.held_out[f"{LAYER}.query"], torch.cat([batches[4], batches[9]]))
    agrees(found.train[f"{LAYER}.query"], torch.cat([batch for at, batch in enumerate(batches) if at not in (4, 9)]))
    assert found.batches[f"{LAYER}.query"] == 11


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.29, 0.7])
def test_the_held_out_fraction_is_kept_exactly(fraction):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    found = collect(model, [torch.ones(1, 2)] * 100, "**", held_out=fraction)
    assert found.train["0"].count == round(100 * (1 - fraction))
    assert sum(sums.count for sums in found.held_out.values()) == round(100 * fraction)


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_padding_is_left_out():
    batch = UserDict({"x": normal(2, 3, 6), "attention_mask": MASK})
    batch["x"][0, 2] = float("nan")  # what padding holds does not matter
    found = collect(Attention(), [batch], f"{LAYER}.query", held_out=0)
    agrees(found.train[f"{LAYER}.query"], batch["x"][MASK.bool()])


def test_a_mask_fits_tokens_that_a_model_has_flattened():
    model = Calls(lambda layers, x: layers.first(x.view(-1, 5)))
    found = collect(model, [normal(2, 3, 5)], "first", held_out=0, mask=lambda batch: MASK)
    agrees(found.train["first"], normal(2, 3, 5)[MASK.bool()])
    found = collect(model, [normal(2, 3, 5)], "first", held_out=0, mask=lambda batch: None)
    assert found.train["first"].count == 6


def test_a_layer_whose_inputs_the_mask_does_not_fit_is_left_out(capsys):
    model = Calls(lambda layers, x: layers.first(x) + layers.second(x[:, 0])[:, None])
    found = ks.collect_input_moments(model, [normal(2, 3, 5)], "*", held_out=0, mask=lambda batch: MASK)
    assert [*found.train] == ["first"]
    reason = "its inputs have shape (2, 5), and the mask has shape (2, 3) (mask= takes masks by globs)"
    assert f"second: left out, {reason}" in capsys.readouterr().err
    with refusal(r"no layer has inputs that the mask fits; second: its inputs have shape"):
        collect(model, [normal(2, 3, 5)], "second", mask=lambda batch: MASK)
    shapes = iter([MASK, MASK.t()])
    with refusal(r"layer first: .* the mask has shape \(3, 2\) in batch 2; give another mask"):
        collect(model, [normal(2, 3, 5)] * 2, "first", held_out=0, mask=lambda batch: next(shapes))


class Translator(torch.nn.Module):
    """Encoder and decoder, each with a sequence of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)

    def forward(self, source, target, attention_mask=None):
        return self.decoder(target) + self.encoder(source).mean(1, keepdim=True)


def test_a_mask_of_one_sequence_does_not_count_for_another():
    batch = {"source": normal(2, 3, 5), "target": normal(2, 3, 5), "attention_mask": MASK}
    one = {"x": normal(2, 3, 6), "attention_mask": MASK}
    configured = Attention()
    configured.config = types.SimpleNamespace(is_encoder_decoder=True)
    for model, given, parts in (
        (Translator(), batch, "source, target"),
        (Attention(), one | {"decoder_input_ids": MASK}, "x, decoder_input_ids"),
        (configured, one, "x"),
    ):
        with refusal(rf"the batch has several \({parts}\); give a mask for each part"):
            collect(model, [given], "**")
    masks = {"encoder": lambda batch: batch["attention_mask"], "**": lambda batch: None}
    found = collect(Translator(), [batch], "**", held_out=0, mask=masks)
    assert (found.train["encoder"].count, found.train["decoder"].count) == (3, 6)
    with refusal("no glob of mask= matches layer decoder"):
        collect(Translator(), [batch], "**", mask={"encoder": masks["encoder"]})


def test_modes_are_set_without_the_work_that_eval_and_train_may_do():
    class Merging(torch.nn.Linear):
        calls = 0

        def train(self, mode=True):
            type(self).calls += 1
            return super().train(mode)

    model = torch.nn.Sequential(Merging(5, 4), torch.nn.Dropout(1.0), torch.nn.Linear(4, 3))
    model[0].training = False  # a mode that differs from its neighbours'
    Merging.calls = 0
    found = collect(model, [normal(3, 5)], "**", held_out=0)
    assert found.train["2"].sum_xx.any()  # the dropout was off
    assert Merging.calls == 0
    assert [module.training for module in model] == [False, True, True]


def test_padded_batches_of_an_encoder_of_torch_are_no_nested_tensors():
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2).eval()
    batch = (normal(2, 3, 6), None, ~MASK.bool())
    found = collect(encoder, [batch], "**.linear1", held_out=0, mask=lambda batch: MASK)
    assert [sums.count for sums in found.train.values()] == [3, 3]
    assert encoder.use_nested_tensor


def test_a_loader_may_give_labels_that_the_model_does_not_take():
    model, labels = torch.nn.Sequential(torch.nn.Linear(5, 3)), torch.tensor([0, 1, 2, 0])
    for batch in ((normal(4, 5), labels), {"input": normal(4, 5), "labels": labels}):
        assert collect(model, [batch], "**", held_out=0, loss=ks.ClassifierLoss()).gradients["0.weight"].count == 4


@pytest.mark.parametrize("batch", [(normal(3, 6), None), [normal(3, 6)], normal(3, 6), {"x": normal(3, 6)}])
def test_every_kind_of_batch(batch):
    agrees(collect(Attention(), [batch], held_out=0).train[f"{LAYER}.query"], normal(3, 6))


class Offloaded(torch.nn.Module):
    """A layer whose parameters are on meta, and come from elsewhere for each call, as with hooks of accelerate."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 5)
        self.stored = {name: value.detach().clone() for name, value in self.layer.named_parameters()}
        self.layer.to("meta")

    def forward(self, x):
        return torch.func.functional_call(self.layer, self.stored, (x,))


@pytest.mark.parametrize("behind", [torch.nn.Linear(5, 5), torch.nn.ReLU()], ids=["partly", "wholly"])
def test_a_model_with_offloaded_parameters_is_observed(behind):
    found = collect(torch.nn.Sequential(Offloaded(), behind), [normal(3, 6)], "**", held_out=0)
    agrees(found.train["0.layer"], normal(3, 6))


def test_inputs_given_by_keyword():
    model = Calls(lambda layers, x: layers.first(input=x))
    agrees(collect(model, [normal(3, 5)], "first", held_out=0).train["first"], normal(3, 5))


def test_conv1d_of_transformers_is_recognised_by_its_name():
    found = collect(torch.nn.Sequential(Conv1D(8, 6)), [normal(3, 6)], "**", held_out=0)
    agrees(found.train["0"], normal(3, 6))
    assert found.transposed == ("0.weight",)
    other = type("Conv1D", (torch.nn.Module,), {"__module__": "elsewhere"})
    assert linears_of(torch.nn.Sequential(other())) == {}


def test_names_are_those_of_the_checkpoint():
    model = Attention()
    assert set(linears_of(torch.nn.DataParallel(model))) == set(linears_of(model))
    wrapped = Attention()
    wrapped.encoder["layer"][0] = torch.nn.ModuleDict({"_orig_mod": wrapped.encoder["layer"][0]})
    assert set(linears_of(wrapped)) == set(linears_of(model))
    assert {linear.key for linear in linears_of(wrapped).values()} <= model.state_dict().keys()
    tied = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    tied["b"] = tied["a"]
    assert list(linears_of(tied)) == ["a", "b"]


def test_compiled_models_are_observed():
    def sequential():
        return torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())).eval()

    whole, part = torch.compile(sequential(), backend="eager"), sequential()
    part[0] = torch.compile(part[0], backend="eager")
    for model in (whole, torch.nn.DataParallel(whole), part):
        with torch.no_grad():
            model(torch.ones(4, 3))  # compiles it, without hooks
        found = collect(model, [torch.ones(4, 3)], "0.0", held_out=0, loss=squares)
        assert found.train["0.0"].count == found.gradients["0.0.weight"].count == 4
        assert found.model == "Sequential"


@pytest.mark.parametrize("loss", [None, squares])
def test_a_collection_in_parts_is_that_of_the_whole(loss):
    model = Attention()
    batches = [normal(2, 6, seed=number) for number in range(13)]
    whole = collect(model, batches, loss=loss)
    first = collect(model, batches[:3], loss=loss)
    before = first.train[f"{LAYER}.query"].sum_xx.clone()
    second = collect(model, batches[3:8], loss=loss, moments=first)
    merged = collect(model, batches[:5], loss=loss).merge(collect(model, batches[5:], loss=loss))
    for found in (collect(model, batches[8:], loss=loss, moments=second), merged):
        assert_same_moments(found, whole, 1e-12, 1e-6)
    assert torch.equal(first.train[f"{LAYER}.query"].sum_xx, before)


def test_a_collection_that_does_not_fit_the_earlier_one_is_refused():
    earlier = collect(Attention(), [normal(3, 6)])
    with refusal("earlier moments have 'encoder.layer.0.query.weight', which layers does not"):
        collect(Attention(), [normal(3, 6)], f"{LAYER}.output", moments=earlier)
    with refusal("of model 'Attention' and of 'Other' are not to be merged"):
        collect(Attention(), [normal(3, 6)], moments=earlier, model_name="Other")


def test_layers_and_batches_that_cannot_be_collected_are_refused():
    model, x = Attention(), normal(3, 6)
    for call, message in {
        lambda: collect(model, [x], ["a", "enc.outputs"]): (
            r"no nn.Linear or Conv1D of the model matches 'a, enc\.outputs'; nearest of 5: encoder.layer.0.output"
        ),
        lambda: collect(model, []): "no batch",
        lambda: collect(model, [x], held_out=1): "a held-out fraction of 1",
        lambda: collect(model, [3]): "a batch of type int",
        lambda: collect(model, [normal(2, 3, 6)], mask=lambda batch: MASK.float()): "a mask of dtype torch.float32",
        lambda: collect(Calls(lambda layers, x: x), [normal(3, 5)], "first"): "no layer of first was called",
        lambda: collect(model, [x, x / 0]): r"layer encoder.layer.0.query hold NaN or infinite values in batch 2",
    }.items():
        with refusal(message):
            call()


def test_sums_that_exceed_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr("ks.files.memory.available_bytes", lambda: 1000)
    with refusal("collect fewer layers at a time"):
        collect(Attention(), [normal(3, 6)])


def test_the_matched_names_are_printed(capsys):
    model = Calls(lambda layers, x: layers.first(x))
    ks.collect_input_moments(model, [normal(3, 5)] * 5, "*")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "inputs of 2 layers:",
        "first: 5 wide",
        "second: 5 wide",
        "1 input tensors of 1 layers, 5 batches: 12 inputs for training, 3 held out",
        "second: left out, no batch called it",
        "inputs are known for 25 of 60 parameters (41.7%); the others: 41.7% Linear, 16.7% biases",
    ]
