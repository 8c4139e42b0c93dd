"""Greedy answers: batch size and order do not matter, the end token stops, and the model is left as it was."""

from __future__ import annotations

import math

import pytest
import torch

import tiny_llm
from lora_lite.data.tokens import IGNORED
from lora_lite.demo.evaluate import complete, evaluate, mean_loss
from lora_lite.demo.wordmath import generate

PROMPTS = ["1+2=", "Q: a longer one, 12 + 30 ?\nA:", "abc", "7*8="]


@pytest.fixture(scope="module")
def tiny():
    return tiny_llm.model(seed=3), tiny_llm.tokenizer()


def row_of(tok, prompt: str, answer: str) -> dict[str, list[int]]:
    """Tokens of a row, character by character, with the end token."""
    before, after = tok(prompt)["input_ids"], [*tok(answer)["input_ids"], tok.eos_token_id]
    return {"input_ids": before + after, "labels": [IGNORED] * len(before) + after}


def memorised(tok, text: str, steps: int = 60):
    """A tiny model that completes `text`, and its end, by heart."""
    model = tiny_llm.model(seed=1)
    row = row_of(tok, "", text)
    batch = {k: torch.tensor([v]) for k, v in row.items()}
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert loss.item() < 0.05
    return model


def test_padding_and_order_change_no_answer(tiny):
    model, tok = tiny
    alone = [complete(model, tok, [p], max_new_tokens=8)[0] for p in PROMPTS]
    assert len(set(alone)) > 1
    assert complete(model, tok, PROMPTS, batch_size=4, max_new_tokens=8) == alone
    assert complete(model, tok, PROMPTS[::-1], batch_size=3, max_new_tokens=8) == alone[::-1]


def test_training_mode_padding_side_and_progress(tiny):
    model, tok = tiny
    tok.padding_side = "right"
    model.train()
    seen = []
    complete(
        model, tok, PROMPTS, batch_size=3, max_new_tokens=2, progress=lambda done, total: seen.append((done, total))
    )
    assert model.training and tok.padding_side == "right"
    assert seen == [(3, 4), (4, 4)]


def test_the_end_token_stops_and_is_not_shown():
    tok = tiny_llm.tokenizer()
    model = memorised(tok, "Q: 1+1?\nA: 2")
    assert complete(model, tok, ["Q: 1+1?\nA:"], max_new_tokens=12) == [" 2"]


def test_accuracy_is_the_share_of_right_final_numbers():
    tok = tiny_llm.tokenizer()
    problems = generate("test", 4, seed=5)
    p = min(problems, key=lambda p: len(p.prompt + p.completion))
    model = memorised(tok, p.prompt + p.completion, steps=120)
    result = evaluate(model, tok, [p], max_new_tokens=64)
    assert result.accuracy == 1 and result.completions == [p.completion]
    others = [q for q in problems if q.answer != p.answer]
    assert evaluate(model, tok, [p, *others], max_new_tokens=64).accuracy == 1 / (1 + len(others))


def test_mean_loss_weighs_tokens_not_batches(tiny):
    model, tok = tiny
    rows = [row_of(tok, "1+2=", "3"), row_of(tok, "ab", "cdefgh")]
    together = mean_loss(model, rows, 2, tok.pad_token_id)
    assert math.isclose(mean_loss(model, rows, 1, tok.pad_token_id), together, rel_tol=1e-5)
    one, other = (mean_loss(model, [r], 1, tok.pad_token_id) for r in rows)
    assert math.isclose(together, (2 * one + 7 * other) / 9, rel_tol=1e-5)
    assert not math.isclose(together, (one + other) / 2, rel_tol=1e-5)
