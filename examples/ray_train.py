"""Ray Train: every worker attaches the same adapter (a seed says the same everywhere), Ray wraps the model in DDP, the
first worker saves. Two workers on one machine, or as many as a cluster has."""

import torch
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer, prepare_model

import lora_lite as ll
from lora_lite.demo.data import load_model

BASE = "demo"
TEXTS = [f"{a} + {b} = {a + b}" for a in range(3, 9) for b in range(2, 9)]


def worker(config):
    context = get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    model, tokenizer = load_model(BASE)
    adapter = ll.attach(model, ll.LoRAConfig(r=8, alpha=16))  # before prepare_model
    wrapped = prepare_model(model)
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=3e-3))
    wrapped.train()
    for step in range(config["steps"]):
        start = (8 * step + 4 * rank) % (len(TEXTS) - 4)
        batch = tokenizer(TEXTS[start : start + 8 // size], return_tensors="pt", padding=True).to(model.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = wrapped(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        ll.save(model, config["out"] + "/adapter.safetensors")


def main(out: str = "runs/ray", steps: int = 20, workers: int = 2) -> None:
    TorchTrainer(
        worker,
        train_loop_config={"out": out, "steps": steps},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(storage_path=out),
    ).fit()


if __name__ == "__main__":
    main()
