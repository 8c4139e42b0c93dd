"""The reference model of TRL's preference and policy trainers: the adapter as it was, on the one base in memory."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.testing.case import randomise

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LORA = ll.LoRAConfig(r=2, alpha=3)
PAIRS = [{"prompt": f"{i}+1=", "chosen": f"{i + 1} yes", "rejected": f"{i} no, no"} for i in range(8)]
LABELS = [{"prompt": f"{i}+1=", "completion": f"{i + 1} yes", "label": i % 2 == 0} for i in range(8)]
PROMPTS = [{"prompt": f"{i}+1="} for i in range(8)]


def storages(*modules) -> int:
    """Bytes of every tensor of these modules, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in modules for t in m.parameters()}
    return sum(found.values())


def warm():
    """A model with an adapter that has been trained somewhere: random tensors that are not zero."""
    model = tiny_llm.model()
    ll.attach(model, LORA)
    randomise(model, seed=1)
    return model


def options(folder, **changes):
    return dict(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        logging_steps=1, save_steps=1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, bf16=False,
        **changes,
    )  # fmt: skip


def dpo(folder, model, cfg=None, **changes):
    args = trl.DPOConfig(**options(folder, **changes))
    rows = datasets.Dataset.from_list(PAIRS)
    return ll.trainer(trl.DPOTrainer, cfg)(
        model=model, args=args, train_dataset=rows, processing_class=tiny_llm.tokenizer()
    )


def kto(folder, model, cfg=None):
    args = trl.KTOConfig(**options(folder))
    rows = datasets.Dataset.from_list(LABELS)
    return ll.trainer(trl.KTOTrainer, cfg)(
        model=model, args=args, train_dataset=rows, processing_class=tiny_llm.tokenizer()
    )


def online(cls, config, folder, model, cfg=None):
    args = config(**options(folder, num_generations=4, max_completion_length=5, beta=0.1))
    return ll.trainer(cls, cfg)(
        model=model,
        args=args,
        reward_funcs=lambda completions, **_: [float(len(c)) + i for i, c in enumerate(completions)],
        train_dataset=datasets.Dataset.from_list(PROMPTS),
        processing_class=tiny_llm.tokenizer(),
    )


def grpo(folder, model, cfg=None):
    return online(trl.GRPOTrainer, trl.GRPOConfig, folder, model, cfg)


def rloo(folder, model, cfg=None):
    return online(trl.RLOOTrainer, trl.RLOOConfig, folder, model, cfg)


FIRST = {dpo: ["rewards/margins", "rewards/chosen"], kto: ["kl"], grpo: ["kl"], rloo: ["kl"]}


LONG = (kto, rloo)
EACH = [pytest.param(make, id=make.__name__, marks=[pytest.mark.slow] if make in LONG else []) for make in FIRST]


@pytest.mark.parametrize("make", EACH)
def test_the_first_step_of_a_warm_adapter_measures_from_itself(tmp_path, make):
    model = warm()
    before, base = ll.adapter_state_dict(model), sum(p.numel() * 4 for p in model.parameters() if not p.requires_grad)
    trainer = make(tmp_path, model)
    adapter = sum(p.numel() * 4 for p in ll.adapters(model)["default"].parameters())
    assert storages(model, trainer.ref_model) == base + 2 * adapter
    trainer.train()
    (log,) = [e for e in trainer.state.log_history if "loss" in e]
    assert all(log[what] == 0 for what in FIRST[make]), log
    after = ll.adapter_state_dict(model)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    kept = ll.adapter_state_dict(model, "default-reference")
    assert all(torch.equal(before[k], kept[k]) for k in before)
    ids = torch.arange(5, 12)[None]
    with ll.active(model, "default-reference"):
        want = model.eval()(ids).logits
    assert torch.equal(trainer.ref_model(ids).logits, want) and not torch.equal(model(ids).logits, want)
    saved = tmp_path / "checkpoint-1" / "reference" / "adapter.safetensors"
    ll.load(other := tiny_llm.model(), saved)
    assert all(torch.equal(v, ll.adapter_state_dict(other)[k]) for k, v in before.items())


def test_a_fresh_adapter_measures_from_the_base(tmp_path):
    model = tiny_llm.model()
    ids = torch.arange(5, 12)[None]
    want = model.eval()(ids).logits
    trainer = dpo(tmp_path, model, LORA)
    assert list(ll.adapters(model)) == ["default"] and torch.equal(trainer.ref_model(ids).logits, want)
    randomise(model, seed=2)
    assert torch.equal(trainer.ref_model(ids).logits, want) and not torch.equal(model(ids).logits, want)


def test_a_resumed_run_measures_from_where_it_began(tmp_path):
    dpo(tmp_path, warm()).train()
    folder = tmp_path / "checkpoint-1"
    model = tiny_llm.model()
    ll.load(model, folder / "reference", trainable=True)
    trainer = dpo(tmp_path, model)
    randomise(model, "default-reference", seed=5)
    trainer._load_from_checkpoint(str(folder))
    want, got = ll.adapter_state_dict(warm()), ll.adapter_state_dict(model, "default-reference")
    assert all(torch.equal(want[k], got[k]) for k in want)
    fresh = dpo(tmp_path, tiny_llm.model(), LORA)
    with pytest.raises(ll.FileError, match="measured from another adapter.*ll.load"):
        fresh._load_from_checkpoint(str(folder))


def test_what_contradicts_a_shared_base_is_refused(tmp_path):
    with pytest.raises(ll.StateError, match="sync_ref_model"):
        dpo(tmp_path, warm(), sync_ref_model=True)
    with pytest.raises(ll.StateError, match="dropout=0"):
        dpo(tmp_path, tiny_llm.model(), ll.LoRAConfig(r=2, alpha=3, dropout=0.1))


def test_a_model_of_ones_own_stays_the_reference(tmp_path):
    own = tiny_llm.model(seed=3)
    trainer = ll.trainer(trl.DPOTrainer)(
        model=warm(), ref_model=own, args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=datasets.Dataset.from_list(PAIRS), processing_class=tiny_llm.tokenizer(),
    )  # fmt: skip
    assert trainer.ref_model is own


@pytest.mark.slow
def test_a_warm_adapter_on_a_quantised_base_measures_from_itself(tmp_path):
    """TRL casts it to bf16 on the way, which neither it nor its copy keeps."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    tiny_llm.save(tmp_path / "base", width=128)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    ll.attach(model, LORA)
    randomise(model, seed=1)
    want = ll.adapter_state_dict(model)
    trainer = dpo(tmp_path / "out", model)
    for name in ("default", "default-reference"):
        assert all(torch.equal(v, want[k]) for k, v in ll.adapter_state_dict(model, name).items())
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
