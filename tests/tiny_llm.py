"""A random two-block Llama with a tokenizer of single characters, saved as a local model directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:?!'\"+-*/=#()\n"


def tokenizer():
    """One token per character; <pad>, <bos>, <eos>, <unk> before them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *CHARS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def model(seed: int = 0, width: int = 32):
    """LlamaForCausalLM, 2 blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARS) + 4,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def save(folder: Path, width: int = 32) -> Path:
    """Write model and tokenizer into `folder`."""
    model(width=width).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sums(path: Path, n: int = 24, start: int = 0) -> Path:
    """A JSONL file of prompt/completion lines about small sums."""
    rows = [{"prompt": f"{a}+{a + 1}=", "completion": str(2 * a + 1)} for a in range(start, start + n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
