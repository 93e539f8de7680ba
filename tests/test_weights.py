import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ks.patterns import make_chain
from ks.weights import INIT_METHODS, load_weight, make_weight, packed, save_weight

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
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_a_single_weight_is_found_in_any_container(tmp_path, content, key, suffix):
    torch.save(content, tmp_path / f"w{suffix}")
    loaded = load_weight(tmp_path / f"w{suffix}")
    assert torch.equal(loaded.tensor, WEIGHT)
    assert loaded.key == key


def test_npy_and_safetensors(tmp_path):
    np.save(tmp_path / "w.npy", WEIGHT.numpy())
    save_file({"a.weight": WEIGHT, "a.bias": torch.zeros(4)}, tmp_path / "w.safetensors")
    assert torch.equal(load_weight(tmp_path / "w.npy").tensor, WEIGHT)
    assert load_weight(tmp_path / "w.safetensors").key == "a.weight"


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
    with pytest.raises(ValueError, match=r"a \(4, 6\), b \(6, 4\); choose one with --weight_key"):
        load_weight(path)
    with pytest.raises(ValueError, match=r"no key 'c'; 2-D weights in it: a \(4, 6\), b \(6, 4\)"):
        load_weight(path, "c")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.randn(5), r"shape \(5,\)"),
        (torch.randn(2, 3, 4), r"shape \(2, 3, 4\)"),
        (torch.randn(0, 4), "non-empty"),
        (torch.ones(2, 3, dtype=torch.int64), "int64"),
        (torch.ones(2, 3, dtype=torch.complex64), "complex64"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinite"),
        (torch.zeros(3, 3), "all zero"),
    ],
)
def test_what_is_no_weight_is_refused(tmp_path, tensor, message):
    torch.save(tensor, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_weight(tmp_path / "w.pth")
    torch.save({"only": tensor}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match=message):
        load_weight(tmp_path / "d.pth", "only")


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
    (tmp_path / "w.txt").write_text("1 2")
    messages = {
        "absent.pth": "no such file",
        ".": "is a directory",
        "empty.pth": "empty",
        "w.txt": "suffix '.txt'",
        "text.pth": "no tensor at all",
    }
    names = ["corrupt.pth", "corrupt.npy", "corrupt.safetensors", "cut.pth", "object.pth", "module.pth", "pickled.npy"]
    for name, message in messages.items() | {(name, "cannot be read as weights") for name in names}:
        with pytest.raises(ValueError, match=message) as raised:
            load_weight(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_the_hash_is_of_the_weight_not_of_its_file(tmp_path):
    torch.save(WEIGHT, tmp_path / "a.pth")
    np.save(tmp_path / "b.npy", WEIGHT.numpy())
    torch.save(WEIGHT.bfloat16(), tmp_path / "c.pth")
    a, b, c = (load_weight(tmp_path / name).sha256() for name in ("a.pth", "b.npy", "c.pth"))
    assert a == b != c


@pytest.mark.parametrize("method", INIT_METHODS)
def test_every_method_is_seeded_and_finite(method):
    chain = make_chain(12, 20)
    weight = make_weight(12, 20, method, seed=3, chain=chain, rank=2)
    assert weight.shape == (12, 20)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, make_weight(12, 20, method, seed=3, chain=chain, rank=2))
    assert not torch.equal(weight, make_weight(12, 20, method, seed=4, chain=chain, rank=2))


def test_random_kinds_have_their_spread():
    for method, std in {
        "xavier_normal": (2 / 900) ** 0.5,
        "kaiming_uniform": (2 / 500) ** 0.5,
        "normal": 0.002**0.5,
    }.items():
        assert make_weight(400, 500, method).std().item() == pytest.approx(std, rel=0.02)


def test_structured_kinds_have_their_structure():
    chain = make_chain(24, 32)
    exact = make_weight(24, 32, "exact_chain", chain=chain, rank=2).reshape(6, 4, 4, 8).permute(1, 2, 0, 3)
    assert torch.linalg.matrix_rank(exact, rtol=1e-4).unique().tolist() == [2]
    noisy = torch.linalg.svdvals(make_weight(60, 80, "lowrank_plus_noise", rank=5, noise=0.01))
    assert noisy[5] < 0.05 * noisy[4]
    values = torch.linalg.svdvals(make_weight(30, 40, "power_law", alpha=0.5))
    torch.testing.assert_close(values / values[0], torch.arange(1, 31).float() ** -0.5, rtol=1e-3, atol=1e-4)


def test_bad_requests():
    for arguments, message in [
        ((0, 4, "normal"), "at least 1"),
        ((4, 4, "nonsense"), "xavier_uniform"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_weight(*arguments)
    with pytest.raises(ValueError, match="rank 0"):
        make_weight(4, 4, "lowrank_plus_noise", rank=0)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".npy", ".safetensors"])
def test_saved_weights_load(tmp_path, suffix):
    save_weight(WEIGHT.half(), tmp_path / f"w{suffix}")
    assert torch.equal(load_weight(tmp_path / f"w{suffix}").tensor, WEIGHT.half())


def test_saving_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match="no bfloat16"):
        save_weight(WEIGHT.bfloat16(), tmp_path / "w.npy")
    with pytest.raises(ValueError, match="suffix '.bin'"):
        save_weight(WEIGHT, tmp_path / "w.bin")


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("key", [None, "layer.0.weight"])
def test_a_packed_weight_is_read_as_the_one_it_was_packed_from(tmp_path, transpose, key):
    tensor = torch.randn(3, 5, dtype=torch.float64).to(torch.bfloat16)
    torch.save({key: tensor, "other": torch.ones(7, 7)} if key else tensor, tmp_path / "model.pth")
    weight = load_weight(tmp_path / "model.pth", key, transpose)
    (tmp_path / "alone.pth").write_bytes(packed(weight, transpose))
    again = load_weight(tmp_path / "alone.pth", key, transpose)
    assert again.key == weight.key
    assert again.sha256() == weight.sha256()
