"""TRL's SFTTrainer: the model by its name, the adapter attached inside."""

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import lora_lite as ll
from lora_lite.demo.data import model_path

BASE = model_path("demo")  # or "Qwen/Qwen3-0.6B"
ROWS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(3, 9) for b in range(2, 9)]


def main(out: str = "runs/sft", steps: int = 20) -> None:
    args = SFTConfig(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        bf16=torch.cuda.is_available(),
    )
    trainer = ll.trainer(SFTTrainer, ll.LoRAConfig(r=16))(
        model=str(BASE), args=args, train_dataset=Dataset.from_list(ROWS)
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
