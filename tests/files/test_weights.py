import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ks.errors import UsageError
from ks.files.weights import Weight, load_weight, packed, save_weight

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(4, 6, generator=GENERATOR)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (WEIGHT, None),
        (torch.nn.Parameter(WEIGHT), None),
        ({"weight": WEIGHT, "bias": torch.zeros(4)}, "weight"),
        (torch.nn.ParameterDict({"w": WEIGHT}).state_dict(), "w"),
        ({"model": {"layers": [{"w": WEIGHT}]}, "epoch": 3}, "model.layers.0.w"),
        ([WEIGHT, torch.zeros(3)], "0"),
    ],
    ids=["tensor", "parameter", "dict", "state_dict", "nested", "list"],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".PTH"])
def test_a_single_weight_is_found_in_any_container(tmp_path, content, key, suffix):
    torch.save(content, tmp_path / f"w{suffix}")
    loaded = load_weight(tmp_path / f"w{suffix}")
    assert torch.equal(loaded.tensor, WEIGHT)
    assert loaded.key == key


def test_key_and_transpose(tmp_path):
    save_file({"a": WEIGHT, "b": WEIGHT + 1}, tmp_path / "w.safetensors")
    loaded = load_weight(tmp_path / "w.safetensors", "b", transpose=True)
    assert torch.equal(loaded.tensor, (WEIGHT + 1).t())
    assert loaded.tensor.is_contiguous()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_several_weights_are_listed_with_shapes(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    tensors = {"a": WEIGHT, "b": WEIGHT.t().contiguous(), "bias": torch.zeros(4)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(UsageError, match=r"a \(4, 6\), b \(6, 4\); choose one by its key \(--weight_key\)"):
        load_weight(path)
    with pytest.raises(UsageError, match=r"no key 'c'; 2-D weights in it, nearest of 2: a \(4, 6\), b \(6, 4\)"):
        load_weight(path, "c")


def test_for_a_wrong_key_the_most_similar_keys_are_listed(tmp_path):
    names = [f"encoder.layer.{layer}.{part}.weight" for layer in range(30) for part in ("query", "output.dense")]
    torch.save({name: WEIGHT for name in names} | {"encoder.layer.29.query.bias": torch.zeros(4)}, tmp_path / "w.pth")
    with pytest.raises(UsageError) as raised:
        load_weight(tmp_path / "w.pth", "encoder.layer.29.querry.weight")
    listed = str(raised.value).partition("2-D weights in it, nearest of 60: ")[2].split("), ")
    assert listed[0] == "encoder.layer.29.query.weight (4, 6"
    assert len(listed) == 3


def test_layers_that_are_alike_are_listed_once(tmp_path):
    weights = {f"layer.{layer}.{part}": WEIGHT for part in ("query", "k2") for layer in range(30)}
    torch.save(weights | {"layer.30.query": WEIGHT[:2], "head": WEIGHT}, tmp_path / "w.pth")
    with pytest.raises(UsageError) as raised:
        load_weight(tmp_path / "w.pth")
    assert str(raised.value).endswith(
        "2-D weights in it: layer.0.query (4, 6) and 29 alike, layer.0.k2 (4, 6) and 29 alike, layer.30.query (2, 6), "
        "head (4, 6); choose one by its key (--weight_key)"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
def test_bad_files_are_one_line(tmp_path):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "corrupt.pth").write_bytes(b"\x80\x02nonsense")
    (tmp_path / "corrupt.npy").write_bytes(b"nonsense")
    (tmp_path / "corrupt.safetensors").write_bytes(b"nonsense")
    torch.save(WEIGHT, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-100])
    (tmp_path / "object.pth").write_bytes(pickle.dumps({"a": object()}))
    torch.save({"text": "hello"}, tmp_path / "text.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    np.save(tmp_path / "pickled.npy", np.array([object()]), allow_pickle=True)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(1, 3)), tmp_path / "program.pt")
    (tmp_path / "w.txt").write_text("1 2")
    (tmp_path / "pointer.npy").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    (tmp_path / "page.safetensors").write_text("  \n<!DOCTYPE html><html>404</html>")
    messages = {
        "absent.pth": "no such file",
        ".": "is a directory",
        "empty.pth": "empty",
        "w.txt": "suffix '.txt'",
        "text.pth": "no tensor at all",
        "pointer.npy": "is a pointer of Git LFS",
        "page.safetensors": "is a web page",
        "program.pt": "is a TorchScript program; load it by torch.jit.load",
        "module.pth": "it holds an object of torch.nn.modules.linear.Linear; save tensors alone",
    }
    names = ["corrupt.pth", "corrupt.npy", "corrupt.safetensors", "cut.pth", "object.pth", "pickled.npy"]
    for name, message in messages.items() | {(name, "cannot be read as weights") for name in names}:
        with pytest.raises(UsageError, match=message) as raised:
            load_weight(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_the_hash_is_of_the_weight_not_of_its_file(tmp_path):
    torch.save(WEIGHT, tmp_path / "a.pth")
    np.save(tmp_path / "b.npy", WEIGHT.numpy())
    torch.save(WEIGHT.bfloat16(), tmp_path / "c.pth")
    a, b, c = (load_weight(tmp_path / name).sha256() for name in ("a.pth", "b.npy", "c.pth"))
    assert a == b != c


def test_the_hash_is_that_of_old_studies():
    tensor = torch.arange(6.0).reshape(2, 3) / 4
    assert Weight(tensor, None).sha256() == "99b83859677bffb624ca4eb6cdae645c6612ce82a0d0206bbe8421c03c3f48d0"
    half = tensor.to(torch.bfloat16)
    assert Weight(half, None).sha256() == "d9366d7dcba4b3ad195716df7bb5b104ec021a1c080e50a4834c49088776937f"


def test_the_hash_is_computed_once_and_copies_nothing():
    tensor = torch.ones(1024, 1024)
    weight = Weight(tensor, None)
    tracemalloc.start()
    found = weight.sha256()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < tensor.nbytes / 10
    tensor.zero_()
    assert weight.sha256() == found


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".npy", ".safetensors"])
def test_saved_weights_load(tmp_path, suffix):
    save_weight(WEIGHT.half(), tmp_path / f"w{suffix}")
    assert torch.equal(load_weight(tmp_path / f"w{suffix}").tensor, WEIGHT.half())


def test_saving_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(UsageError, match="no bfloat16"):
        save_weight(WEIGHT.bfloat16(), tmp_path / "w.npy")
    with pytest.raises(UsageError, match="suffix '.txt'"):
        save_weight(WEIGHT, tmp_path / "w.txt")


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("key", [None, "layer.0.weight"])
def test_a_packed_weight_is_read_as_the_one_it_was_packed_from(tmp_path, transpose, key):
    tensor = torch.randn(3, 5, dtype=torch.float64).to(torch.bfloat16)
    torch.save({key: tensor, "other": torch.ones(7, 7)} if key else tensor, tmp_path / "model.pth")
    weight = load_weight(tmp_path / "model.pth", key, transpose)
    (tmp_path / "alone.pth").write_bytes(packed([weight], transpose))
    again = load_weight(tmp_path / "alone.pth", key, transpose)
    assert again.key == weight.key
    assert again.sha256() == weight.sha256()
