"""GRPO with a reward function: the KL is measured from the adapter as it was when training began."""

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import lora_lite as ll
from lora_lite.demo.data import model_path

BASE = model_path("demo")
ROWS = [{"prompt": f"{a} + {b} =", "right": str(a + b)} for a in range(3, 9) for b in range(2, 9)]


def reward(completions, right, **kwargs):
    """1 for an answer that begins with the right number."""
    return [float(text.strip().startswith(number)) for text, number in zip(completions, right, strict=True)]


def main(out: str = "runs/grpo", steps: int = 5) -> None:
    args = GRPOConfig(
        output_dir=out, max_steps=steps, per_device_train_batch_size=8, num_generations=4, max_completion_length=4,
        learning_rate=1e-3, beta=0.04, logging_steps=1, report_to=[], bf16=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = ll.trainer(GRPOTrainer, ll.LoRAConfig(r=8))(
        model=str(BASE), args=args, reward_funcs=reward, train_dataset=Dataset.from_list(ROWS)
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
