"""Moments of a model: their file, merging, and files that are refused."""

import json

import pytest
import safetensors
import torch
from conftest import refusal
from measured import assert_same_moments
from networks import hand_computed, normal
from safetensors.torch import load_file, save_file

from ks.moments.moments_file import InputMoments
from ks.moments.second_moment import VectorSums


def moments(rows=40, width=6, model="MiniLM", **changed):
    """Moments of two input tensors; the first is that of three weights."""
    aliases = {"a.q.weight": "a.q", "a.k.weight": "a.q", "a.v.weight": "a.q", "a.up.weight": "a.up"}
    values = {
        "train": {"a.q": VectorSums.of(normal(rows, width)), "a.up": VectorSums.of(normal(rows, 4))},
        "held_out": {"a.q": VectorSums.of(normal(9, width, seed=1))},
        "aliases": aliases,
        "batches": {"a.q": 5, "a.up": 5},
        "transposed": ("a.up.weight",),
        "model": model,
    }
    return InputMoments(**values | changed)


def with_gradients(rows=40, loss="next token", keys=("a.q.weight", "a.up.weight"), **changed):
    """The same with gradients at the outputs of two weights, of which one has a held-out part."""
    values = {
        "gradients": {key: VectorSums.of(normal(rows, 3, seed=seed)) for seed, key in enumerate(keys)},
        "held_out_gradients": {"a.q.weight": VectorSums.of(normal(9, 3, seed=2))},
        "loss": loss,
        "unit": "nats",
    }
    return moments(rows, **values | changed)


@pytest.mark.parametrize("make", [moments, with_gradients])
def test_saved_moments_are_loaded_to_the_bit(tmp_path, make):
    other = make()
    other.save(tmp_path / "m.safetensors")
    assert_same_moments(InputMoments.load(tmp_path / "m.safetensors"), other)


def test_moments_are_printed_in_one_line(tmp_path):
    assert repr(moments(1200)) == "InputMoments(layers: 4, samples: 1,200, held out: 9, no gradients)"
    with_gradients(held_out={}).save(tmp_path / "m.safetensors")
    found = repr(InputMoments.open(tmp_path / "m.safetensors"))
    assert found == "InputMoments(layers: 4, samples: 40, held out: 0, gradients of next token)"


def metadata_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ks_input_moments"])


def test_the_format_of_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    with_gradients().save(path)
    tensors, record = load_file(path), metadata_of(path)
    own = ("a.q.weight/gradients", "a.up.weight/gradients", "a.q.weight/gradients/held_out")
    names = ("a.q", "a.up", "a.q/held_out", *own)
    assert set(tensors) == {f"{name}/{label}" for name in names for label in ("sum_xx", "sum_x", "count")}
    assert tensors["a.q/sum_xx"].dtype == tensors["a.q/sum_x"].dtype == torch.float64
    assert tensors["a.q/held_out/count"].item() == 9
    torch.testing.assert_close(tensors["a.q/sum_xx"], hand_computed(normal(40, 6))[0])
    torch.testing.assert_close(tensors["a.q.weight/gradients/sum_xx"], hand_computed(normal(40, 3))[0])
    assert record["aliases"] == moments().aliases
    assert (record["version"], record["model"], record["loss"], record["unit"]) == (2, "MiniLM", "next token", "nats")
    assert record["gradients"] == ["a.q.weight", "a.up.weight"]
    assert record["created"].startswith("20")
    assert list(tmp_path.iterdir()) == [path]
    moments().save(path)  # older programs read moments without gradients
    assert metadata_of(path)["version"] == 1


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    with refusal("give it that suffix"):
        moments().save(tmp_path / "m.pt")
    with refusal("cannot be written"):
        moments().save(tmp_path / "absent" / "m.safetensors")


def test_the_second_moment_of_a_weight():
    torch.testing.assert_close(moments().second_moment("a.k.weight"), hand_computed(normal(40, 6))[0] / 40)
    held_out = moments().second_moment("a.q.weight", held_out=True)
    torch.testing.assert_close(held_out, hand_computed(normal(9, 6, seed=1))[0] / 9)
    with refusal(r"inputs 'a\.up' have no held-out part"):
        moments().second_moment("a.up.weight", held_out=True)


def test_merged_moments_add_up_and_keep_the_layers_of_each():
    other = with_gradients(rows=7, held_out={}, held_out_gradients={})
    other.train["b"], other.aliases["b.weight"], other.batches["b"] = VectorSums.of(normal(3, 2)), "b", 1
    merged = with_gradients().merge(other)
    for found, width in ((merged.train["a.q"], 6), (merged.gradients["a.q.weight"], 3)):
        expected = hand_computed(torch.cat([normal(40, width), normal(7, width)]))[0]
        torch.testing.assert_close(found.sum_xx, expected, rtol=1e-13, atol=1e-13)
        assert found.count == 47
    assert merged.held_out["a.q"].count == merged.held_out_gradients["a.q.weight"].count == 9
    assert merged.train["b"].count == 3
    assert merged.batches == {"a.q": 10, "a.up": 10, "b": 1}
    assert merged.aliases == moments().aliases | {"b.weight": "b"}
    assert (merged.loss, merged.unit) == ("next token", "nats")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (with_gradients(model="GPT"), "of model 'MiniLM' and of 'GPT'"),
        (with_gradients(width=5), r"inputs 'a\.q' are 6 wide in one of the moments and 5"),
        (
            with_gradients(aliases={"a.k.weight": "a.up"}),
            r"'a\.k\.weight' has inputs 'a\.q' in one .* 'a\.up' in the other",
        ),
        (moments(), "gradients of 'next token' and of 'no loss' are not to be merged; collect both with one loss"),
        (with_gradients(loss="classes"), "gradients of 'next token' and of 'classes' are not to be merged"),
        (with_gradients(keys=("a.q.weight",)), "weight 'a.up.weight' has gradients in one of the moments only"),
        (
            with_gradients(gradients={key: VectorSums.of(normal(4, 2)) for key in ("a.q.weight", "a.up.weight")}),
            "gradients of 'a..*.weight' are 3 wide in one of the moments and 2 in the other",
        ),
    ],
)
def test_moments_that_do_not_belong_together_are_not_merged(other, message):
    with refusal(message):
        with_gradients().merge(other)


def write(path, tensors=None, metadata=None, **changed):
    """A moments file with changed tensors (None removes one) or metadata."""
    with_gradients().save(path)
    kept, record = load_file(path) | (tensors or {}), metadata_of(path) | changed
    text = json.dumps(record) if metadata is None else metadata
    save_file({name: value for name, value in kept.items() if value is not None}, path, {"ks_input_moments": text})


TENSORS = {
    "NaN": ({"a.q/sum_xx": torch.full((6, 6), float("nan"), dtype=torch.float64)}, "NaN or infinite"),
    "infinite mean": ({"a.q/sum_x": torch.full((6,), float("inf"))}, "NaN or infinite"),
    "not square": ({"a.q/sum_xx": torch.ones(6, 5)}, r"shape \(6, 5\)"),
    "empty": ({"a.q/sum_xx": torch.ones(0, 0)}, r"shape \(0, 0\)"),
    "width of the mean": ({"a.q/sum_x": torch.ones(5)}, r"sum_x has shape \(5,\); \(6,\)"),
    "integers": ({"a.q/sum_xx": torch.ones(6, 6, dtype=torch.int64)}, "dtype torch.int64"),
    "two counts": ({"a.q/count": torch.tensor([1, 2])}, "count must be one integer"),
    "negative count": ({"a.q/count": torch.tensor(-1)}, "count must be one integer"),
    "floating count": ({"a.q/count": torch.tensor(40.0)}, "count must be one integer"),
    "no held-out count": ({"a.q/held_out/count": None}, "'a.q/held_out': the file lacks count;"),
    "no count of gradients": (
        {"a.up.weight/gradients/count": None},
        r"gradients 'a\.up\.weight': the file lacks count; collect the moments again",
    ),
    "nothing": ({"a.q/sum_x": None, "a.q/sum_xx": None, "a.q/count": None}, "lacks sum_xx, sum_x, count;"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_invalid_sums_are_refused(tmp_path, case):
    tensors, message = TENSORS[case]
    write(tmp_path / "m.safetensors", tensors)
    with refusal(message):
        InputMoments.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 3}, "has version 3; 2 is the newest known"),
        ({"aliases": {}}, "invalid metadata"),
        ({"batches": {"a.q": -1}}, "invalid metadata"),
        ({"metadata": "{"}, "invalid metadata"),
    ],
)
def test_invalid_metadata_is_refused(tmp_path, changed, message):
    write(tmp_path / "m.safetensors", **changed)
    with refusal(message):
        InputMoments.open(tmp_path / "m.safetensors")


def test_other_files_are_refused(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "weights.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nonsense")
    messages = {
        "absent.safetensors": "no such file",
        "weights.safetensors": "holds no moments of inputs; ks.collect_input_moments",
        "damaged.safetensors": "cannot be read as moments of inputs",
    }
    for name, message in messages.items():
        with refusal(message):
            InputMoments.load(tmp_path / name)


def test_sums_that_exceed_the_memory_are_not_read(tmp_path, monkeypatch):
    moments().save(tmp_path / "m.safetensors")
    monkeypatch.setattr("ks.files.memory.available_bytes", lambda: 1000)
    with refusal(r"'a\.q' needs .* of memory"):
        InputMoments.load(tmp_path / "m.safetensors")
