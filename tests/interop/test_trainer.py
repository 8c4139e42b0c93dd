"""Adapters under transformers' Trainer and TRL's SFTTrainer: what a checkpoint holds, exact resume, best model,
schedule, penalty, groups."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import lora_lite as ll
import tiny_llm
from lora_lite.core import registry
from lora_lite.interop.engines import leave_base_out
from lora_lite.interop.trainer import adapter_trainer, load_checkpoint

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True, kw_only=True)
class ClockConfig(ll.AdapterConfig):
    variant: str = "clock"
    weight: float = 0.0


class Clock(ll.Variant):
    """A method with a schedule and a penalty: the gate is scaled at every step by a factor that depends on the step."""

    name = "clock"
    config = ClockConfig

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return {"lora_gate": ll.ParamSpec((d_out,), decay=False), "lora_A": ll.ParamSpec((1, d_in), lr_ratio=4.0)}

    @staticmethod
    def forward(layer, x, y):
        return y * (1 + layer.lora_gate) + 0.0 * (x @ layer.lora_A.mT)

    @staticmethod
    def on_step(targets, cfg, step):
        for layer in targets:
            layer.master("lora_gate").mul_(1 - 0.1 / step)

    @staticmethod
    def penalty(layer):
        return layer.cfg.weight * layer.lora_A.square().sum()


@pytest.fixture(autouse=True, scope="module")
def _registered():
    ll.register(Clock)
    yield
    registry._TABLE.pop(Clock.name)


class Rows(Dataset):
    def __init__(self, n=24):
        self.x = torch.randint(4, 60, (n, 9), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"input_ids": self.x[i], "labels": self.x[i], "attention_mask": torch.ones(9, dtype=torch.long)}


def arguments(folder: Path, **changes):
    options = dict(
        output_dir=str(folder),
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        logging_steps=1,
        save_steps=5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return transformers.TrainingArguments(**{**options, **changes})


def trainer(folder: Path, cfg: ll.AdapterConfig, name: str = "default", callbacks=(), **changes):
    model = tiny_llm.model()
    ll.attach(model, cfg, name=name)
    return adapter_trainer()(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Rows(),
        eval_dataset=Rows(8),
        callbacks=list(callbacks),
    )


def tensors(t) -> dict[str, torch.Tensor]:
    return ll.adapter_state_dict(t.model)


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


LORA = ll.LoRAConfig(r=2, alpha=3, dropout=0.2)


@pytest.mark.parametrize("cfg", [LORA, ClockConfig(weight=0.3)], ids=lambda c: c.variant)
def test_five_and_five_is_ten(tmp_path, cfg):
    straight = trainer(tmp_path / "a", cfg)
    straight.train()
    first = trainer(tmp_path / "b", cfg, callbacks=[StopAt(5)])
    first.train()
    assert first.state.global_step == 5
    second = trainer(tmp_path / "b", cfg)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    want, got = tensors(straight), tensors(second)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[k], got[k]) for k in want)
    assert any(not torch.equal(v, tensors(first)[k]) for k, v in want.items())
    assert ll.adapters(second.model)["default"].record.steps == (10 if cfg.variant == "clock" else 0)


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tmp_path):
    t = trainer(tmp_path, LORA, name="mine")
    t.train()
    folder = tmp_path / "checkpoint-10"
    names = {p.name for p in folder.iterdir()}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    peft = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == {"adapter-mine.safetensors", "README.md"} | peft | state
    fresh = tiny_llm.model()
    ll.load(fresh, folder / "adapter-mine.safetensors")
    assert all(torch.equal(v, ll.adapter_state_dict(fresh)[k]) for k, v in tensors(t).items())


def test_the_best_model_comes_back(tmp_path):
    t = trainer(
        tmp_path,
        LORA,
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worse of two: not simply the last one
    )
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-5")
    other = tiny_llm.model()
    ll.load(other, tmp_path / "checkpoint-5" / "adapter.safetensors")
    assert all(torch.equal(v, ll.adapter_state_dict(other)[k]) for k, v in tensors(t).items())


def test_the_groups_are_the_adapters(tmp_path):
    t = trainer(tmp_path, ClockConfig())
    t.create_optimizer()
    got = {(g["lr"], g["weight_decay"], len(g["params"])) for g in t.optimizer.param_groups}
    assert got == {(1e-2, 0.0, 14), (4e-2, 0.1, 14)}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_penalty_is_added_once_per_step(tmp_path, accumulation):
    """With a zero learning signal on lora_A, its gradient is the penalty's alone: 2 w A, however many parts a batch
    has."""
    seen = {}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.setdefault("grad", {n: p.grad.clone() for n, p in model.named_parameters() if n.endswith("lora_A")})

    t = trainer(
        tmp_path,
        ClockConfig(weight=0.3),
        callbacks=[Look()],
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0,
    )
    start = {k: v for k, v in tensors(t).items()}
    with torch.no_grad():
        for k in start:
            if k.endswith("lora_A"):
                t.model.get_parameter(k).normal_(generator=torch.Generator().manual_seed(3))
    start = tensors(t)
    t.train()
    for k, g in seen["grad"].items():
        torch.testing.assert_close(g, 0.6 * start[k], rtol=1e-5, atol=1e-6)


def test_resume_refuses_another_config_and_another_base(tmp_path):
    trainer(tmp_path, LORA, max_steps=5).train()
    folder = tmp_path / "checkpoint-5"
    model = tiny_llm.model()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=4, dropout=0.2))
    with pytest.raises(ll.FileError, match=r"alpha=3.0, not 4.0"):
        load_checkpoint(model, folder)
    model = tiny_llm.model(seed=5)
    ll.attach(model, LORA)
    before = ll.adapter_state_dict(model)
    with pytest.raises(ll.BaseMismatchError):
        load_checkpoint(model, folder)
    assert all(torch.equal(v, ll.adapter_state_dict(model)[k]) for k, v in before.items())
    with pytest.raises(ll.FileError, match="holds no adapter.safetensors"):
        load_checkpoint(model, tmp_path)


def test_a_model_without_adapter_is_refused(tmp_path):
    with pytest.raises(ll.StateError, match="ll.attach"):
        adapter_trainer()(model=tiny_llm.model(), args=arguments(tmp_path))


def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": [5, 6, 7, i + 8], "labels": [-100, -100, 7, i + 8]} for i in range(16)]
    model = tiny_llm.model()
    ll.attach(model, LORA)
    before = ll.adapter_state_dict(model)
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_steps=2, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, bf16=False,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    t = adapter_trainer(trl.SFTTrainer)(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_llm.tokenizer()
    )
    t.train()
    after = ll.adapter_state_dict(model)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert not list((tmp_path / "checkpoint-2").glob("model*"))
    assert (tmp_path / "checkpoint-2" / "adapter.safetensors").is_file()


class Engine:
    """What of DeepSpeed's engine a trainer uses."""

    def save_checkpoint(self, folder, tag=None, exclude_frozen_parameters=False):
        return folder, exclude_frozen_parameters

    def load_checkpoint(self, folder, load_module_strict=True):
        return folder, load_module_strict


def test_an_engine_saves_and_loads_what_trains():
    for prepared in (Engine(), (torch.nn.Linear(1, 1), Engine())):
        accelerator = SimpleNamespace(prepare=lambda prepared=prepared: prepared)
        leave_base_out(accelerator)
        found: Any = accelerator.prepare()
        engine = found[1] if isinstance(found, tuple) else found
        assert "exclude_frozen_parameters" in inspect.signature(engine.save_checkpoint).parameters
        assert engine.save_checkpoint("here") == ("here", True)
        assert engine.load_checkpoint("here", load_module_strict=True) == ("here", False)


def quantised(folder):
    """A tiny Llama in nf4, with an adapter."""
    bnb = pytest.importorskip("bitsandbytes")
    tiny_llm.save(folder / "base", width=128)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config)
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
    ll.attach(model, LORA)
    return model


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
def test_quantised_base(tmp_path, plain):
    """A plain Trainer asks whether PEFT has put something on a quantised model that trains."""
    model = quantised(tmp_path)
    kind = transformers.Trainer if plain else adapter_trainer()
    given = {"callbacks": [ll.callbacks.SaveAdapter()]} if plain else {}
    args = arguments(tmp_path / "out", max_steps=2, save_steps=2)
    t = kind(model=model, args=args, train_dataset=Rows(), **given)
    assert not model._hf_peft_config_loaded
    before = ll.adapter_state_dict(model)
    with pytest.warns(ll.LoraLiteWarning, match="save_pretrained") if plain else nullcontext():
        t.train()
    folder = tmp_path / "out" / "checkpoint-2" / ("adapter" if plain else ".")
    after, fresh = ll.adapter_state_dict(model), quantised(tmp_path)
    ll.load(fresh, folder, "again")
    assert all(torch.equal(v, ll.adapter_state_dict(fresh, "again")[k]) for k, v in after.items())
    assert any(not torch.equal(v, before[k]) for k, v in after.items())
    assert all(p.dtype == torch.float32 for p in ll.adapters(model)["default"].parameters())


def test_a_quantised_base_that_nothing_trains_on_is_refused_as_before(tmp_path):
    model = quantised(tmp_path)
    ll.adapters(model)["default"].trainable = False
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=arguments(tmp_path / "out"))
    ll.adapters(model)["default"].trainable = True
    model.hf_quantizer = type("Deaf", (), {"is_trainable": False})()
    with pytest.raises(ll.StateError, match="Deaf, which passes no gradients"):
        transformers.Trainer(model=model, args=arguments(tmp_path / "out"))
    ll.detach(model)
    assert "_hf_peft_config_loaded" not in vars(model)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=arguments(tmp_path / "out"))
