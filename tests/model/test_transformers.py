"""Tiny models of transformers: compressed, run, generated from, exported; skipped where transformers is missing."""

import pytest
import torch

import ks

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64} | SIZES
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
MAKE = {
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**LLAMA),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(**T5, decoder_start_token_id=0),
}
LAYERS = {
    "GPT2LMHeadModel": "**.mlp.*",
    "LlamaForCausalLM": "**.mlp.*",
    "T5ForConditionalGeneration": "**.DenseReluDense.*",
}


@pytest.mark.parametrize("name", MAKE)
def test_a_tiny_model_is_compressed_run_generated_from_and_exported(name):
    torch.manual_seed(0)
    model = getattr(transformers, name)(MAKE[name]()).eval()
    tokens = torch.randint(3, 40, (2, 7))
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :3]} if name.startswith("T5") else {})
    plan = ks.plan_model(model, LAYERS[name], budget=0.7, chains=["monarch"], quiet=True)
    ks.compress(model, plan, quiet=True)
    assert any(isinstance(module, ks.KSLinear) for module in model.modules())
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        exported = torch.export.export(model, (), inputs | {"use_cache": False}, strict=False).module()
        torch.testing.assert_close(exported(**inputs, use_cache=False).logits, logits)
    assert logits.isfinite().all()
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape[0] == 2
