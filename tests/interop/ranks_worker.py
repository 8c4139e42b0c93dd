"""One process of a run under torchrun: trains an adapter for some steps, from a checkpoint or not, and saves it.

ranks_worker.py ENGINE OUT STEPS [CHECKPOINT or - [dora]], ENGINE being plain, zero3 (ll.trainer on transformers'
Trainer), fsdp2 (a loop, which exports too), or tensor (loads the model in OUT in parts, and says what `ll.attach` says
of it). All processes together see four rows a step, the same ones however many there are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset

import lora_lite as ll
import tiny_llm

engine, out, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
checkpoint = sys.argv[4] if len(sys.argv) > 4 and sys.argv[4] != "-" else None
SIZE = int(os.environ.get("WORLD_SIZE", 1))
LORA = (ll.DoRAConfig if len(sys.argv) > 5 else ll.LoRAConfig)(r=3, alpha=7)
RATE = 1.0  # of plain gradient descent: AdamW divides gradients by their size, and with it their rounding
ROWS = torch.randint(4, 60, (16, 9), generator=torch.Generator().manual_seed(1))
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip


class Rows(Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return {"input_ids": ROWS[i], "labels": ROWS[i]}


def by_trainer() -> None:
    args = transformers.TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=4 // SIZE, learning_rate=RATE, report_to=[],
        save_steps=2, optim="sgd", max_grad_norm=0, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        lr_scheduler_type="constant",
        deepspeed=ZERO3 if engine == "zero3" else None,
    )  # fmt: skip
    trainer = ll.trainer(transformers.Trainer, LORA)(model=tiny_llm.model(), args=args, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


def by_hand() -> None:
    from torch.distributed.fsdp import fully_shard

    if SIZE > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if SIZE > 1 else 0
    model = tiny_llm.model()
    handle = ll.attach(model, LORA)
    if checkpoint:
        ll.detach(model)
        handle = ll.load(model, checkpoint, trainable=True)
    if SIZE > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(handle.param_groups(lr=RATE))
    for step in range(steps):
        batch = ROWS[4 * step : 4 * step + 4][rank::SIZE]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = ll.adapter_state_dict(model)  # every process takes part in gathering
    ll.export(model, out / "peft")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        whole = tiny_llm.model()
        ll.attach(whole, LORA)
        ll.load_adapter_state_dict(whole, "default", tensors)
        ll.save(whole, out / "adapter.safetensors")
    if SIZE > 1:
        dist.barrier()
        dist.destroy_process_group()


def in_parts() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(out, tp_plan="auto")
    before = sorted(model.state_dict())
    try:
        ll.attach(model, LORA)
    except ll.StateError as e:
        assert sorted(model.state_dict()) == before
        print(f"{e}\n", end="")
    dist.barrier()
    dist.destroy_process_group()


{"fsdp2": by_hand, "tensor": in_parts}.get(engine, by_trainer)()
