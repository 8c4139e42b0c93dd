"""Models of a few thousand random weights, made from configs: what their layers are called, and a batch for each."""

from __future__ import annotations

import copy
import functools
import inspect

import torch

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
KV = dict(num_key_value_heads=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
DEEPSEEK = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16, kv_lora_rank=8,
    q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
)  # fmt: skip
LLAMA = {
    "reader": "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
    "writer": "self_attn.o_proj mlp.down_proj",
}
BERT = {
    "reader": "attention.self.query attention.self.key attention.self.value intermediate.dense",
    "writer": "attention.output.dense output.dense",
}
NEOX = {
    "reader": "attention.query_key_value mlp.dense_h_to_4h",
    "writer": "attention.dense mlp.dense_4h_to_h",
}

# name -> (class, config, prefix of the blocks, role -> layers of block 0)
MODELS = {
    "llama": ("LlamaForCausalLM", SIZE | KV, "model.layers", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", SIZE | KV, "model.layers", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", SIZE | KV | dict(head_dim=16), "model.layers", LLAMA),
    "gemma": ("GemmaForCausalLM", SIZE | KV | dict(head_dim=8), "model.layers", LLAMA),
    "mixtral": (
        "MixtralForCausalLM",
        SIZE | KV | dict(num_local_experts=2),
        "model.layers",
        {"reader": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "writer": "self_attn.o_proj"},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        GPT2,
        "transformer.h",
        {"reader": "attn.c_attn mlp.c_fc", "writer": "attn.c_proj mlp.c_proj"},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZE, "gpt_neox.layers", NEOX),
    "opt": (
        "OPTForCausalLM",
        {k: v for k, v in SIZE.items() if k != "intermediate_size"} | dict(ffn_dim=48, word_embed_proj_dim=32),
        "model.decoder.layers",
        {"reader": "self_attn.q_proj self_attn.k_proj self_attn.v_proj fc1", "writer": "self_attn.out_proj fc2"},
    ),
    "bert": ("BertForSequenceClassification", SIZE, "bert.encoder.layer", BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=64),
        "distilbert.transformer.layer",
        {"reader": "attention.q_lin attention.k_lin attention.v_lin ffn.lin1", "writer": "attention.out_lin ffn.lin2"},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        T5,
        "encoder.block",
        {
            "reader": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v "
            "layer.1.DenseReluDense.wi",
            "writer": "layer.0.SelfAttention.o layer.1.DenseReluDense.wo",
        },
    ),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        SIZE | dict(num_key_value_heads=4) | DEEPSEEK,
        "model.layers",
        {
            "reader": "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa mlp.gate_proj mlp.up_proj",
            "writer": "self_attn.o_proj mlp.down_proj",
            "inner": "self_attn.q_b_proj self_attn.kv_b_proj",
        },
    ),
    "phi3": (
        "Phi3ForCausalLM",
        SIZE | KV,
        "model.layers",
        {"reader": "self_attn.qkv_proj mlp.gate_up_proj", "writer": "self_attn.o_proj mlp.down_proj"},
    ),
}


@functools.lru_cache
def _config(name: str):
    import transformers

    cls, fields, *_ = MODELS[name]
    model_class = getattr(transformers, cls)
    return model_class, model_class.config_class(**{**fields, **TOKENS})


def build(name: str, **changes):
    """A fresh model with the same random weights at every call, in eval mode."""
    cls, config = _config(name)
    if changes:
        config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(0)
    return cls(copy.deepcopy(config)).eval()


def batch(name: str, rows: int = 2, tokens: int = 7) -> dict[str, torch.Tensor]:
    """Token ids, and what else the model's forward wants."""
    ids = torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if name == "t5" else {"input_ids": ids}


def expected(name: str) -> dict[str, str]:
    """Path -> role of the linear layers of block 0."""
    _, _, prefix, roles = MODELS[name]
    return {f"{prefix}.0.{layer}": role for role, layers in roles.items() for layer in layers.split()}


def continuing(model, cache) -> dict:
    """The argument that hands a key-value cache to a model, whose name changed with transformers 5.24."""
    names = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}
