"""Tiny models of transformers, one of each kind, from collecting to generating; skipped without transformers."""

import functools
import json
import re
import sys

import pytest
import torch
from conftest import refusal
from planned import peak_mib

import ks

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")
tokenizers = pytest.importorskip("tokenizers")

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
MAMBA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
# name: (configuration, layers)
MODELS = {
    "GPT2LMHeadModel": ({"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2}, "**.mlp.*"),
    "OPTForCausalLM": (PLAIN | {"ffn_dim": 32, "word_embed_proj_dim": 16}, "**.fc*"),
    "LlamaForCausalLM": (PLAIN, "**.mlp.*"),
    "MixtralForCausalLM": (EXPERTS | {"num_local_experts": 2}, "**.self_attn.*"),
    "Qwen3MoeForCausalLM": (EXPERTS | QWEN, "**.self_attn.*"),
    "MambaForCausalLM": (MAMBA, "**.in_proj"),
    "Mamba2ForCausalLM": (  # its configuration has an infinity
        MAMBA | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
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
    own = {"dtype": None, "architectures": [name]}
    assert loaded.config.to_dict() | own == model.config.to_dict() | own
    if name in EXPORTED:
        named = batch | {"use_cache": False}
        exported = torch.export.export(model, (), named, strict=False).module()
        torch.testing.assert_close(exported(**named).logits, expected.logits)
    if "LM" in name or "Generation" in name:
        inputs = batch["input_features"] if name.startswith("Whisper") else TOKENS
        assert len(loaded.generate(inputs, max_new_tokens=4, do_sample=False)) == 2


def small_llama(kind=transformers.LlamaForCausalLM, **options):
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**(PLAIN | {"tie_word_embeddings": True} | options))).eval()
    return ks.compress(model, ks.plan_model(model, "**.mlp.*", budget=0.7, quiet=True), quiet=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_keeps_dtypes_ties_buffers_and_the_generation_configuration(tmp_path, dtype):
    model = small_llama().to(dtype)  # the frequencies of the rotary embedding too, unlike in a new model
    assert model.model.rotary_emb.inv_freq.dtype == dtype
    model.generation_config.max_new_tokens = 3
    ks.save_compressed(model, tmp_path / "small", max_shard_size=1000)
    loaded = ks.load_compressed(str(tmp_path / "small"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {loaded.config.dtype} == {dtype}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    generated = loaded.generate(TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, model.generate(TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert generated.shape[1] == TOKENS.shape[1] + 3
    ks.save_compressed(loaded, tmp_path / "again")
    again = ks.load_compressed(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_frequencies_that_a_long_input_has_changed_are_saved_as_they_were_before(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4, "rope_theta": 100}
    model = small_llama(max_position_embeddings=8, rope_parameters=rope)
    model(TOKENS.repeat(1, 4))
    ks.save_compressed(model, tmp_path / "small")
    loaded = ks.load_compressed(tmp_path / "small")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_no_code_of_a_folder_is_run(tmp_path, capsys):
    model = small_llama()
    folder, marker = tmp_path / "small", tmp_path / "marker"
    model.config.auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    ks.save_compressed(model, folder)
    assert "auto_map" not in (folder / "config.json").read_text()
    (folder / "evil.py").write_text(f"from pathlib import Path; Path({str(marker)!r}).touch()")

    def spoil(config):
        config["auto_map"] = model.config.auto_map
        config["nested"] = [{"auto_map": model.config.auto_map}]
        config["attn_implementation"] = "evil/kernel"  # would be loaded from a hub, and run

    edited(folder / "config.json", spoil)
    loaded = ks.load_compressed(folder)
    assert "config.json: auto_map, attn_implementation left out, because it can name code" in capsys.readouterr().err
    assert "auto_map" not in loaded.config.to_json_string()
    assert loaded.config._attn_implementation == model.config._attn_implementation
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert not marker.exists()
    for name in ("EvilForCausalLM", "evil.EvilForCausalLM", "AutoModel", "LlamaConfig", "pipeline", "os", "__class__"):
        edited(folder / "compressed.json", lambda record, name=name: record.update(model=name))
        with refusal(f"holds a {name}, which the installed transformers .* does not have;"):
            ks.load_compressed(folder)
    assert not marker.exists()


DAMAGED = {
    "newer": (lambda config: config.update(transformers_version="99.1.0"), "of transformers 99.1.0, newer than the in"),
    "value": (lambda config: config.update(num_attention_heads="two"), "makes no LlamaForCausalLM of it"),
    "size": (lambda config: config.update(intermediate_size=40), "another architecture .LlamaForCausalLM.: .*mlp"),
    "layers": (lambda config: config.update(num_hidden_layers=3), "another architecture .* is absent in the file and"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_configuration_that_does_not_fit_is_one_line(tmp_path, damage):
    ks.save_compressed(small_llama(), tmp_path / "small")
    change, message = DAMAGED[damage]
    edited(tmp_path / "small" / "config.json", change)
    with refusal(message):
        ks.load_compressed(tmp_path / "small")


def test_a_class_that_is_not_of_transformers_itself_is_given_with_the_folder(tmp_path):
    own = type("OwnLlama", (transformers.LlamaForCausalLM,), {})
    model = small_llama(own)
    ks.save_compressed(model, tmp_path / "small")
    with refusal("has no config.json, since OwnLlama is no class of transformers; give the mo"):
        ks.load_compressed(tmp_path / "small")
    with torch.device("meta"):
        fresh = own(model.config).eval()
    assert torch.equal(ks.load_compressed(fresh, tmp_path / "small")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("size", [1000, 10**9])
def test_from_pretrained_refuses_a_folder_with_chains_instead_of_starting_them_anew(tmp_path, size):
    ks.save_compressed(small_llama(), tmp_path / "small", max_shard_size=size)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert "does not load it: for that, save the model with `densify" in (tmp_path / "small" / "README.md").read_text()


def word_tokenizer():
    words = {"[UNK]": 0} | {f"w{index}": index for index in range(1, 40)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("densify", [False, True])
def test_the_card_loads_model_and_tokenizer_as_written(tmp_path, monkeypatch, densify):
    model = small_llama()
    model.config.name_or_path = "somebody/tiny-llama"
    ks.save_compressed(model, tmp_path / "small", tokenizer=word_tokenizer(), densify=densify)
    card = huggingface_hub.ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.base_model == "somebody/tiny-llama"
    assert card.data.library_name == ("transformers" if densify else "ks")
    assert "# tiny-llama, compressed" in card.text
    dense = transformers.LlamaForCausalLM(model.config).num_parameters()
    assert f"factors: {model.num_parameters():,} of {dense:,} parameters" in card.text
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], found)
    torch.testing.assert_close(found["model"](TOKENS).logits, model(TOKENS).logits)
    assert found["tokenizer"]("w3 w39").input_ids == [3, 39]


def test_a_path_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "best").mkdir(parents=True)
    for name in (str(tmp_path), "runs/best", "./runs/best", "runs\nlicense: mit/x", ""):
        model = small_llama()
        model.config.name_or_path = name
        ks.save_compressed(model, tmp_path / "small")
        text = "".join(path.read_text() for path in (tmp_path / "small").iterdir() if path.suffix != ".safetensors")
        assert "base_model" not in text
        assert "license" not in text
        assert str(tmp_path) not in text


def test_a_densified_folder_is_loaded_by_an_auto_class(tmp_path):
    model = small_llama().bfloat16()
    # left by transformers behind weights that it dequantised
    model.config.quantization_config = {"quant_method": "gguf"}
    ks.save_compressed(model, tmp_path / "dense", densify=True, max_shard_size=3000)
    assert (tmp_path / "dense" / "model.safetensors.index.json").exists()
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, atol=0.02, rtol=0.02)
    with refusal("holds an ordinary checkpoint .*; load it by from_pretrained of LlamaForC"):
        ks.load_compressed(tmp_path / "dense")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dense_weights_are_never_in_memory(tmp_path):
    """The MLPs of the two blocks would need 72 MiB each where they are dense; their chains have 1.3 MiB."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"vocab_size": 40, "hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        for layer in model.model.layers:
            for name, size in {"gate": (1024, 6144), "up": (1024, 6144), "down": (6144, 1024)}.items():
                setattr(layer.mlp, f"{name}_proj", ks.KSLinear(*size))
    ks.save_compressed(model.to_empty(device="cpu"), tmp_path / "small")
    assert peak_mib(functools.partial(ks.load_compressed, tmp_path / "small")) < 40
