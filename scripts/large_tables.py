"""Write docs/results/large.md: Llama 70B and 405B with adapters on 8, 64 and 512 GPUs, on paper.

python scripts/large_tables.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.cli._console import markdown
from lora_lite.cli.plan import skeleton
from lora_lite.core.errors import size_text
from lora_lite.cost.paper import Paper
from lora_lite.cost.spread import Spread, parts_of, spread_of, tensor_parallel

OUT = Path(__file__).parents[1] / "docs" / "results" / "large.md"
GPUS = (8, 64, 512)
TOKENS = 2048
GIB = 80
"""Of a GPU that the page asks about."""
RATE, NEAR, FAR = 400e12, 400e9, 50e9
"""Assumed: operations a second that a GPU reaches, bytes a second to its neighbours in a machine, and beyond."""
HEAD = """# 70B and 405B on 8, 64 and 512 GPUs, on paper

Nothing on this page was timed. It is `lora_lite.cost.spread`: what each GPU holds and what it sends in a step, from the
shapes of Llama 3.1 in bf16, adapters in fp32 with AdamW. That these formulas are what processes really hold and send is
a test on two, three and four processes (`tests/interop/test_spread.py`: FSDP2 with LoRA, PiSSA and DoRA, fp32 and bf16,
in one and in two dimensions, and LoRA under tensor parallelism cut by hand: every byte). Written by
`scripts/large_tables.py`; for a model of yours: `lora-lite plan --model M --gpus 64`.

The formulas, with N the number of GPUs over which a copy is cut, and p(t) = N ceil(rows / N) / rows the padding of a
tensor t whose dimension 0 is cut:

- held: every tensor's ceil(rows / N) rows, the gradient and 8 bytes of moments for what is trained, and whole at a
  time what stands outside the blocks, the block at work and the next one;
- sent, FSDP2: (N-1)/N [2 Σ p(t) bytes(t) over the blocks + Σ p(t) bytes(t) outside], once forward and once backward,
  and (N-1)/N Σ p(t) bytes(t) over the gradients;
- sent, FSDP2 in shards of N with c copies: the same, and 2 (c-1)/c of a shard's gradients;
- sent, tensor parallel over t GPUs: 2 (t-1)/t bytes for each of the two sums of activations that a block's writer
  needs, and for LoRA 2 (t-1)/t times the gradients of the factors that stand on every GPU.
"""
FREE = """
## Where adapters stop being free

- **They never save much of FSDP2's traffic.** The frozen base is gathered twice a step whoever trains: full fine-tuning
  sends it three times, an adapter twice. What the adapter saves is memory: gradients and moments.
- **A thin factor is padded to N rows.** `lora_A` is r x d_in, and FSDP2 cuts its rows: with r = 16 on 512 GPUs 496 of
  the 512 rows that are sent are padding. Cut a copy over 8 GPUs instead (a two-dimensional mesh) where memory allows:
  the tables below have both.
- **Gathering hides behind arithmetic only with enough tokens.** A step does about 4 P operations a token with an
  adapter (6 P in full), and sends about 4 P bytes: with {rate:.0f} TFLOP/s and {far:.0f} GB/s between machines a GPU
  needs about {tokens_far:,} tokens a step, with {near:.0f} GB/s within a machine {tokens_near:,}, whatever the size of
  the model. Below that the wire is the step, and no adapter changes it; 4-bit weights make it a quarter.
- **Tensor parallelism multiplies half of the adapter.** The factor of full width is multiplied on every GPU, so its
  share grows with t, most where the cut side is narrow (keys and values).
"""


def methods() -> list[tuple[str, ll.AdapterConfig | None]]:
    return [
        ("LoRA r 16", ll.LoRAConfig(r=16)),
        ("LoRA r 256", ll.LoRAConfig(r=256)),
        ("DoRA r 16", ll.DoRAConfig(r=16)),
        ("full fine-tuning", None),
    ]


def row(label: str, s: Spread, saved: int) -> list[str]:
    need = s.resting + s.gathered + saved
    return [
        label if s.shards == s.gpus else f"{label}, shards of {s.shards}",
        f"{s.gpus}",
        size_text(s.weights),
        size_text(s.adapter + s.states),
        size_text(s.gathered),
        size_text(saved),
        size_text(need),
        "yes" if need < 0.9 * GIB * 2**30 else "no",
        size_text(s.sent),
        size_text(s.sent - s.sent_weights),
    ]


def tables(name: str) -> str:
    model: Any = skeleton(name)
    paper = Paper(model, 1, TOKENS)
    rows = []
    for label, cfg in methods():
        cost = paper.cost(cfg or ll.LoRAConfig(r=16))
        saved = cost.base_checkpointed + cost.extra_checkpointed  # in full: the layers' inputs, as with LoRA
        parts = parts_of(model, cfg)
        for gpus in GPUS:
            for shards in sorted({8, gpus}, reverse=True) if cfg else (gpus,):
                rows.append(row(label, spread_of(parts, gpus, shards=shards), saved))
    columns = ("method", "GPUs", "weights", "trained", "gathered", "activations", "together",
               f"in {GIB} GiB", "sent", "for what is trained")  # fmt: skip
    text = f"\n## {name}, FSDP2\n\nPer GPU, 1 x {TOKENS} tokens each, every block recomputed in the backward pass.\n\n"
    text += markdown(columns, rows)
    text += f"\n\n## {name}, tensor parallel\n\nLoRA on 8 and 16 GPUs, {TOKENS} tokens, per GPU and step.\n\n"
    found = [(r, tensor_parallel(model, ll.LoRAConfig(r=r), t, TOKENS)) for t in (8, 16) for r in (16, 64, 256)]
    return text + markdown(
        ("GPUs", "r", "base sends", "adapter sends", "adapter's operations of the base's"),
        [
            [f"{t.gpus}", f"{r}", size_text(t.base_sent), size_text(t.adapter_sent),
             f"{t.adapter_forward / t.base_forward:.1%}"]
            for r, t in found
        ],
    ) + "\n"  # fmt: skip


def main() -> None:
    free = FREE.format(
        rate=RATE / 1e12, far=FAR / 1e9, near=NEAR / 1e9, tokens_far=round(RATE / FAR), tokens_near=round(RATE / NEAR)
    )
    OUT.write_text(HEAD + free + tables("llama-70b") + tables("llama-405b"))


if __name__ == "__main__":
    main()
