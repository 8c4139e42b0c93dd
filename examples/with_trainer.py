"""transformers' Trainer: checkpoints hold the adapter alone, and training goes on from them bit for bit."""

from transformers import Trainer, TrainingArguments

import lora_lite as ll
from lora_lite.demo.data import load_model

BASE = "demo"
TEXTS = [f"{a} + {b} = {a + b}" for a in range(3, 9) for b in range(2, 9)]


def rows(tokenizer):
    encoded = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [{"input_ids": ids, "labels": ids} for ids in encoded if len(ids) == len(encoded[0])]


def main(out: str = "runs/trainer", steps: int = 20) -> None:
    def trainer(steps: int):
        model, tokenizer = load_model(BASE)
        args = TrainingArguments(
            output_dir=out, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1,
            save_steps=steps // 2, report_to=[],
        )  # fmt: skip
        return ll.trainer(Trainer, ll.LoRAConfig(r=8, alpha=16))(
            model=model, args=args, train_dataset=rows(tokenizer), processing_class=tokenizer
        )

    trainer(steps).train()
    again = trainer(steps)
    again.train(resume_from_checkpoint=f"{out}/checkpoint-{steps // 2}")  # as if it had been stopped half way
    again.save_model()  # ll.load(model, out), PEFT and AutoModel read this folder


if __name__ == "__main__":
    main()
