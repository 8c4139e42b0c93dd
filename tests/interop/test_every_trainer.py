"""Every trainer of TRL that can be constructed here: one step, by the model's name and on a warm adapter, with no
second base in memory beyond a teacher that the user hands over."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.interop import reference
from lora_lite.testing.case import randomise

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

LORA = ll.LoRAConfig(r=2, alpha=3)
CHAT = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
ONLINE = dict(num_generations=4, max_completion_length=5)
ROWS = {
    "texts": [{"text": f"{i}+1={i + 1}"} for i in range(8)],
    "pairs": [{"prompt": f"{i}+1=", "chosen": f"{i + 1} yes", "rejected": f"{i} no, no"} for i in range(8)],
    "labels": [{"prompt": f"{i}+1=", "completion": f"{i + 1} yes", "label": i % 2 == 0} for i in range(8)],
    "prompts": [{"prompt": f"{i}+1="} for i in range(8)],
    "asked": [{"prompt": [{"role": "user", "content": f"{i}+1="}]} for i in range(8)],
    "turns": [
        {"messages": [{"role": "user", "content": f"{i}+1="}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(8)
    ],
    "hints": [{"prompt": f"{i}+1=", "privileged_context": f"{i + 1}"} for i in range(8)],
    "triples": [{"prompt": f"{i}+1=", "chosen": "a b", "rejected": "no, no", "reference": "c"} for i in range(8)],
}


def reward(completions, **_):
    return [float(len(c)) + i for i, c in enumerate(completions)]


def teacher():
    return tiny_llm.model(seed=3)


# module, name of trainer and config, rows, arguments, what the trainer is given besides
JUDGED, TAUGHT = {"reward_funcs": lambda: reward}, {"teacher_model": teacher}
TRAINERS = [
    ("trl", "SFT", "texts", {}, {}),
    ("trl", "SFT", "texts", dict(packing=True, max_length=16), {}),
    ("trl", "DPO", "pairs", {}, {}),
    ("trl", "DPO", "pairs", dict(precompute_ref_log_probs=True), {}),
    ("trl", "KTO", "labels", {}, {}),
    ("trl", "GRPO", "prompts", ONLINE | dict(beta=0.1), JUDGED),
    ("trl", "RLOO", "prompts", ONLINE | dict(beta=0.1), JUDGED),
    ("trl", "Reward", "pairs", {}, {}),
    ("trl", "Distillation", "asked", dict(max_completion_length=5), TAUGHT),
    ("a2po", "A2PO", "prompts", dict(max_completion_length=5, num_value_samples=2), JUDGED),
    ("bema_for_ref_model", "DPO", "pairs", {}, {}),
    ("cpo", "CPO", "pairs", {}, {}),
    ("orpo", "ORPO", "pairs", {}, {}),
    ("gkd", "GKD", "turns", dict(max_new_tokens=5), TAUGHT),
    ("gmpo", "GMPO", "prompts", ONLINE | dict(beta=0.1), JUDGED),
    ("iw_opd", "IWOPD", "turns", dict(max_completion_length=5), {"teacher_model": lambda: "base"}),
    ("kto", "KTO", "labels", {}, {}),
    ("online_dpo", "OnlineDPO", "asked", dict(max_new_tokens=5), JUDGED),
    ("sdft", "SDFT", "hints", ONLINE | dict(distillation_topk=8), {}),
    ("sdft", "SDFT", "hints", ONLINE | dict(distillation_topk=8, teacher_model_kind="ema"), {}),
    ("sdpo", "SDPO", "hints", ONLINE, JUDGED),
    ("sdpo", "SDPO", "hints", ONLINE | dict(teacher_model_kind="live"), JUDGED),
    ("tpo", "TPO", "triples", {}, {}),
]


def classes(module: str, name: str):
    """(trainer, config)"""
    path = module if module == "trl" else f"trl.experimental.{module}"
    found = importlib.import_module(path)
    return getattr(found, f"{name}Trainer"), getattr(found, f"{name}Config", None) or getattr(trl, f"{name}Config")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model with a chat template, and one of a tiny reward model."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_llm.tokenizer()
    tokenizer.chat_template = CHAT
    scored = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**tiny_llm.model().config.to_dict(), "num_labels": 1})
    )
    for model, name in ((tiny_llm.model(), "base"), (scored, "scored")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def bytes_of(*modules) -> int:
    return sum({p.data_ptr(): p.nbytes for m in modules for p in m.parameters()}.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("warm", [False, True], ids=["name", "warm"])
@pytest.mark.parametrize(("module", "name", "rows", "options", "given"), TRAINERS)
def test_one_step(tmp_path, base, monkeypatch, module, name, rows, options, given, warm):
    try:
        trainer_class, config = classes(module, name)
    except (ImportError, AttributeError) as e:
        pytest.skip(f"not in this TRL: {e}")
    monkeypatch.chdir(base)
    folder = "scored" if name == "Reward" else "base"
    kind = transformers.AutoModelForSequenceClassification if name == "Reward" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder) if warm else folder
    if warm:
        ll.attach(model, LORA)
        randomise(model, seed=1)
    args = config(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        logging_steps=1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, bf16=False, **options,
    )  # fmt: skip
    given = {key: make() for key, make in given.items()}
    trainer = ll.trainer(trainer_class, None if warm else LORA)(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(ROWS[rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder), **given,
    )  # fmt: skip
    before = ll.adapter_state_dict(trainer.model)
    assert warm != all(v.eq(0).all() for k, v in before.items() if k.endswith("lora_B"))
    trainer.train()
    trainer.save_model()
    after = ll.adapter_state_dict(trainer.model)
    if name != "IWOPD" or warm:  # a fresh adapter is what its teacher is: nothing to learn
        assert any(not torch.equal(before[k], after[k]) for k in before)
    bare = kind.from_pretrained(folder)
    ll.load(bare, tmp_path)
    assert all(torch.equal(v, after[k]) for k, v in ll.adapter_state_dict(bare).items())
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for figure in ("kl", "objective/kl", "rewards/margins"):
        if figure in log and name not in ("CPO", "ORPO", "TPO"):  # these measure from no reference
            assert log[figure] == 0
    own = bytes_of(kind.from_pretrained(folder)) + 2 * sum(v.nbytes for v in after.values())
    held = [v for k, v in vars(trainer).items() if isinstance(v, torch.nn.Module) and "teacher" not in k]
    assert bytes_of(trainer.model, *held) <= own
    kept = trainer.__dict__.get("teacher_model")
    if isinstance(kept, reference.Reference) and getattr(args, "teacher_model_kind", "") == "ema":
        moved = ll.adapter_state_dict(trainer.model, "default-reference")
        for k, v in moved.items():
            torch.testing.assert_close(v, before[k].lerp(after[k], args.teacher_update_rate), atol=0, rtol=1e-6)


def test_how_each_trainer_takes_its_reference():
    """Also where a subclass of `DPOTrainer` takes its arguments as `*args, **kwargs`."""

    class Thin(trl.DPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class Own(transformers.Trainer):
        def __init__(self, model=None, args=None):
            self.ref_model = model

    assert [reference.way(t, None) for t in (trl.SFTTrainer, trl.DPOTrainer, Thin)] == ["", "argument", "argument"]
    plain = transformers.TrainingArguments
    assert reference.way(Own, plain) == "attribute" and reference.said(Thin, 1, (), {"args": 3})["args"] == 3
    assert reference.said(trl.DPOTrainer, 1, (2, 3), {})["ref_model"] == 2


def test_a_trainer_that_sends_weights_on_its_own_way_is_refused():
    class Streaming(transformers.Trainer):
        def __init__(self, model, args=None, weight_transfer=None):
            super().__init__(model=model, args=args)

    with pytest.raises(ll.StateError, match="GRPOTrainer"):
        ll.trainer(Streaming, LORA)(model="anything")


@pytest.mark.parametrize("field", ["packing", "padding_free"])
def test_packed_rows_and_an_adapter_on_some_positions(tmp_path, field):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    setattr(args, field, True)
    for positions in ("prompt", "f2+l3"):
        with pytest.raises(ll.StateError, match=f"{field}=False"):
            ll.trainer(transformers.Trainer, ll.LoReFTConfig(r=2, positions=positions))(tiny_llm.model(), args)
    everywhere = ll.LoReFTConfig(r=2, positions="all")
    assert ll.trainer(transformers.Trainer, everywhere)(tiny_llm.model(), args)
