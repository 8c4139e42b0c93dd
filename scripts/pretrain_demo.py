"""Train the small Llama that ships in `lora_lite/demo/base`: a real base model that needs no download.

Text: the documentation that comes with Python (`pydoc_data.topics` and the docstrings of the standard library, PSF
licence) and generated arithmetic: sums, differences, products and quotients of small whole numbers, chains of them,
statements that name quantities and look them up again, and single operations said in words ("6 packs with 3 shells
each: 6 * 3 = 18."). No story, no "How many", no letter Q or A before a colon and no `####` is in it: the demo's task is
new to the base.

The data of step k is a function of (seed, k) only, and the state holds both optimisers, so a run that is stopped and
resumed is the same run. `scripts/README.md` has the recipe and the figures.

    python scripts/pretrain_demo.py --out runs/base            # trains, or resumes what is there
    python scripts/pretrain_demo.py --out runs/base --export src/lora_lite/demo/base
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from pretrain_demo_text import equation, prose, statement
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED, VOCAB, LENGTH = 17, 1024, 256
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def make_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB` pieces in which every digit is a token of its own."""
    rng = random.Random(SEED)
    sample = texts + ["\n".join(statement(rng) for _ in range(200)) for _ in range(100)]
    tok = Tokenizer(models.BPE())
    # with the space before it, if there is one
    split = pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(sample, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left", model_max_length=512
    )
    fast.save_pretrained(folder)
    return fast


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by five Newton-Schulz steps (K. Jordan 2024), for the matrices inside the blocks;
    fp32."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                sums = []
                for p in same:
                    buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buf.lerp_(p.grad, 1 - group["momentum"])
                    sums.append(p.grad.lerp(buf, group["momentum"]))
                x = torch.stack(sums)
                x = x.mT if shape[0] > shape[1] else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.mT if shape[0] > shape[1] else x
                for p, u in zip(same, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def batch(step: int, rows: int, text: torch.Tensor, tok: PreTrainedTokenizerFast, share: float) -> torch.Tensor:
    """(rows, LENGTH) token ids of one step: a function of the step only."""
    rng = random.Random(f"{SEED}-{step}")
    out = torch.empty(rows, LENGTH, dtype=torch.long)
    for i in range(rows):
        if rng.random() < share:
            ids: list[int] = []
            while len(ids) < LENGTH:
                ids += tok("\n".join(statement(rng) for _ in range(24)) + "\n")["input_ids"]
            out[i] = torch.tensor(ids[:LENGTH])
        else:
            start = rng.randrange(len(text) - LENGTH)
            out[i] = text[start : start + LENGTH]
    return out


@torch.no_grad()
def arithmetic_accuracy(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, n: int = 200) -> float:
    """Share of n fixed equations that the model completes exactly, greedily."""
    rng = random.Random(99)
    texts = [equation(rng)[0] for _ in range(n)]
    model.eval()
    prompts = [t[: t.index("=") + 1] for t in texts]
    enc = tok(["1 + 1 = 2.\n" + p for p in prompts], return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=enc["input_ids"],
        attention_mask=enc["attention_mask"],
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=tok.pad_token_id,
    )
    said = tok.batch_decode(out[:, enc["input_ids"].shape[1] :])
    model.train()
    return (
        sum(
            s.split(".")[0].split("\n")[0].strip() == t[t.index("=") + 1 :].strip()
            for s, t in zip(said, texts, strict=True)
        )
        / n
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/base"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--share", type=float, default=0.8, help="share of arithmetic rows")
    parser.add_argument("--decay", type=float, default=0.4, help="last share of the run, in which lr falls to 1 %%")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stop", type=int, default=0, help="stop after this step (to try resuming)")
    parser.add_argument("--export", type=Path, help="write the trained model in bf16 to this folder and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file, log_file = args.out / "state.pt", args.out / "log.jsonl"
    texts = prose()
    if not (args.out / "tokenizer.json").exists():
        make_tokenizer(texts, args.out)
    tok = PreTrainedTokenizerFast.from_pretrained(args.out)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    outer = [p for n, p in model.named_parameters() if p.dim() != 2 or "layers" not in n]
    opts = [torch.optim.AdamW(outer, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    opts.append(Muon(inner, lr=args.lr, weight_decay=0.1))
    step = 0
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, part in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(part)
        step = saved["step"]
        lines = [line for line in log_file.read_text().splitlines() if json.loads(line)["step"] <= step]
        log_file.write_text("".join(line + "\n" for line in lines))
    if args.export:
        return export(model, tok, args, step)
    ids = tok(EOS.join(texts), verbose=False)["input_ids"]
    text = torch.tensor(ids)
    held = text[-20 * LENGTH :].view(20, LENGTH)
    text = text[: -20 * LENGTH]
    held_math = batch(-1, 20, text, tok, 1.0)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} tokens of prose, from step {step}",
        flush=True,
    )
    start, first = time.time(), step
    model.train()
    while step < args.steps and not (args.stop and step >= args.stop):
        lr = args.lr * min(1, (step + 1) / 100, (args.steps - step) / (args.decay * args.steps) + 0.01)
        for group in (g for o in opts for g in o.param_groups):
            group["lr"] = lr
        x = batch(step, args.rows, text, tok, args.share)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        model.zero_grad()
        step += 1
        if step % 50 == 0 or step in (args.steps, args.stop):
            entry = {"step": step, "loss": round(loss.item(), 4), "lr": round(lr, 6)}
            if step % 250 == 0 or step in (args.steps, args.stop):
                with torch.no_grad():
                    entry["prose"] = round(model(input_ids=held, labels=held).loss.item(), 4)
                    entry["arithmetic"] = round(model(input_ids=held_math, labels=held_math).loss.item(), 4)
                entry["equations_right"] = arithmetic_accuracy(model, tok)
                save(state_file, model, opts, step)
            with log_file.open("a") as f:
                f.write(json.dumps(entry) + "\n")
            rate = (step - first) * args.rows * LENGTH / (time.time() - start)
            print(
                f"step {step}/{args.steps} {entry} {rate:,.0f} tokens/s, "
                f"{(args.steps - step) * args.rows * LENGTH / rate / 60:.0f} min left",
                flush=True,
            )


def save(file: Path, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer], step: int) -> None:
    """Replace the state in one move, so that a run killed while saving can resume."""
    new = file.with_suffix(".new")
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "step": step}, new)
    new.replace(file)


def export(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, args: argparse.Namespace, step: int) -> None:
    """Write the shipped folder: bf16 weights, tokenizer, the log and its curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model.to(torch.bfloat16).save_pretrained(args.export, max_shard_size="1900KB")
    tok.save_pretrained(args.export)
    config = args.export / "tokenizer_config.json"
    facts = json.loads(config.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        facts.pop(key, None)
    facts["model_input_names"] = ["input_ids", "attention_mask"]
    facts["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    config.write_text(json.dumps(facts, indent=2) + "\n")
    for file in args.export.iterdir():
        file.chmod(0o644)
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    (Path(__file__).parent / "pretrain_demo_log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot([e["step"] for e in log], [e["loss"] for e in log], lw=0.7, alpha=0.6, label="training")
    probed = [e for e in log if "prose" in e]
    for key, label in (("prose", "held-out prose"), ("arithmetic", "held-out arithmetic")):
        left.plot([e["step"] for e in probed], [e[key] for e in probed], label=label)
    left.set(xlabel="step (4,096 tokens each)", ylabel="loss per token (nats)", title="Loss")
    left.legend()
    right.plot([e["step"] for e in probed], [100 * e["equations_right"] for e in probed])
    right.set(xlabel="step", ylabel="equations completed exactly, %", title="200 fixed equations", ylim=(0, 101))
    fig.tight_layout()
    fig.savefig(Path(__file__).parent / "pretrain_demo_loss.png", dpi=110)
    print(
        f"step {step}: wrote {args.export}, {sum(f.stat().st_size for f in args.export.iterdir()) / 2**20:.1f} MiB; "
        f"equations right in bf16: {arithmetic_accuracy(model, tok):.1%}"
    )


if __name__ == "__main__":
    main()
