"""What is compared: Llamas from configs, each method of ours at one size, and the same method of PEFT at that size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import lora_lite as ll

SIZES: dict[str, dict[str, Any]] = {
    "S4": {"hidden_size": 384, "num_hidden_layers": 4, "intermediate_size": 1536, "num_attention_heads": 6},
    "M3": {"hidden_size": 768, "num_hidden_layers": 3, "intermediate_size": 2048, "num_attention_heads": 12},
    "layer-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 1,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 1024,
    },
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 2},
}
VOCABULARY = 8192
"""Of the sizes that name no other: small beside the layers."""
BATCHES, TOKENS = 2, 128
"""Of what methods start from that start from data."""
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCKS = {
    "target_modules_bd_a": ["o_proj", "down_proj", "down"],
    "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "up"],
    "nblocks": 2,
}
Pair = tuple[dict[str, Any], tuple[str, dict[str, Any]]]
# method -> (our fields, PEFT's config class and arguments): the same method at the same size
PAIRS: dict[str, Callable[[int], Pair]] = {
    "lora": lambda r: ({"r": r, "alpha": 2 * r}, ("LoraConfig", {"r": r, "lora_alpha": 2 * r})),
    "lora+dropout": lambda r: (
        {"r": r, "alpha": 2 * r, "dropout": 0.1},
        ("LoraConfig", {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.1}),
    ),
    "dora": lambda r: ({"r": r, "alpha": 2 * r}, ("LoraConfig", {"r": r, "lora_alpha": 2 * r, "use_dora": True})),
    "hra": lambda r: ({"r": r}, ("HRAConfig", {"r": r})),
    "boft": lambda r: ({"n_factors": 1}, ("BOFTConfig", {"boft_block_size": 4})),
    "oft": lambda r: ({}, ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False})),
    "oft+series": lambda r: ({"neumann_terms": 5}, ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": True})),
    "road": lambda r: ({}, ("RoadConfig", {"variant": "road_1"})),
    "delora": lambda r: ({"r": r}, ("DeloraConfig", {"r": r})),
    "adamss": lambda r: (
        {"r": 32, "subspaces": 4},
        ("AdamssConfig", {"r": 32, "num_subspaces": 4, "subspace_rank": 1}),
    ),
    "bd_lora": lambda r: ({"r": r, "blocks": 2}, ("LoraConfig", {"r": r, "use_bdlora": ("BdLoraConfig", BLOCKS)})),
    "bitfit": lambda r: ({}, ("BeftConfig", {})),
    "c3a": lambda r: ({"block": 128}, ("C3AConfig", {"block_size": 128})),
    "deft": lambda r: ({"r": r}, ("DeftConfig", {"r": r})),
    "fourierft": lambda r: ({}, ("FourierFTConfig", {"n_frequency": 1000})),
    "frod": lambda r: ({}, ("FrodConfig", {})),
    "glora": lambda r: (  # without what PEFT leaves out where a layer has no bias
        {"r": r, "prompt": "none", "biases": "none"},
        ("GloraConfig", {"r": r, "config_C": "none", "config_D_E": "none"}),
    ),
    "gralora": lambda r: ({"r": r, "alpha": 2 * r}, ("GraloraConfig", {"r": r, "alpha": 2 * r, "gralora_k": 2})),
    "hira": lambda r: ({"r": r}, ("HiraConfig", {"r": r})),
    "ia3": lambda r: ({}, ("IA3Config", {"feedforward_modules": []})),
    "kasa": lambda r: ({"r": r}, ("LoraConfig", {"r": r, "kasa_config": ("KasaConfig", {})})),
    "lily": lambda r: ({"r": r}, ("LilyConfig", {"r": r, "num_B": 2})),
    "loha": lambda r: ({"r": r, "alpha": 2 * r}, ("LoHaConfig", {"r": r, "alpha": 2 * r})),
    "lokr": lambda r: ({"r": r, "alpha": 2 * r}, ("LoKrConfig", {"r": r, "alpha": 2 * r})),
    "mica": lambda r: ({"r": r}, ("LoraConfig", {"r": r, "init_lora_weights": "mica"})),
    "miss": lambda r: ({"r": r}, ("MissConfig", {"r": r})),
    "miss_bat": lambda r: ({"r": r}, ("MissConfig", {"r": r, "init_weights": "bat"})),
    "monteclora": lambda r: ({"r": r}, ("LoraConfig", {"r": r, "monteclora_config": ("MontecloraConfig", {})})),
    "osf": lambda r: ({}, ("OSFConfig", {})),  # half of the triplets; PEFT counts those that it keeps
    "peanut": lambda r: ({"r": r}, ("PeanutConfig", {"r": r})),
    "psoft": lambda r: ({"r": r}, ("PsoftConfig", {"r": r})),
    "pvera": lambda r: ({"r": 256}, ("PveraConfig", {"r": 256})),
    "randlora": lambda r: ({"r": r}, ("RandLoraConfig", {"r": r})),
    "shira": lambda r: ({"r": r}, ("ShiraConfig", {"r": r})),
    "supertuning": lambda r: ({}, ("SupertuningConfig", {})),
    "tinylora": lambda r: ({}, ("TinyLoraConfig", {})),
    "unilora": lambda r: ({}, ("UniLoraConfig", {})),
    "vblora": lambda r: ({"length": 128}, ("VBLoRAConfig", {"vector_length": 128})),
    "velora": lambda r: ({"r": r}, ("LoraConfig", {"r": r, "velora_config": ("VeloraConfig", {})})),
    "vera": lambda r: ({"r": 256}, ("VeraConfig", {"r": 256})),
    "waveft": lambda r: ({}, ("WaveFTConfig", {})),
    "pissa": lambda r: (
        {"r": r, "alpha": 2 * r},
        ("LoraConfig", {"r": r, "lora_alpha": 2 * r, "init_lora_weights": "pissa_niter_4"}),
    ),
    "olora": lambda r: (
        {"r": r, "alpha": 2 * r},
        ("LoraConfig", {"r": r, "lora_alpha": 2 * r, "init_lora_weights": "olora"}),
    ),
}
N_VIRTUAL, INVOCATION = 16, (5, 17)
"""Tokens of a prompt, and those that wake an aLoRA."""
PROMPT = {"num_virtual_tokens": N_VIRTUAL, "task_type": "CAUSAL_LM"}
CONTEXT = tuple(range(5, 5 + N_VIRTUAL))
IN_A_MODEL: dict[str, Callable[[int], Pair]] = {
    "adalora": lambda r: (
        {"r": r + r // 2, "target_r": r},
        ("AdaLoraConfig", {"init_r": r + r // 2, "target_r": r, "total_step": 1000}),
    ),
    "alora": lambda r: (
        {"r": 4 * r, "positions": "from:" + ",".join(map(str, INVOCATION))},
        ("LoraConfig", {"r": 4 * r, "lora_alpha": 4 * r, "alora_invocation_tokens": list(INVOCATION)}),
    ),
    "poly": lambda r: (
        {"r": r, "tasks": 2, "skills": 4},
        ("PolyConfig", {"r": r, "n_tasks": 2, "n_skills": 4}),
    ),
    "prompt_tuning": lambda r: ({"r": N_VIRTUAL}, ("PromptTuningConfig", PROMPT)),
    "p_tuning": lambda r: (
        {"r": N_VIRTUAL, "hidden": 256},
        ("PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 256}),
    ),
    "prefix_tuning": lambda r: ({"r": N_VIRTUAL}, ("PrefixTuningConfig", PROMPT)),
    "cartridge": lambda r: ({"r": N_VIRTUAL}, ("CartridgeConfig", PROMPT)),
    "cpt": lambda r: (
        {"r": N_VIRTUAL, "start_tokens": CONTEXT, "token_types": (1,) * N_VIRTUAL},
        ("CPTConfig", {"cpt_token_ids": list(CONTEXT), "cpt_tokens_type_mask": [1] * N_VIRTUAL}),
    ),
    "multitask_prompt_tuning": lambda r: (
        {"r": N_VIRTUAL, "tasks": 2},
        ("MultitaskPromptTuningConfig", {**PROMPT, "num_tasks": 2}),
    ),
    "adaption_prompt": lambda r: ({"r": N_VIRTUAL}, ("AdaptionPromptConfig", {"adapter_len": N_VIRTUAL})),
}
"""Method -> the same of those that need more than an input: a schedule, token ids, a task per row, an attention."""
OF_A_TASK = ("multitask_prompt_tuning", "poly")
"""Those that ask for `task_ids`."""
WITHOUT_RANK = (
    *("adamss", "bitfit", "boft", "c3a", "fourierft", "frod", "ia3", "oft", "oft+series", "pvera", "road"),
    *("osf", "supertuning", "tinylora", "unilora", "vblora", "vera", "waveft"),
)
"""Methods whose size does not depend on r."""
PEFT_IS_DENSE = ("hra", "boft")
"""Methods for which PEFT forms chains of d_in x d_in matrices: tens of gigabytes at a layer of an 8 B model, where it
is not run."""


def methods() -> list[str]:
    """What can be timed: the pairs with PEFT, then every other trained method at linear layers that starts from
    nothing, from the weight or from batches of text."""
    linear = [v for v in ll.variants() if v.site == ll.Variant.site and v.trains]
    others = [v.name for v in linear if v.needs_data in ("", "batches")]
    return [*PAIRS, *(n for n in others if n not in PAIRS)]


def has_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


def base(size: str) -> Any:
    """A Llama from a config, the same weights in every call, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, **SIZES[size]}
    return LlamaForCausalLM(LlamaConfig(**shape)).requires_grad_(False)


def config(method: str, r: int) -> ll.AdapterConfig:
    """Our config of a pair; of another method, its default at rank r."""
    variant = ll.get_variant(method.split("+")[0])
    pairs = PAIRS | IN_A_MODEL
    fields: dict[str, Any] = pairs[method](r)[0] if method in pairs else {"r": r}
    return variant.config(variant=variant.name, **fields)


def data(method: str, model: Any) -> list[dict[str, Any]] | None:
    """Batches of random tokens for a method that starts from data."""
    if not ll.get_variant(method.split("+")[0]).needs_data:
        return None
    drawn = torch.Generator().manual_seed(2)
    ids = torch.randint(0, model.config.vocab_size, (BATCHES, 1, TOKENS), generator=drawn)
    return [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]


def peft_config(method: str, r: int, names: Sequence[str] = ALL) -> Any:
    """PEFT's config of a pair; an argument (name, its arguments) is a config of a form of LoRA."""
    import peft
    from peft.tuners.lora import config as forms

    name, arguments = PAIRS[method](r)[1]
    made = {k: getattr(forms, v[0])(**v[1]) if isinstance(v, tuple) else v for k, v in arguments.items()}
    return getattr(peft, name)(target_modules=list(names), **made)


def peft_model(method: str, r: int, model: Any) -> Any:
    """PEFT's model of one of `IN_A_MODEL` on a Llama."""
    import peft

    name, arguments = IN_A_MODEL[method](r)[1]
    more: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if method in ("adalora", "alora", "poly"):
        more["target_modules"] = ALL
    if method == "adaption_prompt":
        more["adapter_layers"] = model.config.num_hidden_layers
    return peft.get_peft_model(model, getattr(peft, name)(**more | arguments))


def runs_in_peft(method: str, size: str) -> bool:
    """Whether PEFT is there, has the method, and can run it at this size."""
    return method in PAIRS and has_peft() and not (size == "layer-8b" and method in PEFT_IS_DENSE)


def ours(size: str, method: str, r: int, model: Any = None) -> Any:
    """The given model, or a new one of this size, with our adapter."""
    model = base(size) if model is None else model
    ll.attach(model, config(method, r), calibration_data=data(method, model))
    return model


def theirs(size: str, method: str, r: int, model: Any = None) -> Any | None:
    """PEFT's model on the given one, or on a new one; None where it has no such method, is missing, or cannot."""
    if not runs_in_peft(method, size):
        return None
    import peft

    try:
        return peft.get_peft_model(base(size) if model is None else model, peft_config(method, r))
    except (ValueError, ImportError):  # a width that its method does not divide, or a package that it wants
        return None


def all_three(size: str, method: str, r: int) -> dict[str, Any]:
    """Name -> model in training mode, "peft" only where it runs; each has weights of its own."""
    bare = base(size)
    models = {"base": bare, "ours": ours(size, method, r, copy.deepcopy(bare))}
    rival = theirs(size, method, r, copy.deepcopy(bare)) if runs_in_peft(method, size) else None
    if rival is not None:
        models["peft"] = rival
    return {k: models[k].train() for k in ("base", "peft", "ours") if k in models}


def targets(model: nn.Module) -> list[nn.Module]:
    """The bare linear layers that adapters stand on."""
    return [m for name, m in model.named_modules() if name.rpartition(".")[2] in ALL]
