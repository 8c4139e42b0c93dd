"""A training loop of one's own: attach an adapter, train it, save one small file, load it, merge it."""

import torch

import lora_lite as ll
from lora_lite.demo.data import load_model

BASE = "demo"  # or a folder, or a name on the hub
TEXTS = [f"{a} + {b} = {a + b}" for a in range(3, 9) for b in range(2, 9)]


def main(out: str = "runs/plain.safetensors", steps: int = 20) -> None:
    model, tokenizer = load_model(BASE)
    adapter = ll.attach(model, ll.LoRAConfig(r=8, alpha=16))
    print(adapter)

    optimizer = torch.optim.AdamW(adapter.param_groups(lr=3e-3, weight_decay=0.01))
    model.train()
    for step in range(steps):
        start = 8 * step % len(TEXTS)
        batch = tokenizer(TEXTS[start : start + 8], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss + ll.penalty(model)
        loss.backward()
        if step == 0:
            print(ll.check(model))  # does every target get a gradient?
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    ll.save(model, out)
    fresh, _ = load_model(BASE)
    ll.load(fresh, out)  # no training data, no SVD
    ll.merge(fresh)  # the adapter in the weights: a plain model again
    print(f"saved in {out}")


if __name__ == "__main__":
    main()
