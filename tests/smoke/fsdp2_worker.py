"""One of two processes: adapters on a model that fully_shard shards, against the same training unsharded. Prints OK."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import lora_lite as ll
import shared_methods
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import batches, toy

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)


def prepared(cfg):
    model = toy()
    handle = ll.attach(model, cfg)
    randomise(model)
    return model.train(), handle


def train(model, handle, shard):
    """Three steps; sharded, each rank sees half of every batch."""
    optimizer = torch.optim.AdamW(handle.param_groups(lr=1e-2))
    for batch in batches()[:3]:
        part = {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()} if shard else batch
        optimizer.zero_grad()
        logits = model(x=part["x"])
        logits.square().mean().backward()
        optimizer.step()


CONFIGS = {
    "lora": ll.LoRAConfig(r=3, alpha=7),
    "dora": ll.DoRAConfig(r=3, alpha=7),
    "hra": ll.HRAConfig(r=2),
    "pissa": ll.PiSSAConfig(r=3, alpha=7),
    "vera": ll.AdapterConfig(variant=shared_methods.vera().name, r=3, alpha=7),
    "bank": ll.AdapterConfig(variant=shared_methods.bank().name, r=3, alpha=7),
}
for cfg in (CONFIGS[name] for name in sys.argv[4:]):
    plain, handle = prepared(cfg)
    train(plain, handle, False)
    model, handle = prepared(cfg)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    sharded = [n for n, p in model.named_parameters() if "lora_" in n and hasattr(p, "full_tensor")]
    assert sharded, "no adapter tensor was sharded"
    train(model, ll.adapters(model)["default"], True)
    x = batches()[0]["x"]
    if "bank" in cfg.variant:  # without the root's unit nobody gathers what several blocks share
        try:
            model.layers[1](x)
        except ll.StateError as e:
            assert "fully_shard(model)" in str(e), str(e)
        else:
            raise AssertionError("a block without its model read shards")
    want, got = ll.adapter_state_dict(plain), ll.adapter_state_dict(model)
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], atol=1e-5, rtol=1e-4)
    path = ll.save(model, f"{folder}/{cfg.variant}-{rank}")
    fresh = toy()
    ll.load(fresh, path)
    torch.testing.assert_close(fresh(x), plain.eval()(x), atol=1e-5, rtol=1e-4)
    y = model.eval()(x)
    torch.testing.assert_close(y, plain(x), atol=1e-5, rtol=1e-4)
    for call, word in (
        (lambda m=model, c=cfg: ll.attach(m, c, name="second"), "sharded"),
        (lambda m=model, p=path: ll.load(m, p, name="second"), "sharded"),
        (lambda m=model: ll.detach(m), "sharded"),
        (lambda m=model: ll.merge(m), "sharded"),
    ):
        try:
            call()
        except ll.LoraLiteError as e:
            assert word in str(e), str(e)
        else:
            raise AssertionError(f"{word}: nothing was raised")
    torch.testing.assert_close(model(x), y)
dist.barrier()
dist.destroy_process_group()
print("OK")
