"""Compressed models in folders: the same bits after loading, nothing half-written, other architectures refused."""

import contextlib
import copy
import json
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
from networks import Conv1D, normal
from planned import FAMILIES, Network, Tied, plan_of, single, tied_plan
from torch import nn

import ks
from ks.errors import UsageError
from ks.model.linears import linears_of

FILES = {"model.safetensors", "compressed.json"}


def compressed(model=None, families=FAMILIES):
    model = model or Network()
    return ks.compress(model, plan_of(model, families), quiet=True).eval()


def zeros(model):
    """The architecture with other values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model.eval()


def bits(model):
    return {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        dtype == other[name][0] and torch.equal(value, other[name][1]) for name, (dtype, value) in one.items()
    )


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


def test_a_folder_of_version_1_is_read(tmp_path):
    """Its factor l has values (a, b, c, d) under the name factors.l."""
    model, folder = compressed(), tmp_path / "small"
    ks.save_compressed(model, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name in ("blocks.0.up", "blocks.0.down"):
        for index, values in enumerate(model.get_submodule(name).factors):
            del tensors[f"{name}.block_{index}"]
            tensors[f"{name}.factors.{index}"] = values.detach().contiguous()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    edited(folder, version=1)
    assert same_bits(bits(ks.load_compressed(zeros(Network()), folder)), bits(model))


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    model = Tied()
    ks.compress(model, tied_plan(model), quiet=True)
    ks.save_compressed(model, tmp_path / "small")
    stored = safetensors.torch.load_file(tmp_path / "small" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())
    other = Tied()
    other.second.weight = nn.Parameter(other.second.weight.detach().clone())
    other.fourth = copy.deepcopy(other.third)
    for start in (Tied(), other):
        loaded = ks.load_compressed(zeros(start), tmp_path / "small")
        assert loaded.first.block_0 is loaded.second.block_0
        assert loaded.third.block_0 is loaded.fourth.block_0
        assert torch.equal(loaded(normal(3, 8)), model(normal(3, 8)))


def test_a_tie_that_the_file_lacks_is_refused(tmp_path):
    model = Tied()
    model.second.weight = nn.Parameter(model.first.weight.detach() + 1)
    ks.compress(model, single("third.weight", model.third.weight), quiet=True)
    ks.save_compressed(model, tmp_path / "small")
    with pytest.raises(UsageError, match="the model ties second.weight to first.weight, the file does not"):
        ks.load_compressed(Tied(), tmp_path / "small")


@pytest.mark.parametrize("model", [nn.Sequential(Conv1D(6, 8)), nn.Linear(8, 6)], ids=["Conv1D", "lone layer"])
def test_conv1d_and_a_lone_layer(tmp_path, model):
    [linear] = linears_of(model).values()
    fresh, stored = copy.deepcopy(model), linear.module.weight.shape
    small, x = ks.compress(model, single(linear.key, linear.weight), quiet=True), normal(3, 8)
    ks.save_compressed(small, tmp_path / "small")
    assert torch.equal(ks.load_compressed(zeros(copy.deepcopy(fresh)), tmp_path / "small")(x), small(x))
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
    with pytest.raises(UsageError, match="holds an ordinary checkpoint"):
        ks.load_compressed(Tied(), tmp_path / "dense")


def changed(**modules):
    model = Network()
    for path, module in modules.items():
        model.set_submodule(path, module)
    return model


OTHERS = {
    "width": (lambda: Network(inner=16), r"blocks.0.up has a weight of shape \(16, 8\), 12 × 8 is needed"),
    "missing": (lambda: nn.Sequential(nn.Linear(8, 12)), "blocks.0.up is missing .nearest of 2"),
    "kind": (
        lambda: changed(**{"blocks.0.up": nn.Embedding(12, 8)}),
        "blocks.0.up is a Embedding, a linear layer 12 × 8 is needed",
    ),
    "more": (lambda: changed(extra=nn.Linear(2, 2)), r"extra.weight is absent in the file and \(2, 2\) in the model"),
    "bias": (lambda: compressed(families={"blocks.0.up": "monarch"}), "blocks.0.up is a KSLinear"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_architecture_is_one_line_and_stays_as_it_is(tmp_path, kind):
    ks.save_compressed(compressed(), tmp_path / "small")
    make, message = OTHERS[kind]
    other = make()
    before, modules = bits(other), list(other.modules())
    with pytest.raises(UsageError, match=message) as caught:
        ks.load_compressed(other, tmp_path / "small")
    assert "is for another architecture (Network)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(other.modules()) == modules
    assert same_bits(bits(other), before)


def edited(folder, **changes):
    path = folder / "compressed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "version": (lambda folder: edited(folder, version=4), "newest known"),
    "format": (lambda folder: edited(folder, format="x"), "is no compressed model"),
    "patterns": (lambda folder: edited(folder, layers={"blocks.0.up": {"patterns": [[1, 2, 3]]}}), "is not valid"),
    "sizes": (lambda folder: edited(folder, layers={"blocks.0.up": {"patterns": [[1, 8, 3, 1]] * 2}}), "do not fit"),
    "alias": (lambda folder: edited(folder, aliases={"norm.weight": "y"}), "ties tensors to one"),
    "no record": (lambda folder: (folder / "compressed.json").unlink(), "no such file"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "no such file"),
    "cut": (lambda folder: (folder / "model.safetensors").write_bytes(b"12"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line(tmp_path, damage):
    ks.save_compressed(compressed(), tmp_path / "small")
    change, message = DAMAGE[damage]
    change(tmp_path / "small")
    model = Network()
    before = bits(model)
    with pytest.raises(UsageError, match=message) as caught:
        ks.load_compressed(model, tmp_path / "small")
    assert "\n" not in str(caught.value)
    assert same_bits(bits(model), before)


def test_only_its_own_folder_is_replaced(tmp_path):
    first, second = compressed(), compressed(families={"blocks.1.down": "lowrank"})
    folder = tmp_path / "a" / "small"
    ks.save_compressed(first, folder)
    ks.save_compressed(second, folder)
    assert same_bits(bits(ks.load_compressed(Network(), folder)), bits(second))
    assert [*folder.parent.iterdir()] == [folder]
    (folder / "notes.txt").touch()
    with pytest.raises(UsageError, match="small holds .*; choose a new or an empty folder"):
        ks.save_compressed(first, folder)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is no folder"):
        ks.save_compressed(first, tmp_path / "file")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UsageError, match="symbolic link"):
        ks.save_compressed(first, tmp_path / "link")
    (tmp_path / "empty").mkdir()
    ks.save_compressed(first, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES


def test_state_that_is_no_tensor_is_refused(tmp_path):
    with_state = type("WithState", (nn.Module,), {"get_extra_state": lambda module: {"x": 1}})
    with pytest.raises(UsageError, match="no tensor"):
        ks.save_compressed(with_state(), tmp_path / "small")
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
    with full_disk(size), pytest.raises(UsageError, match="small cannot be written") as caught:
        ks.save_compressed(compressed(), folder)
    assert "\n" not in str(caught.value)
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
    with pytest.raises(UsageError, match="cannot be written .*No space left"):
        ks.save_compressed(compressed(families={"blocks.1.down": "lowrank"}), folder)
    monkeypatch.undo()
    assert [*tmp_path.iterdir()] == [folder]
    assert same_bits(bits(ks.load_compressed(Network(), folder)), bits(model))
