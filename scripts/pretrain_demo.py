"""Train the small Llama that ships in `lora_lite/demo/base`: a real base model that needs no download.

Text: the documentation that comes with Python (`pydoc_data.topics` and the docstrings of the standard library, PSF licence)
and generated arithmetic: sums, differences, products and quotients of small whole numbers, chains of them, statements that
name quantities and look them up again, and single operations said in words ("6 packs with 3 shells each: 6 * 3 = 18.").
No story, no "How many", no letter Q or A before a colon and no `####` is in it: the demo's task is new to the base.

The data of step k is a function of (seed, k) only, and the state holds both optimisers, so a run that is stopped and
resumed is the same run. `scripts/README.md` has the recipe and the figures.

    python scripts/pretrain_demo.py --out runs/base            # trains, or resumes what is there
    python scripts/pretrain_demo.py --out runs/base --export src/lora_lite/demo/base
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED, VOCAB, LENGTH = 17, 1024, 256
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
NAMES = (
    "box cup jar bag tin pot row shelf tray top left right red blue green a b c d x y z k m n p q "
    "apples books pens coins cards cookies stamps shells marbles stickers eggs oranges flowers candles buttons balloons pencils toys "
    "cakes stones plums beads Tom Mia Ann Ben Sam Lily Max Eva Leo Nina Omar Zoe Ravi Kim Jack Rosa"
).split()


def prose() -> list[str]:
    """Paragraphs of the documentation that ships with Python, in a fixed order."""
    from pydoc_data import topics

    texts = [topics.topics[key] for key in sorted(topics.topics)]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        texts += [doc for n in nodes if (doc := ast.get_docstring(n)) and len(doc) > 60]
    return [t for t in texts if t.isascii()]


def equation(rng: random.Random) -> tuple[str, int]:
    """One statement such as `14 + 8 = 22`, and its value. Values stay between 0 and 199."""
    kind = rng.choices("+-*/", (4, 4, 3, 2))[0]
    if kind == "+":
        b = rng.randint(0, 99)
        a = rng.randint(0, 199 - b) if rng.random() < 0.4 else rng.randint(0, 99)
        return f"{a} + {b} = {a + b}", a + b
    if kind == "-":
        a = rng.randint(0, 199) if rng.random() < 0.5 else rng.randint(0, 99)
        b = rng.randint(0, a)
        return f"{a} - {b} = {a - b}", a - b
    a, b = rng.randint(1, 12), rng.randint(1, 15)
    if rng.random() < 0.5:
        a, b = b, a
    return (f"{a} * {b} = {a * b}", a * b) if kind == "*" else (f"{a * b} / {a} = {b}", b)


def small(rng: random.Random) -> int:
    return rng.randint(2, 60) if rng.random() < 0.5 else rng.randint(2, 15)


def combine(a: int, b: int, rng: random.Random) -> tuple[str, int] | None:
    """`a op b = c` for a random operation that stays within 0..199, or None."""
    kind = rng.choice("++--*/")
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else -1}[kind]
    return (f"{a} {kind} {b} = {value}", value) if 0 <= value <= 199 else None


GAIN = "gets finds buys receives picks collects makes wins adds".split()
LOSE = "loses gives sells eats uses drops spends takes".split()
GROUP = "bag box jar tin tray pot row shelf pack basket".split()


def phrase(rng: random.Random) -> str:
    """One operation said in words, then as an equation: `Mia gets 5 more: 9 + 5 = 14.`"""
    who, other = rng.sample(NAMES[-16:], 2)
    thing, group = rng.choice(NAMES[26:-16]), rng.choice(GROUP)
    form = rng.randrange(9)
    if form == 0:
        a, b = rng.randint(2, 90), rng.randint(2, 90)
        more = rng.choice([f"{b} more", f"{b} {thing}", f"{b} more {thing}", f"{b} from {other}"])
        return f"{who} with {a} {thing} {rng.choice(GAIN)} {more}: {a} + {b} = {a + b}."
    if form == 1:
        a = rng.randint(5, 150)
        b = rng.randint(1, a)
        less = rng.choice([f"{b}", f"{b} of them", f"{b} {thing}", f"{b} to {other}", f"away {b}", f"out {b}"])
        return f"{who} with {a} {thing} {rng.choice(LOSE)} {less}: {a} - {b} = {a - b}" + rng.choice([".", " left."])
    a, b = rng.randint(2, 12), rng.randint(2, 15)
    if form == 2:
        return (
            rng.choice(
                [
                    f"{a} {group}s with {b} {thing} each: {a} * {b} = {a * b}.",
                    f"{a} {group}s, {b} {thing} in each {group}: {a} * {b} = {a * b} {thing}.",
                    f"{b} {thing} in each of {a} {group}s: {a} * {b} = {a * b}.",
                    f"each {group} holds {b}, {a} {group}s hold {a} * {b} = {a * b}.",
                ]
            )
            .replace("boxs", "boxes")
            .replace("shelfs", "shelves")
        )
    if form == 3:
        return (
            rng.choice(
                [
                    f"{a * b} {thing} shared equally by {a}: {a * b} / {a} = {b} each.",
                    f"{a * b} {thing} split equally into {a} {group}s: {a * b} / {a} = {b}.",
                    f"{a} friends share {a * b} {thing}: {a * b} / {a} = {b} each.",
                ]
            )
            .replace("boxs", "boxes")
            .replace("shelfs", "shelves")
        )
    if form == 4:
        a, b = rng.randint(2, 60), rng.randint(2, 60)
        return rng.choice(
            [
                f"{a} {thing} and {b} {thing} together: {a} + {b} = {a + b}.",
                f"{who} has {a} and {other} has {b}, in all {a} + {b} = {a + b}.",
                f"{b} more than {a}: {a} + {b} = {a + b}.",
                f"the sum of {a} and {b}: {a} + {b} = {a + b}.",
            ]
        )
    if form == 5:
        a = rng.randint(3, 99)
        b = rng.randint(1, a)
        return rng.choice(
            [
                f"{b} less than {a}: {a} - {b} = {a - b}.",
                f"{who} has {a}, {other} has {b}: {who} has {a} - {b} = {a - b} more.",
                f"from {b} to {a}: {a} - {b} = {a - b}.",
                f"{a} less {b}: {a} - {b} = {a - b}.",
            ]
        )
    if form == 6:
        return rng.choice(
            [
                f"twice {b}: 2 * {b} = {2 * b}.",
                f"half of {2 * b}: {2 * b} / 2 = {b}.",
                f"{a} times {b}: {a} * {b} = {a * b}.",
            ]
        )
    if form == 7:
        a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 60)
        return f"{a}, {b} and {c} add up: {a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    return f"{who} {rng.choice(['has', 'holds', 'keeps', 'counts'])} {a} {thing} and {b} {group}s. {thing}: {a}. {group}s: {b}.".replace(
        "boxs", "boxes"
    ).replace("shelfs", "shelves")


def statement(rng: random.Random) -> str:
    """One line of arithmetic: plain, in words, chained, or about named quantities that are looked up again."""
    form = rng.random()
    if rng.random() < 0.35:
        return phrase(rng)
    if form < 0.35:
        return ". ".join(equation(rng)[0] for _ in range(rng.randint(1, 3))) + "."
    if form < 0.5:
        text, value = equation(rng)
        parts = [text]
        for _ in range(rng.randint(1, 2)):
            n = small(rng)
            left, right = (value, n) if rng.random() < 0.7 else (n, value)
            if (step := combine(left, right, rng)) is None:
                break
            parts.append(step[0])
            value = step[1]
        return ". ".join(parts) + f". So {value}."
    names = rng.sample(NAMES, rng.randint(2, 4))
    values = {n: small(rng) for n in names}
    intro = rng.choice(["{} = {}", "{} is {}", "the {} has {}", "{}: {}", "there are {1} in the {0}", "{} holds {}"])
    facts = (rng.choice([". ", ", ", "; "])).join(intro.format(n, v) for n, v in values.items()) + "."
    if form < 0.62:
        asked = rng.choice(names)
        return f"{facts} {asked}? {values[asked]}."
    for _ in range(20):
        p, q = rng.sample(names, 2)
        first = combine(values[p], values[q], rng)
        if first is None:
            continue
        kind = first[0].split()[1]
        word = {
            "+": rng.choice(["plus", "and", "with"]),
            "-": rng.choice(["minus", "less", "without"]),
            "*": "times",
            "/": "by",
        }[kind]
        text = f"{facts} {p} {word} {q}: {first[0]}."
        rest = [n for n in names if n not in (p, q)]
        if rest and rng.random() < 0.6:
            n = rng.choice(rest)
            left, right = (first[1], values[n]) if rng.random() < 0.7 else (values[n], first[1])
            second = combine(left, right, rng)
            if second is not None:
                kind = second[0].split()[1]
                word = {"+": "plus", "-": "minus", "*": "times", "/": "by"}[kind]
                order = f"then {word} {n}" if left == first[1] else f"then {n} {word} that"
                text = text[:-1] + f", {order}: {second[0]}."
        return text
    return facts


def make_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB` pieces in which every digit is a token of its own."""
    rng = random.Random(SEED)
    sample = texts + ["\n".join(statement(rng) for _ in range(200)) for _ in range(100)]
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(
        Regex(" ?[0-9]"), "isolated"
    )  # a digit is a token of its own, with the space before it
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
    """Momentum made orthogonal by five Newton-Schulz steps (K. Jordan 2024), for the matrices inside the blocks; fp32."""

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
    parser.add_argument("--steps", type=int, default=4000)
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
                f"step {step}/{args.steps} {entry} {rate:,.0f} tokens/s, {(args.steps - step) * args.rows * LENGTH / rate / 60:.0f} min left",
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
        f"step {step}: wrote {args.export}, {sum(f.stat().st_size for f in args.export.iterdir()) / 2**20:.1f} MiB; equations right in bf16: {arithmetic_accuracy(model, tok):.1%}"
    )


if __name__ == "__main__":
    main()
