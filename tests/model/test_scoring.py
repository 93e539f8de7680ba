"""The code of docs/models.md for other tools: lm-evaluation-harness, ordinary checkpoints, torch.export, torch.compile.

Skipped without the harness; `make test-scoring` has it.
"""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import ks

lm_eval = pytest.importorskip("lm_eval")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

WORDS = ["<unk>", "<eos>", "the", "a", "rank", "of", "chain", "is", "low", "high", "loss", "model"]
QUESTIONS = [
    {"question": "the rank of a chain is", "choices": ["low", "high"], "answer": 0},
    {"question": "the loss of the model is", "choices": ["high", "is low"], "answer": 1},  # the model generates it
    {"question": "the rank of the loss is", "choices": ["a chain", "the model"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: questions.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1}}
"""
BY_LIKELIHOOD = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
"""
BY_GENERATION = """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["<eos>"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def code_of(section) -> list[str]:
    text = (ROOT / "docs" / "models.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with small_model, a compressed model with its tokenizer, and two tasks for the harness."""
    folder = tmp_path_factory.mktemp("scoring")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.5, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    ks.compress(model, ks.plan_model(model, "**.mlp.*", budget=0.7, quiet=True), quiet=True)
    ks.save_compressed(model, folder / "small_model", tokenizer=tokenizer)
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "likelihood.yaml").write_text(TASK.format(name="likelihood") + BY_LIKELIHOOD)
    (folder / "generation.yaml").write_text(TASK.format(name="generation") + BY_GENERATION)
    return folder


@pytest.fixture(scope="module")
def names(folder):
    """What the documented code defines, with tasks that need no download."""
    scoring, dense = code_of("Score")
    documented = 'tasks=["arc_easy", "wikitext"]'
    assert documented in scoring
    scoring = scoring.replace(documented, 'tasks=["likelihood", "generation"], task_manager=tasks')
    names = {"tasks": TaskManager(include_path=str(folder), include_defaults=False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in (scoring, dense, *code_of("Compile and export")):
            exec(code, names)
    return names


def log_likelihood(names, context: str, words: str) -> tuple[float, bool]:
    """Of words after a context, by the model itself: the sum of the logarithms, and whether they are the likeliest."""
    given, added = (torch.tensor(names["scored"].tokenizer(text).input_ids) for text in (context, words))
    with torch.no_grad():
        logits = names["small"](torch.cat([given, added])[None]).logits[0, len(given) - 1 : -1]
    likelihoods = logits.log_softmax(-1).gather(1, added[:, None])
    return likelihoods.sum().item(), torch.equal(logits.argmax(-1), added)


def generated(names, context: str) -> str:
    tokens = torch.tensor([names["scored"].tokenizer(context).input_ids])
    found = names["small"].generate(tokens, attention_mask=tokens >= 0, max_new_tokens=3, do_sample=False)
    return names["scored"].tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True)


PAIRS = [(entry["question"], f" {choice}") for entry in QUESTIONS for choice in entry["choices"]]


def by_harness(scored) -> list[tuple[float, bool]]:
    """Its `log_likelihood` of all pairs."""
    return scored.loglikelihood([Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)])


def test_the_harness_scores_as_the_model_does(names):
    values, greedy = zip(*(log_likelihood(names, *pair) for pair in PAIRS))
    found = by_harness(names["scored"])
    assert [likeliest for _, likeliest in found] == [*greedy]
    assert [value for value, _ in found] == pytest.approx(values, rel=1e-4)
    right = [(values[2 * i] < values[2 * i + 1]) == entry["answer"] for i, entry in enumerate(QUESTIONS)]
    assert names["results"]["likelihood"]["acc,none"] == pytest.approx(sum(right) / len(right))
    right = [generated(names, entry["question"]) == entry["choices"][entry["answer"]] for entry in QUESTIONS]
    assert names["results"]["generation"]["exact_match,none"] == pytest.approx(sum(right) / len(right)) != 0


def test_the_ordinary_checkpoint_scores_alike_in_the_harness(names):
    assert not any(isinstance(module, ks.KSLinear) for module in names["dense"].model.modules())
    small, dense = (by_harness(names[name]) for name in ("scored", "dense"))
    assert [value for value, _ in dense] == pytest.approx([value for value, _ in small], rel=1e-4)


def test_the_exported_program_runs_in_a_process_without_this_toolkit(names, folder):
    tokens = torch.randint(0, len(WORDS), (3, 11))
    with torch.no_grad():
        torch.save((tokens, names["small"](tokens).logits), folder / "expected.pth")
    program = """if True:
        import sys, torch
        tokens, expected = torch.load("expected.pth")
        torch.testing.assert_close(torch.export.load("small_model.pt2").module()(tokens), expected)
        print({"ks", "transformers"} & {*sys.modules})
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_a_compiled_model_gives_the_same_logits_and_text(names):
    """Without the code generator, which takes minutes; torch captures and differentiates the same program."""
    small = names["small"]
    compiled = torch.compile(small, backend="aot_eager")
    tokens = torch.randint(0, len(WORDS), (2, 8))
    torch.testing.assert_close(compiled(tokens).logits, small(tokens).logits)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 2, "do_sample": False}
    assert torch.equal(compiled.generate(tokens, **options), small.generate(tokens, **options))
