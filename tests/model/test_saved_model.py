"""Compressed models in folders: the same bits after loading, nothing half-written, other architectures refused."""

import contextlib
import copy
import dataclasses
import functools
import json
import resource
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, refusal
from networks import Conv1D, normal
from planned import FAMILIES, Network, Tied, bits, peak_mib, plan_of, same_bits, single, tied_plan
from torch import nn

import ks
from ks.model.linears import linears_of
from ks.moments.metric import LossMetric

FILES = {"compressed.safetensors", "compressed.json", "README.md"}


def compressed(model=None, families=FAMILIES):
    model = model or Network()
    return ks.compress(model, plan_of(model, families), quiet=True).eval()


def zeros(model):
    """The architecture with other values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model.eval()


def on_meta(kind):
    with torch.device("meta"):
        return kind().eval()


def edited(folder, **changes):
    path = folder / "compressed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_has_the_tensors_memory_order_and_outputs_of_the_saved_one(tmp_path, dtype):
    model, x = compressed(Network().to(dtype)), normal(50, 8).to(dtype)
    ks.save_compressed(model, tmp_path / "small")
    assert {path.name for path in tmp_path.iterdir()} == {"small"}
    assert {path.name for path in (tmp_path / "small").iterdir()} == FILES
    loaded = ks.load_compressed(zeros(Network()), tmp_path / "small")
    for name in ("blocks.0.up", "blocks.0.down"):
        pairs = zip(loaded.get_submodule(name).factors, model.get_submodule(name).factors)
        assert all(one.stride() == other.stride() for one, other in pairs)
    again = ks.load_compressed(copy.deepcopy(loaded), tmp_path / "small")  # it has the chains already
    for each in (loaded, again):
        assert same_bits(bits(each), bits(model))
        assert torch.equal(each(x), model(x))


@pytest.mark.parametrize("version", [1, 2])
def test_a_folder_of_an_earlier_version_is_read_and_replaced(tmp_path, version):
    """In version 1, factor l has values (a, b, c, d) under the name factors.l."""
    model, folder = compressed(), tmp_path / "small"
    ks.save_compressed(model, folder)
    (folder / "README.md").unlink()
    (folder / "compressed.safetensors").rename(folder / "model.safetensors")
    edited(folder, version=version, buffers=[], files=[])
    if version == 1:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        for name in ("blocks.0.up", "blocks.0.down"):
            for index, values in enumerate(model.get_submodule(name).factors):
                del tensors[f"{name}.block_{index}"]
                tensors[f"{name}.factors.{index}"] = values.detach().contiguous()
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert same_bits(bits(ks.load_compressed(zeros(Network()), folder)), bits(model))
    ks.save_compressed(model, folder)
    assert {path.name for path in folder.iterdir()} == FILES


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    model = Tied()
    ks.compress(model, tied_plan(model), quiet=True)
    ks.save_compressed(model, tmp_path / "small")
    stored = safetensors.torch.load_file(tmp_path / "small" / "compressed.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())
    other = Tied()
    other.second.weight = nn.Parameter(other.second.weight.detach().clone())
    other.fourth = copy.deepcopy(other.third)
    for start in (zeros(Tied()), zeros(other), on_meta(Tied)):
        loaded = ks.load_compressed(start, tmp_path / "small")
        assert loaded.first.block_0 is loaded.second.block_0
        assert loaded.third.block_0 is loaded.fourth.block_0
        assert torch.equal(loaded(normal(3, 8)), model(normal(3, 8)))


def test_a_tie_that_the_file_lacks_is_refused(tmp_path):
    model = Tied()
    model.second.weight = nn.Parameter(model.first.weight.detach() + 1)
    ks.compress(model, single("third.weight", model.third.weight), quiet=True)
    ks.save_compressed(model, tmp_path / "small")
    with refusal("the model ties second.weight to first.weight, the file does not"):
        ks.load_compressed(Tied(), tmp_path / "small")


@pytest.mark.parametrize("model", [nn.Sequential(Conv1D(6, 8)), nn.Linear(8, 6)], ids=["Conv1D", "lone layer"])
def test_conv1d_and_a_lone_layer(tmp_path, model):
    [linear] = linears_of(model).values()
    fresh, stored = copy.deepcopy(model), linear.module.weight.shape
    small, x = ks.compress(model, single(linear.key, linear.weight), quiet=True), normal(3, 8)
    ks.save_compressed(small, tmp_path / "small")
    assert torch.equal(ks.load_compressed(zeros(copy.deepcopy(fresh)), tmp_path / "small")(x), small(x))
    assert "with 1 linear layer as a chain of Kronecker" in (tmp_path / "small" / "README.md").read_text()
    ks.save_compressed(small, tmp_path / "dense", densify=True)
    dense = safetensors.torch.load_file(tmp_path / "dense" / "model.safetensors")
    assert dense[linear.key].shape == stored
    fresh.load_state_dict(dense)
    torch.testing.assert_close(fresh(x), small(x))


def test_a_densified_model_is_an_ordinary_checkpoint(tmp_path):
    model = Tied()
    ks.compress(model, tied_plan(model), quiet=True)
    ks.save_compressed(model, tmp_path / "dense", densify=True)
    dense = zeros(Tied())
    dense.load_state_dict(safetensors.torch.load_file(tmp_path / "dense" / "model.safetensors"))
    x = normal(3, 8)
    torch.testing.assert_close(dense(x), model(x))
    with refusal("holds an ordinary checkpoint"):
        ks.load_compressed(Tied(), tmp_path / "dense")


def changed(path, module):
    model = Network()
    model.set_submodule(path, module)
    return model


OTHERS = {
    "width": (lambda: Network(inner=16), r"blocks.0.up has a weight of shape \(16, 8\), 12 × 8 is needed"),
    "missing": (lambda: nn.Sequential(nn.Linear(8, 12)), r"blocks.0.up is missing \(nearest of 1: 0\)"),
    "kind": (lambda: changed("blocks.0.up", nn.Embedding(12, 8)), "blocks.0.up is a Embedding, a linear layer 12 × 8"),
    "more": (
        lambda: changed("extra", nn.Linear(2, 2)),
        r"extra.weight is absent in the file and \(2, 2\) in the model",
    ),
    "bias": (lambda: compressed(families={"blocks.0.up": "monarch"}), "blocks.0.up is a KSLinear"),
}


def indexed_pickle(folder):
    torch.save(safetensors.torch.load_file(folder / "compressed.safetensors"), folder / "model.bin")
    (folder / "compressed.safetensors.index.json").write_text('{"weight_map": {"norm.weight": "model.bin"}}')


DAMAGE = {
    "version": (lambda folder: edited(folder, version=4), "newest known"),
    "format": (lambda folder: edited(folder, format="x"), "is no compressed model"),
    "patterns": (lambda folder: edited(folder, layers={"blocks.0.up": {"patterns": [[1, 2, 3]]}}), "is not valid"),
    "sizes": (lambda folder: edited(folder, layers={"blocks.0.up": {"patterns": [[1, 8, 3, 1]] * 2}}), "do not fit"),
    "alias": (lambda folder: edited(folder, aliases={"norm.weight": "y"}), "ties tensors to one"),
    "no record": (lambda folder: (folder / "compressed.json").unlink(), "no such file"),
    "no tensors": (lambda folder: (folder / "compressed.safetensors").unlink(), "no such file"),
    "pickle": (indexed_pickle, r"lists 'model.bin'; only .safetensors files are read"),
    "cut": (lambda folder: (folder / "compressed.safetensors").write_bytes(b"12"), "cannot be read"),
}


@pytest.mark.parametrize("case", [*OTHERS, *DAMAGE])
def test_a_folder_that_is_damaged_or_for_another_architecture_leaves_the_model_as_it_is(tmp_path, case):
    ks.save_compressed(compressed(), tmp_path / "small")
    if case in OTHERS:
        model, message = OTHERS[case][0](), rf"is for another architecture \(Network\): {OTHERS[case][1]}"
    else:
        model, (change, message) = Network(), DAMAGE[case]
        change(tmp_path / "small")
    before, modules = bits(model), list(model.modules())
    with refusal(message):
        ks.load_compressed(model, tmp_path / "small")
    assert list(model.modules()) == modules
    assert same_bits(bits(model), before)


class WithBuffer(Network):
    """A network with a buffer that is no part of its state_dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.5]), persistent=False)

    def forward(self, x):
        return super().forward(x * self.scale)


def test_a_model_on_the_meta_device_is_filled_with_all_its_buffers(tmp_path):
    model, x = compressed(WithBuffer().bfloat16()), normal(50, 8).bfloat16()
    model.scale.fill_(0.3)  # another value than that of a new model
    ks.save_compressed(model, tmp_path / "small")
    loaded = ks.load_compressed(on_meta(WithBuffer), tmp_path / "small")
    assert same_bits(bits(loaded), bits(model))
    assert torch.equal(loaded(x), model(x))
    assert "scale" not in loaded.state_dict()
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    given = ks.load_compressed(zeros(WithBuffer()), tmp_path / "small")
    assert given.scale == 1.5  # that of a model with values stays


def test_a_tensor_on_the_meta_device_that_the_folder_lacks_is_one_line(tmp_path):
    ks.save_compressed(compressed(), tmp_path / "small")
    with refusal(r"scale is absent in the file and \(1,\) in the model"):
        ks.load_compressed(on_meta(WithBuffer), tmp_path / "small")
    fresh = on_meta(Network)
    fresh.table = torch.empty(2, device="meta")
    with refusal("table of the model is on the meta device and no buffer"):
        ks.load_compressed(fresh, tmp_path / "small")


def load_on_meta(folder):
    with torch.device("meta"):
        dense = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(2)))
    return ks.load_compressed(dense, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dense_weights_are_never_in_memory(tmp_path):
    """The two layers would need 64 MiB each where they are dense; their chains have 1 MiB."""
    chains = nn.Sequential(*(ks.KSLinear(4096, 4096, bias=False) for _ in range(2)))
    ks.save_compressed(chains, tmp_path / "small", max_shard_size=2**19)
    assert peak_mib(functools.partial(load_on_meta, tmp_path / "small")) < 40


def test_more_tensors_than_a_file_may_hold_go_into_several_with_an_index(tmp_path):
    model, folder = compressed(), tmp_path / "small"
    ks.save_compressed(model, folder, max_shard_size=500)
    index = json.loads((folder / "compressed.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"compressed-{k:05}-of-{len(files):05}.safetensors" for k in range(1, len(files) + 1)
    ]
    stored = {path.name: safetensors.torch.load_file(path) for path in files}
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in stored.values()]
    assert len(sizes) > 1
    assert max(sizes) <= 500
    assert index["metadata"]["total_size"] == sum(sizes)
    assert same_bits(bits(ks.load_compressed(zeros(Network()), folder)), bits(model))
    ks.save_compressed(model, folder)
    assert {path.name for path in folder.iterdir()} == FILES


def test_the_card_has_the_plan_its_losses_and_the_line_that_loads(tmp_path):
    model = Network()
    plan = dataclasses.replace(plan_of(model, FAMILIES), loss_metric=LossMetric.MODEL_LOSS, unit="nats")
    layers = [dataclasses.replace(layer, loss_increase=0.25 if layer.chain else 0.0) for layer in plan.layers]
    layers[0] = dataclasses.replace(layers[0], interpolated=True)
    dataclasses.replace(plan, layers=tuple(layers)).measured(0.75).save(tmp_path / "plan.json")
    ks.compress(model, plan, quiet=True)
    for name, options in {"planned": {"plan": tmp_path / "plan.json"}, "small": {}, "dense": {"densify": True}}.items():
        ks.save_compressed(model, tmp_path / name, **options)
    planned, small, dense = ((tmp_path / name / "README.md").read_text() for name in ("planned", "small", "dense"))
    head = "---\nlibrary_name: ks\ntags:\n- kronecker-sparse\n- compression\n---\n\n# Network, compressed\n"
    assert planned.startswith(head)
    for text in (
        "`Network` with 2 linear layers as chains of Kronecker-sparse factors: 432 of 424 parameters (101.9%).",
        'ks.load_compressed(model, "planned")',
        "predicted to increase by 0.5 nats per token",
        "Measured: 0.75 nats per token",
        "| `blocks.0.up.weight` | lowrank | 2 | 41.7% | ~0.25 |",
        "| `blocks.0.down.weight` | monarch | 2 | 166.7% | 0.25 |",
        "| `blocks.1.up.weight` | dense | - | 100.0% | 0 |",
    ):
        assert text in planned
    assert not any(str(path) in planned for path in (tmp_path, ROOT))
    assert "| `blocks.0.down` | 8 | 12 | 166.7% |" in small
    assert "The tensors are those of a `Network` with dense layers." in dense
    assert "ks.load" not in dense


def test_the_plan_of_another_model_is_refused(tmp_path):
    model, other = compressed(), Network()
    for plan, message in (
        (plan_of(other, FAMILIES, **{"blocks.0.up": 1}), "blocks.0.up.weight of the model is another chain than that"),
        (plan_of(other, {"blocks.1.down": "lowrank"}), "no chain for key 'blocks.1.down.weight'"),
    ):
        with refusal(message):
            ks.save_compressed(model, tmp_path / "small", plan=plan)
    assert list(tmp_path.iterdir()) == []


class Tokenizer:
    """Writes a file in a folder of its own, as tokenizers with several chat templates do."""

    def save_pretrained(self, folder):
        (folder / "templates").mkdir()
        (folder / "templates" / "tool.jinja").write_text("{{ x }}")


def test_the_files_of_a_tokenizer_are_ours_and_a_file_beside_them_is_not(tmp_path):
    model, folder = compressed(), tmp_path / "small"
    ks.save_compressed(model, folder, tokenizer=Tokenizer())
    assert (folder / "templates" / "tool.jinja").exists()
    (folder / "templates" / "mine.jinja").touch()
    with refusal("small holds templates/mine.jinja; choose"):
        ks.save_compressed(model, folder)
    (folder / "templates" / "mine.jinja").unlink()
    ks.save_compressed(model, folder)
    assert {path.name for path in folder.iterdir()} == FILES


def test_arguments_that_do_not_fit_are_one_line(tmp_path, monkeypatch):
    folder = tmp_path / "small"
    ks.save_compressed(compressed(), folder)
    for arguments, message in (
        ((Network(),), "takes a folder, or a model and a folder"),
        ((folder, folder), "takes a folder, or a model and a folder"),
        ((tmp_path / "x",), "x is no folder; a folder of ks.save_compressed is needed"),
        ((str(folder),), r"has no config.json, since Network is no class of transformers; give the model: ks.load_c"),
    ):
        with refusal(message):
            ks.load_compressed(*arguments)
    (folder / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refusal("needs transformers, which cannot be imported .*; install it, or give the mod"):
        ks.load_compressed(folder)


def test_only_its_own_folder_is_replaced(tmp_path):
    first, second = compressed(), compressed(families={"blocks.1.down": "lowrank"})
    folder = tmp_path / "a" / "small"
    ks.save_compressed(first, folder)
    ks.save_compressed(second, folder)
    assert same_bits(bits(ks.load_compressed(Network(), folder)), bits(second))
    assert [*folder.parent.iterdir()] == [folder]
    (folder / "notes.txt").touch()
    with refusal("small holds .*; choose a new or an empty folder"):
        ks.save_compressed(first, folder)
    (tmp_path / "file").touch()
    with refusal("is no folder"):
        ks.save_compressed(first, tmp_path / "file")
    (tmp_path / "link").symlink_to(folder)
    with refusal("symbolic link"):
        ks.save_compressed(first, tmp_path / "link")
    (tmp_path / "empty").mkdir()
    ks.save_compressed(first, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES


def test_state_that_is_no_tensor_is_refused(tmp_path):
    with_state = type("WithState", (nn.Module,), {"get_extra_state": lambda module: {"x": 1}})
    with refusal("no tensor"):
        ks.save_compressed(with_state(), tmp_path / "small")
    with refusal("is a meta tensor without values; give it some first"):
        ks.save_compressed(on_meta(Network), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def full_disk(size):
    """A limit on the size of files stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("earlier", "size"), [(False, 1000), (True, 0)])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, earlier, size):
    folder, model = tmp_path / "small", compressed(families={"blocks.1.down": "lowrank"})
    if earlier:
        ks.save_compressed(model, folder)
    with full_disk(size), refusal("small cannot be written"):
        ks.save_compressed(compressed(), folder)
    assert [*tmp_path.iterdir()] == ([folder] if earlier else [])
    if earlier:
        assert same_bits(bits(ks.load_compressed(Network(), folder)), bits(model))


def test_a_failed_rename_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    folder, model = tmp_path / "small", compressed()
    ks.save_compressed(model, folder)
    rename = Path.rename

    def fail(path, target):
        if str(path).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with refusal("cannot be written .*No space left"):
        ks.save_compressed(compressed(families={"blocks.1.down": "lowrank"}), folder)
    monkeypatch.undo()
    assert [*tmp_path.iterdir()] == [folder]
    assert same_bits(bits(ks.load_compressed(Network(), folder)), bits(model))
