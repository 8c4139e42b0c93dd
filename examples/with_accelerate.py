"""accelerate: the same loop on one process or many. `accelerate launch examples/with_accelerate.py`

Attach before `prepare`, which may wrap and shard the model; `ll.save` gathers the shards.
"""

import torch
from accelerate import Accelerator

import lora_lite as ll
from lora_lite.demo.data import load_model

BASE = "demo"
TEXTS = [f"{a} + {b} = {a + b}" for a in range(3, 9) for b in range(2, 9)]


def main(out: str = "runs/accelerate.safetensors", steps: int = 20) -> None:
    accelerator = Accelerator()
    model, tokenizer = load_model(BASE)
    adapter = ll.attach(model, ll.LoRAConfig(r=8, alpha=16))
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=3e-3))
    loader = torch.utils.data.DataLoader(
        TEXTS, batch_size=8, shuffle=True, collate_fn=lambda texts: tokenizer(texts, return_tensors="pt", padding=True)
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    done = 0
    while done < steps:
        for batch in loader:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            accelerator.print(f"step {done}: loss {loss.item():.3f}")
            if done == steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:  # with FSDP or ZeRO-3, call it on every process: gathering takes all of them
        ll.save(accelerator.unwrap_model(model), out)


if __name__ == "__main__":
    main()
