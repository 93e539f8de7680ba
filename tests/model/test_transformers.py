"""Tiny models of transformers, one of each kind, from collecting to generating; skipped without transformers."""

import pytest
import torch

import ks

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
PLAIN = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64} | SIZES
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32} | SIZES
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WHISPER = SPECIAL | {
    "vocab_size": 40,
    "d_model": 16,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 20,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
}
EXPERTS = PLAIN | {"num_key_value_heads": 2}
QWEN = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
# name: (configuration, layers)
MODELS = {
    "GPT2LMHeadModel": ({"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2}, "**.mlp.*"),
    "OPTForCausalLM": (PLAIN | {"ffn_dim": 32, "word_embed_proj_dim": 16}, "**.fc*"),
    "LlamaForCausalLM": (PLAIN, "**.mlp.*"),
    "MixtralForCausalLM": (EXPERTS | {"num_local_experts": 2}, "**.self_attn.*"),
    "Qwen3MoeForCausalLM": (EXPERTS | QWEN, "**.self_attn.*"),
    "MambaForCausalLM": (
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        "**.in_proj",
    ),
    "T5ForConditionalGeneration": (T5 | {"decoder_start_token_id": 0}, "**.DenseReluDense.*"),
    "WhisperForConditionalGeneration": (WHISPER, "**.fc*"),
    "BertForSequenceClassification": (PLAIN | {"num_labels": 3}, "**.layer.*.**.dense"),
    "ViTForImageClassification": (VISION | {"num_labels": 3}, "**.layers.**"),
    "CLIPModel": (
        {"text_config": PLAIN | SPECIAL, "vision_config": VISION, "projection_dim": 8},
        "**.mlp.*",
    ),
}
EXPORTED = ("GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration")
TOKENS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def batch_for(name):
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if name.startswith("ViT"):
        return {"pixel_values": pixels}
    if name.startswith("Whisper"):
        return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": TOKENS}
    tokens = {"input_ids": TOKENS, "attention_mask": MASK}
    if name.startswith("T5"):
        return tokens | {"decoder_input_ids": TOKENS[:, :3]}
    return tokens | {"pixel_values": pixels} if name.startswith("CLIP") else tokens


def loss_for(name):
    if "LM" in name:
        return ks.NextTokenLoss()
    if "Classification" in name:
        return ks.ClassifierLoss(labels="model")
    return lambda output, batch: (output.logits_per_image if name.startswith("CLIP") else output.logits).square().sum()


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_model_is_collected_planned_compressed_saved_loaded_and_generates(name, tmp_path):
    (options, layers), of_name = MODELS[name], getattr(transformers, name)
    torch.manual_seed(0)
    model, batch = of_name(of_name.config_class(**options)).eval(), batch_for(name)
    mask = None
    if name.startswith("T5"):  # its attention mask is that of the encoder
        mask = {"encoder.**": lambda batch: batch["attention_mask"], "decoder.**": lambda batch: None}
    elif name.startswith("CLIP"):
        mask = {"text_model.**": lambda batch: batch["attention_mask"], "vision_model.**": lambda batch: None}
    moments = ks.collect_input_moments(model, [batch] * 2, layers, loss=loss_for(name), mask=mask, quiet=True)
    plan = ks.plan_model(model, layers, budget=0.7, chains=["lowrank"], moments=moments, quiet=True)
    assert plan.loss_increase > 0
    ks.compress(model, plan, moments=moments, quiet=True)
    assert any(isinstance(module, ks.KSLinear) for module in model.modules())
    kept = "logits_per_image" if name.startswith("CLIP") else "logits"
    ks.save_compressed(model, tmp_path / "small")
    given = ks.load_compressed(of_name(of_name.config_class(**options)).eval(), tmp_path / "small")
    loaded = ks.load_compressed(tmp_path / "small")
    ks.save_compressed(model, tmp_path / "dense", densify=True)
    dense = of_name.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        expected = model(**batch)
        assert torch.equal(given(**batch)[kept], expected[kept])
        assert torch.equal(loaded(**batch)[kept], expected[kept])
        torch.testing.assert_close(dense(**batch)[kept], expected[kept])
    assert expected[kept].isfinite().all()
    assert not loaded.training
    assert loaded.config.to_dict() | {"dtype": None} == model.config.to_dict() | {
        "dtype": None,
        "architectures": [name],
    }
    if name in EXPORTED:
        named = batch | {"use_cache": False}
        exported = torch.export.export(model, (), named, strict=False).module()
        torch.testing.assert_close(exported(**named).logits, expected.logits)
    if "LM" in name or "Generation" in name:
        inputs = batch["input_features"] if name.startswith("Whisper") else TOKENS
        assert len(loaded.generate(inputs, max_new_tokens=4, do_sample=False)) == 2
