"""What a trainer leaves: a folder that `ll.load`, PEFT and AutoModel read, with a card; and how the adapter comes to
the model inside the trainer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import lora_lite as ll
import tiny_llm
from lora_lite.interop.card import card
from lora_lite.interop.reference import Reference
from lora_lite.interop.trainer import adapter_trainer
from lora_lite.testing.case import randomise

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
huggingface_hub = pytest.importorskip("huggingface_hub")

LORA = ll.LoRAConfig(r=3, alpha=7)
IDS = torch.arange(5, 14)[None]


class Rows(Dataset):
    def __init__(self, n=8):
        self.x = torch.randint(4, 60, (n, 9), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"input_ids": self.x[i], "labels": self.x[i]}


def arguments(folder: Path, **changes):
    options = dict(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.TrainingArguments(**{**options, **changes})


def fitted(folder: Path, cfg=LORA, **changes):
    """A trained and saved adapter on a base that lies in a folder."""
    base = tiny_llm.save(folder / "base")
    trainer = ll.trainer(transformers.Trainer, cfg)(
        model=str(base), args=arguments(folder / "out"), train_dataset=Rows(), processing_class=tiny_llm.tokenizer(),
        **changes,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_one_folder_for_every_reader(tmp_path):
    trainer = fitted(tmp_path)
    want, base = logits(trainer.model), tmp_path / "base"
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        bare = transformers.AutoModelForCausalLM.from_pretrained(base)
        assert not torch.equal(logits(bare), want)
        assert ll.load(bare, folder).name == "default" and torch.equal(logits(bare), want)
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)
        torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(plain, folder)), want, atol=1e-6, rtol=0)
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(whole), want, atol=1e-6, rtol=0)
        assert transformers.AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]
        assert (folder / "training_args.bin").is_file() and not list(folder.glob("model*"))
    writer = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    assert writer("1+1=", max_new_tokens=2)[0]["generated_text"].startswith("1+1=")


def test_the_card_says_what_it_is(tmp_path):
    fitted(tmp_path)
    head, text = (tmp_path / "out" / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    said = dict(line.split(": ", 1) for line in head.splitlines())
    assert said["library_name"] == '"peft"' and json.loads(said["tags"]) == ["adapter", "lora", "lora-lite"]
    assert "base_model" not in said  # a folder of this machine is no name
    assert "ll.load(model" in text and '"alpha": 7.0' in text and "| loss |" in text and "| steps | 1 |" in text
    assert "PEFT" in text


def test_the_card_shows_the_last_of_each_figure():
    model = tiny_llm.model()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    text = card(model, False, [{"loss": 2.5, "step": 1}, {"eval_loss": 2.25, "step": 1}, {"loss": 1.5, "step": 2}], 2)
    assert "| loss | 1.5 |" in text and "| eval_loss | 2.25 |" in text and "2.5 |" not in text


def test_the_card_names_the_command_that_trained_it(tmp_path, monkeypatch):
    """Without folders of this machine, and without what nobody else should read."""
    model = tiny_llm.model()
    ll.attach(model, LORA)
    script = tmp_path / "train me.py"
    script.touch()
    words = ["--lr", "1e-3", "--hub_token", "hf_abc", "--API-KEY=sk-1", "-q", f"--data={tmp_path}/rows.jsonl", "/a/b"]
    monkeypatch.setattr("sys.argv", [str(script), *words])
    said = "python 'train me.py' --lr 1e-3 --hub_token ... --API-KEY=... -q --data=rows.jsonl b"
    assert f"```bash\n{said}\n```" in card(model, True)
    monkeypatch.setattr("sys.argv", ["-c"])
    assert "bash" not in card(model, True)


def test_what_is_pushed_to_the_hub(tmp_path, monkeypatch):
    """What `save_model` leaves: no optimiser, and no copy that a reference is."""
    pushed: dict[str, set[str]] = {}

    def create_repo(*_, **__):
        return SimpleNamespace(repo_id="me/mine")

    def upload_folder(*_, repo_id, folder_path, **__):
        pushed[repo_id] = {p.name for p in Path(folder_path).iterdir()}

    for name, fake in (("create_repo", create_repo), ("upload_folder", upload_folder)):
        monkeypatch.setattr(huggingface_hub.HfApi, name, fake)
        monkeypatch.setattr(transformers.trainer, name, fake, raising=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llm.save(tmp_path / "base"))
    ll.attach(model, LORA)
    randomise(model, seed=1)
    trainer = ll.trainer(transformers.Trainer)(
        model=model, args=arguments(tmp_path / "out"), processing_class=tiny_llm.tokenizer()
    )
    trainer._reference = Reference()
    trainer._reference.follow(model, fresh=False)
    trainer.push_to_hub(dataset_tags="sums")
    files = {"adapter.safetensors", "adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert files | {"tokenizer.json", "training_args.bin"} <= pushed["me/mine"]
    assert "reference" not in pushed["me/mine"] and not [n for n in pushed["me/mine"] if n.startswith("model")]
    trainer.save_model(tmp_path / "checkpoint", _internal_call=True)
    assert (tmp_path / "checkpoint" / "reference" / "adapter.safetensors").is_file()


def test_a_method_that_peft_does_not_know_leaves_our_file_alone(tmp_path):
    trainer = fitted(tmp_path, ll.ETHERConfig())
    assert (
        not list((tmp_path / "out").glob("adapter_*")) and "Only lora-lite" in (tmp_path / "out/README.md").read_text()
    )
    bare = tiny_llm.model()
    ll.load(bare, tmp_path / "out")
    assert torch.equal(logits(bare), logits(trainer.model))


def test_several_adapters_in_one_folder(tmp_path):
    model = tiny_llm.model()
    for name, r in (("a", 2), ("b", 3)):
        ll.attach(model, ll.LoRAConfig(r=r, alpha=7), name=name)
        randomise(model, name, seed=r)
    adapter_trainer()(model=model, args=arguments(tmp_path)).save_model()
    for name in ("a", "b"):
        bare = tiny_llm.model()
        ll.load(bare, tmp_path, name=name)
        ll.activate(model, name)
        assert torch.equal(logits(bare), logits(model))
        bare = peft.PeftModel.from_pretrained(tiny_llm.model(), tmp_path / name)
        torch.testing.assert_close(logits(bare), logits(model), atol=1e-6, rtol=0)
    with pytest.raises(ll.FileError, match="adapter-a.safetensors, adapter-b.safetensors"):
        ll.load(tiny_llm.model(), tmp_path)


# ---- how the adapter comes to the model


@pytest.mark.parametrize(
    "said, cfg",
    [
        (LORA, LORA),
        (
            peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
            ll.LoRAConfig(r=3, alpha=7, target_names=("down_proj", "q_proj"), layers=(1,)),
        ),
        (
            peft.LoraConfig(
                r=3, use_rslora=True, lora_dropout=0.5, target_modules=["k_proj"], rank_pattern={"k_proj": 5},
                modules_to_save=["norm"],
            ),
            ll.LoRAConfig(
                r=3, alpha=8, use_rslora=True, dropout=0.5, target_names=("k_proj",), rank_pattern={"k_proj": 5},
                train_modules=("norm",),
            ),
        ),
        (
            peft.LoraConfig(r=3, target_modules="all-linear", exclude_modules=["up_proj"], use_dora=True),
            ll.DoRAConfig(r=3, alpha=8, exclude_names=("up_proj",)),
        ),
    ],
    ids=["ours", "names", "options", "dora"],
)  # fmt: skip
def test_peft_config_is_attached_as_ours(tmp_path, said, cfg):
    model = tiny_llm.model()
    ll.trainer(transformers.Trainer)(model=model, args=arguments(tmp_path), peft_config=said)
    assert ll.adapters(model)["default"].cfg == cfg and not hasattr(model, "peft_config")
    theirs = tiny_llm.model()
    ll.attach(theirs, cfg)
    assert ll.adapters(theirs)["default"].targets == ll.adapters(model)["default"].targets


def test_two_configs_are_one_too_many(tmp_path):
    model = tiny_llm.model()
    with pytest.raises(ll.ConfigError, match="leave one out"):
        ll.trainer(transformers.Trainer, LORA)(model=model, args=arguments(tmp_path), peft_config=LORA)
    assert not ll.adapters(model)


def test_peft_chooses_targets_that_a_config_does_not_name(tmp_path):
    model = tiny_llm.model()
    ll.trainer(transformers.Trainer)(model=model, args=arguments(tmp_path), peft_config=peft.LoraConfig(r=3))
    theirs = peft.get_peft_model(tiny_llm.model(), peft.LoraConfig(r=3))
    assert set(ll.adapters(model)["default"].targets) == set(theirs.base_model.targeted_module_names)


@pytest.mark.parametrize(
    "said, word",
    [
        (peft.LoraConfig(bias="all"), "BitFit"),
        (peft.LoraConfig(trainable_token_indices=[3]), "token rows"),
        (peft.LoraConfig(init_lora_weights="gaussian"), "init_lora_weights"),
    ],
    ids=["bias", "rows", "start"],
)
def test_a_peft_config_that_says_more_is_refused(tmp_path, said, word):
    with pytest.raises(ll.ConfigError, match=word):
        ll.trainer(transformers.Trainer)(model=tiny_llm.model(), args=arguments(tmp_path), peft_config=said)


def test_the_head_of_a_task_is_trained_as_peft_does(tmp_path):
    config = transformers.LlamaConfig(**{**tiny_llm.model().config.to_dict(), "num_labels": 3})
    model = transformers.LlamaForSequenceClassification(config)
    said = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["q_proj"], modules_to_save=["score"])
    ll.trainer(transformers.Trainer)(model=model, args=arguments(tmp_path), peft_config=said)
    handle = ll.adapters(model)["default"]
    assert handle.cfg.train_modules == ("score",) and "score" in handle.targets


def test_model_init_gives_every_trial_its_adapter(tmp_path):
    trainer = ll.trainer(transformers.Trainer, LORA)(
        model_init=lambda: tiny_llm.model(), args=arguments(tmp_path), train_dataset=Rows()
    )
    first = trainer.model
    trainer.train()  # makes the model anew
    second = trainer.model
    assert first is not second and all(list(ll.adapters(m)) == ["default"] for m in (first, second))
    state, start = ll.adapter_state_dict(second), ll.adapter_state_dict(first)
    assert any(not torch.equal(state[k], start[k]) for k in state)


def test_seq2seq_and_options_of_attach(tmp_path):
    cls = ll.trainer(transformers.Seq2SeqTrainer, LORA, name="mine")
    assert issubclass(cls, transformers.Seq2SeqTrainer)
    trainer = cls(model=tiny_llm.model(), args=transformers.Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True))
    assert list(ll.adapters(trainer.model)) == ["mine"]


class Wrapped(nn.Module):
    """A model that holds a transformer and returns a loss of its own."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_llm.model()

    def forward(self, input_ids=None, labels=None):
        return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}


@pytest.mark.parametrize("attached", [False, True])
def test_adapters_of_a_module_inside(tmp_path, attached):
    model = Wrapped()
    if attached:
        ll.attach(model.inner, LORA)
    trainer = ll.trainer(transformers.Trainer, None if attached else LORA)(
        model=model, args=arguments(tmp_path), train_dataset=Rows()
    )
    trainer.train()
    assert not ll.adapters(model) and list(ll.adapters(model.inner)) == ["default"]
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in ll.adapters(model.inner)["default"].parameters()
    }
    bare = tiny_llm.model()
    ll.load(bare, tmp_path / "checkpoint-1")
    assert torch.equal(logits(bare), logits(model.inner))
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-1" / "adapter.safetensors"):
        outer = Wrapped()
        assert set(ll.load(outer, folder).targets) == set(ll.adapters(model.inner)["default"].targets)
        assert torch.equal(logits(outer.inner), logits(model.inner))
        with pytest.raises(ll.StateError, match=r"get_submodule\('inner'\)"):
            ll.merge(outer)


def test_an_export_of_a_container_names_the_layers_of_the_transformer_inside(tmp_path):
    outer = Wrapped()
    ll.attach(outer, ll.LoRAConfig(r=3, alpha=7, train_modules=("norm",)))
    randomise(outer, seed=1)
    ll.export(outer, tmp_path)
    bare = peft.PeftModel.from_pretrained(tiny_llm.model(), tmp_path)
    torch.testing.assert_close(logits(bare), logits(outer.inner), atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    again = Wrapped()
    ll.load(again, tmp_path)
    torch.testing.assert_close(logits(again.inner), logits(outer.inner), atol=1e-6, rtol=0)


def test_a_plain_trainer_with_the_callback(tmp_path):
    model = tiny_llm.model()
    ll.attach(model, LORA)
    with pytest.warns(ll.LoraLiteWarning, match="save_pretrained"):
        transformers.Trainer(
            model=model, args=arguments(tmp_path), train_dataset=Rows(), callbacks=[ll.callbacks.SaveAdapter()]
        ).train()
    for folder in (tmp_path / "checkpoint-1" / "adapter", tmp_path / "adapter"):
        bare = tiny_llm.model()
        ll.load(bare, folder)
        assert torch.equal(logits(bare), logits(model))
    assert isinstance(ll.callbacks.SaveAdapter(), transformers.TrainerCallback)


def test_trackers_are_told_the_adapters_fields(tmp_path):
    told = {}

    class Tracker(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            told.update(model.config.to_dict()["lora_lite"]["default"])

    trainer = ll.trainer(transformers.Trainer, LORA)(
        model=tiny_llm.model(), args=arguments(tmp_path), train_dataset=Rows(), callbacks=[Tracker()]
    )
    trainer.train()
    assert told["variant"] == "lora" and told["r"] == 3 and told["targets"] == 14
    assert not hasattr(trainer.model.config, "lora_lite")


@dataclass
class Server:
    """What vLLM's client inside GRPO does: it walks the model's parameters and sends them."""

    model: nn.Module

    def sync_weights(self):
        self.got = {name: p.detach().clone() for name, p in self.model.named_parameters()}


class Serving(transformers.Trainer):
    def __init__(self, model=None, args=None, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self.generation = Server(self.model)


def test_a_server_is_sent_merged_weights_under_the_bases_names(tmp_path):
    model, bare = tiny_llm.model(), tiny_llm.model()
    ll.attach(model, LORA)
    randomise(model, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = ll.trainer(Serving)(model=model, args=arguments(tmp_path))
    trainer.generation.sync_weights()
    assert list(trainer.generation.got) == [name for name, _ in bare.named_parameters()]
    bare.load_state_dict(trainer.generation.got)
    torch.testing.assert_close(logits(bare), logits(model), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and "lora_A" in "".join(before)
    assert len(list(model.named_parameters())) > len(list(bare.named_parameters()))
