"""DPO after SFT (`trl_sft.py`): the reference is a frozen copy of the adapter as it was, on the one base in memory, so
that the first margin is exactly 0."""

import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import lora_lite as ll
from lora_lite.demo.data import model_path

BASE = model_path("demo")
ROWS = [
    {"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a + b + 1}"}
    for a in range(3, 9)
    for b in range(2, 9)
]


def main(out: str = "runs/dpo", steps: int = 20, start: str = "runs/sft") -> float:
    """Returns the first margin."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    if os.path.isdir(start):
        ll.load(model, start, trainable=True)
    else:  # a fresh adapter: the reference is the bare base then
        ll.attach(model, ll.LoRAConfig(r=16))
    args = DPOConfig(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        bf16=torch.cuda.is_available(),
    )
    trainer = ll.trainer(DPOTrainer)(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(BASE),
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history[0]["rewards/margins"]


if __name__ == "__main__":
    print("first margin:", main())
