"""Adapters under SentenceTransformerTrainer: on the container, on the transformer inside, by name and by `model_init`;
the folder is read by `ll.load` and by sentence-transformers itself."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.interop.homes import homes
from measured import record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optional_backend("sentence_transformers"),
    pytest.mark.filterwarnings("ignore"),  # theirs
]
LORA = ll.LoRAConfig(r=2, alpha=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny sentence-transformer with random weights."""
    pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    from sentence_transformers import SentenceTransformer, models

    path = tmp_path_factory.mktemp("sentences")
    tokenizer = tiny_llm.tokenizer()
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(path / "bert")
    tokenizer.save_pretrained(path / "bert")
    words = models.Transformer(str(path / "bert"))
    SentenceTransformer(modules=[words, models.Pooling(32)], device="cpu").save(str(path / "all"))
    return str(path / "all")


def vector(model):
    return model.encode(["3 plus 4"], convert_to_tensor=True)


@pytest.mark.parametrize("way", ["config", "name", "init", "container", "inside"])
def test_every_way_to_the_adapter(tmp_path, folder, way):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    def fresh():
        return SentenceTransformer(folder, device="cpu")

    rows = [{"a": f"{i} plus", "b": f"plus {i}", "score": i / 16} for i in range(16)]
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_steps=1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    base, given = fresh(), {}
    if way == "init":
        given["model_init"] = fresh
    elif way == "name":
        given["model"] = folder
    else:
        given["model"] = base
    if way in ("container", "inside"):
        ll.attach(base if way == "container" else base[0].auto_model, LORA)
    trainer = ll.trainer(SentenceTransformerTrainer, None if way in ("container", "inside") else LORA)(
        args=args, train_dataset=datasets.Dataset.from_list(rows), **given
    )
    trainer.train()
    trainer.save_model()
    (home,) = homes(trainer.model)
    assert (home is trainer.model) == (way == "container")
    want = vector(trainer.model)
    assert (want - vector(fresh())).abs().max() > 1e-3
    for place in (tmp_path, tmp_path / "checkpoint-2"):
        other = fresh()
        ll.load(other, place)
        assert torch.equal(vector(other), want)
    theirs = fresh()
    theirs.load_adapter(str(tmp_path))
    if way == "inside":  # as good as any
        record("sentence-transformers", "load_adapter", float((vector(theirs) - want).abs().max()), 2e-6)
    torch.testing.assert_close(vector(theirs), want, atol=2e-6, rtol=0)
    with pytest.warns(ll.LoraLiteWarning, match="save_pretrained"):
        trainer.model.save(str(tmp_path / "whole"))
