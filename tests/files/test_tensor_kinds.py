"""Tensors of real checkpoints that are no weights of linear layers, as public reports of other tools describe them."""

import pytest
import torch
from safetensors.torch import save_file

from ks.errors import UsageError
from ks.files.tensor_kinds import AVERAGE, EMBEDDING, OPTIMIZER_STATE, QUANTISED, kinds_of
from ks.files.weights import entries_of, load_weight

W = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "quantised",
    [
        {"l.weight": W.to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(2, 2)},
        {"l.qweight": torch.ones(1, 8, dtype=torch.int32), "l.scales": W.half(), "l.qzeros": torch.ones(1, 2).int()},
        {"l.weight": torch.ones(24, 1, dtype=torch.uint8), "l.weight.absmax": torch.ones(2)},
    ],
    ids=["fp8", "gptq", "nf4"],
)
def test_a_quantised_layer_is_no_weight_with_all_its_parts(quantised, tmp_path):
    save_file(quantised | {"other.weight": W}, tmp_path / "w.safetensors")
    kinds = kinds_of(entries_of(tmp_path / "w.safetensors"))
    assert {name for name, kind in kinds.items() if kind == QUANTISED} >= {n for n in quantised if n.count(".") == 1}
    assert "other.weight" not in kinds
    assert load_weight(tmp_path / "w.safetensors").key == "other.weight"
    save_file(quantised, tmp_path / "alone.safetensors")
    with pytest.raises(UsageError, match="dequantise the checkpoint first"):
        load_weight(tmp_path / "alone.safetensors")


def test_optimizer_state_and_averages_are_no_weights_of_the_model():
    kinds = kinds_of(
        {
            "model.fc.weight": W,
            "optimizer.state.0.exp_avg": W,
            "optim.muon.state.3.momentum_buffer": W,
            "ema.shadow.fc.weight": W,
            "model_ema.out.weight": W,  # its original is not in the file
            "averaged.fc.weight": W[:4],  # of another shape
        }
    )
    assert kinds == {
        "optimizer.state.0.exp_avg": OPTIMIZER_STATE,
        "optim.muon.state.3.momentum_buffer": OPTIMIZER_STATE,
        "ema.shadow.fc.weight": AVERAGE,
    }


def test_a_tensor_that_is_no_weight_is_refused_by_its_name_with_the_reason(tmp_path):
    torch.save({"fc.weight": W, "state": {0: {"exp_avg": W}}}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"'state\.0\.exp_avg' is no weight of a layer: optimizer state"):
        load_weight(tmp_path / "w.pt", "state.0.exp_avg")


@pytest.mark.parametrize(
    ("name", "is_table"),
    [
        ("shared.weight", True),
        ("decoder.tok_emb.weight", True),
        ("block.0.relative_attention_bias.weight", True),
        ("embeddings.word.weight", True),
        ("transformer.wte.weight", True),
        ("time_embedding.linear_1.weight", False),
        ("embeddings_project.weight", False),
        ("layer.0.fc1.weight", False),
        ("member.weight", False),
    ],
)
def test_embeddings_are_recognised_by_the_name_of_their_module(name, is_table):
    assert (kinds_of({name: W}).get(name) == EMBEDDING) == is_table
