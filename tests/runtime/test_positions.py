"""Block sites: which tokens a method edits, whatever is padded, cached, repeated by beams, mixed in rows, or
recomputed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
import tiny_models
from lora_lite.testing import toy
from neighbours import needs, older
from tiny_blocks import changed, decoder, outputs, padded, prompts, randomise

LENGTHS = (9, 4, 1)


def adapted(positions: str, kind: str = "llama", layers: tuple[int, ...] | None = None, **fields: object) -> nn.Module:
    model = decoder(kind)
    ll.attach(model, ll.DiReFTConfig(r=2, alpha=3, positions=positions, layers=layers, **fields))
    randomise(model)
    return model


def tokens_of(positions: str, n: int, total: int) -> list[int]:
    """The definition, token by token: which of `total` tokens with a prompt of n are edited."""
    if positions in ("all", "prompt", "generated"):
        return [i for i in range(total) if positions == "all" or (i < n) == (positions == "prompt")]
    p, s = (int(next((part[1:] for part in positions.split("+") if part[0] == c), 0)) for c in "fl")
    most = n // 2 if p and s else n
    return [i for i in range(n) if i < min(p, most) or i >= n - min(s, most)]


WORDS = ("f1", "l1", "f2+l3", "f7+l7", "prompt", "generated", "all")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", WORDS)
def test_only_these_tokens_change(positions, side):
    batch = padded(prompts(LENGTHS), side)
    model = adapted(positions, layers=(0,))
    for given in (None, (3, 4, 0)):  # inferred from the mask: all is prompt; or named
        if given is None:
            columns = changed(model, batch)
        else:
            with ll.prompt(model, given):
                columns = changed(model, batch)
        for row, (length, n) in enumerate(zip(LENGTHS, given or LENGTHS, strict=True)):
            start = max(LENGTHS) - length if side == "left" else 0
            found = [c for c in columns[row] if start <= c < start + length]  # padding is nobody's concern under "all"
            assert found == [start + i for i in tokens_of(positions, n, length)]
            assert positions == "all" or found == columns[row]


@pytest.mark.parametrize("positions", WORDS)
def test_only_these_tokens_change_without_a_mask(positions):
    model, rows = adapted(positions, layers=(0,)), prompts((7, 7, 7))
    with ll.prompt(model, (3, 7, 1)):
        columns = changed(model, {"input_ids": torch.stack(rows)})
    assert columns == [tokens_of(positions, n, 7) for n in (3, 7, 1)]


def test_a_hole_in_the_mask_is_no_token():
    batch = padded(prompts((6,)))
    batch["attention_mask"][0, 2:4] = 0
    assert changed(adapted("f2+l2", layers=(0,)), batch) == [[0, 1, 4, 5]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["f2+l3", "l1", "prompt"])
def test_a_padded_batch_equals_its_rows_alone(kind, side, positions):
    model, rows = adapted(positions, kind), prompts(LENGTHS)
    batch = padded(rows, side)
    with torch.no_grad():
        together = model(**batch).logits
        for i, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(together[i][batch["attention_mask"][i].bool()], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["f2+l3", "l1", "prompt", "generated"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(kind, positions, beams):
    model, lengths = adapted(positions, kind), (6, 3)
    batch = padded(prompts(lengths))
    del batch["position_ids"]  # generate makes them
    options = {**batch, "max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    cached = model.generate(**options)
    with ll.prompt(model, lengths):
        assert torch.equal(model.generate(**options), cached)
        assert torch.equal(model.generate(**options, use_cache=False), cached)
    with ll.active(model, None):
        assert not torch.equal(model.generate(**options), cached)
    if beams == 1:  # token by token, each time the whole sequence
        ids, mask = batch["input_ids"], batch["attention_mask"]
        for _ in range(5):
            with ll.prompt(model, lengths), torch.no_grad():
                at = (mask.cumsum(1) - 1).clamp_min(0)
                new = (
                    model(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False)
                    .logits[:, -1:]
                    .argmax(-1)
                )
            ids, mask = torch.cat((ids, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
        assert torch.equal(ids, cached)


def test_generation_with_a_static_cache():
    model, batch = adapted("f2+l3"), padded(prompts((6, 3)))
    del batch["position_ids"]
    options = {**batch, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(**options, cache_implementation="static", disable_compile=True), model.generate(**options)
    )


@pytest.mark.parametrize("positions", ["f2+l3", "prompt", "generated"])
def test_a_prompt_in_chunks(positions):
    model, lengths = adapted(positions), (7, 4)
    batch = padded(prompts(lengths))
    with torch.no_grad(), ll.prompt(model, lengths):
        whole = model(**batch).logits
        cache, parts = None, []
        for a, b in ((0, 3), (3, 6), (6, 7)):
            out = model(
                input_ids=batch["input_ids"][:, a:b],
                attention_mask=batch["attention_mask"][:, :b],
                position_ids=batch["position_ids"][:, a:b],
                **tiny_models.continuing(model, cache),
                use_cache=True,
            )
            cache = out.past_key_values
            parts.append(out.logits)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-4, atol=1e-5)


def test_a_decoding_step_edits_nothing():
    model, step, found = adapted("f2+l3"), torch.randint(3, 40, (2, 1)), []
    with torch.no_grad():
        cache = model(torch.randint(3, 40, (2, 6)), use_cache=True).past_key_values
        for name in ("default", None):
            with ll.active(model, name):
                found.append(model(input_ids=step, **tiny_models.continuing(model, copy.deepcopy(cache))).logits)
    assert torch.equal(*found)


# ---- training: where the prompt ends


def completion_batch():
    """(batch, prompt lengths): prompts of 5 and 3 tokens with 3 and 2 tokens of answer, left-padded, prompts masked in
    the labels."""
    lengths, rows = (5, 3), prompts((8, 5))
    batch = padded(rows)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        start = 8 - len(row)
        labels[i, start : start + n] = -100
    return {**batch, "labels": labels}, lengths


@pytest.mark.parametrize("training", [False, True])
def test_labels_tell_the_prompt(training):
    batch, lengths = completion_batch()
    model = adapted("f1+l2").train(training)
    by_labels = model(**batch).loss
    with ll.prompt(model, lengths):
        assert torch.equal(model(**batch).loss, by_labels)
    with ll.prompt(model, torch.tensor([8, 5])):
        assert not torch.equal(model(**batch).loss, by_labels)
    with ll.prompt(model, None):
        assert not torch.equal(model(**batch).loss, by_labels)
    assert changed(adapted("f1+l2", layers=(0,)), batch) == [[0, 3, 4], [3, 5]]  # n//2 = 2 of 5, 1 of 3


def test_what_cannot_be_told_raises():
    batch, lengths = completion_batch()
    model = adapted("f1+l2")
    unmasked = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    with pytest.raises(ll.SelectionError, match="does not start with -100.*ll.prompt"):
        model(**unmasked)
    with ll.prompt(model, lengths):
        model(**unmasked)
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    model(**unlabelled)
    with pytest.raises(ll.SelectionError, match="training call without labels.*ll.prompt"):
        model.train()(**unlabelled)
    with torch.no_grad():
        model(**unlabelled)
    with ll.prompt(model, lengths):
        model(**unlabelled)
    with ll.active(model, None):  # nobody asks
        model(**unlabelled)
    model.eval()
    packed = {"input_ids": batch["input_ids"][:1], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}
    with pytest.raises(ll.SelectionError, match="packs several sequences"):
        model(**packed, labels=batch["labels"][:1])
    with torch.no_grad():
        cache = model(batch["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ll.SelectionError, match="2 new tokens follow 8 cached ones"):
        model(input_ids=batch["input_ids"][:, :2], **tiny_models.continuing(model, cache))
    with pytest.raises(ll.SelectionError, match="must be .batch, tokens., cached tokens included"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(2, 8, 8))
    with pytest.raises(ll.SelectionError, match="without a cache"):
        model.generate(batch["input_ids"], max_new_tokens=3, use_cache=False, pad_token_id=0)
    with pytest.raises(ll.SelectionError, match="a call of the whole model"):
        model.model(input_ids=batch["input_ids"])
    with ll.prompt(model, (9, 1)), pytest.raises(ll.SelectionError, match=r"\[9, 1\] tokens.*\[8, 5\]"):
        model(**batch)
    with ll.prompt(model, (1, 1, 1)), pytest.raises(ll.SelectionError, match="names 3 rows, and the batch has 2"):
        model(**batch)
    for wrong in ([], [1.5], [-1], [[1]]):
        with pytest.raises(ll.SelectionError, match="whole number"), ll.prompt(model, wrong):
            pass
    model.config.is_encoder_decoder = True
    with pytest.raises(ll.SelectionError, match="encoder-decoder"):
        model(**batch)


def test_prompt_is_a_scope():
    model, batch = adapted("f1+l2"), padded(prompts((8, 5)))
    with torch.no_grad():
        whole = model(**batch).logits
        with ll.prompt(model, (3, 3)):
            outer = model(**batch).logits
            with pytest.raises(ValueError), ll.prompt(model, (5, 5)):
                assert not torch.equal(model(**batch).logits, outer)
                raise ValueError
            assert torch.equal(model(**batch).logits, outer)
        assert torch.equal(model(**batch).logits, whole)


def test_wrong_words_raise():
    for positions in ("first", "f0+l0", "l2+f2", "f-1", ""):
        with pytest.raises(ll.ConfigError, match="f7.l7"):
            ll.DiReFTConfig(positions=positions)
    for positions in ("all", "f3", "f3+l0"):
        with pytest.raises(ll.ConfigError, match="share"):
            ll.DiReFTConfig(positions=positions, share=False)


def test_separate_edits_for_first_and_last_tokens():
    model, batch = adapted("f2+l2", layers=(0,), share=False), padded(prompts((8, 5)))
    block = model.model.layers[0]
    assert block.lora_W1.shape == (2, 2, 16)
    for part, want in ((0, [[6, 7], [6, 7]]), (1, [[0, 1], [3, 4]])):
        other = adapted("f2+l2", layers=(0,), share=False)
        with torch.no_grad():
            other.model.layers[0].lora_W2[part] = 0
        assert changed(other, batch) == want
    with outputs(model) as seen, torch.no_grad():
        model(**batch)
        with ll.active(model, None):
            model(**batch)
    h = seen[1][0]
    for i, part in ((0, 0), (1, 0), (6, 1), (7, 1)):
        z = block.lora_W1[part] @ h[i] + block.lora_b[part]
        torch.testing.assert_close(seen[0][0, i] - h[i], 1.5 * block.lora_W2[part].mT @ z)


# ---- beside other adapters


def test_rows_and_other_adapters():
    model, lengths = adapted("f2+l2"), (7, 4, 5, 6)
    ll.attach(model, ll.LoReFTConfig(r=2, positions="l1"), name="second")
    ll.attach(model, ll.LoRAConfig(r=2, alpha=4), name="lora")
    randomise(model, "second", 6)
    randomise(model, "lora", 7)
    names = ["second", None, "default", "lora"]
    batch = padded(prompts(lengths))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with ll.rows(model, names):
            mixed = model(**batch).logits
        with ll.active(model, None):
            base = model(**batch).logits
        assert torch.equal(mixed[1], base[1])
        for i, name in enumerate(names):
            with ll.active(model, name):
                torch.testing.assert_close(mixed[i][real[i]], model(**batch).logits[i][real[i]], rtol=1e-4, atol=1e-5)
    del batch["position_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    with ll.rows(model, names):
        together = model.generate(**batch, **options)
    for i, name in enumerate(names):
        with ll.active(model, name):
            alone = model.generate(**{k: v[i : i + 1] for k, v in batch.items()}, **options)
        assert torch.equal(together[i], alone[0])


def test_together_with_lora():
    """Both at once: the block's edit acts on what the block with its LoRA layers returns."""
    model, batch = adapted("f2+l2", layers=(0,)), padded(prompts((7,)))
    ll.attach(model, ll.LoRAConfig(r=2, alpha=4, layers=(0,)), name="lora")
    randomise(model, "lora", 7)
    block = model.model.layers[0]
    with outputs(model) as seen, torch.no_grad():
        for names in ("lora", ["default", "lora"]):
            with ll.active(model, names):
                model(**batch)
    h, both = seen
    want = h.clone()
    for i in (0, 1, 5, 6):
        want[0, i] += 1.5 * block.lora_W2[0].mT @ (block.lora_W1[0] @ h[0, i] + block.lora_b[0])
    torch.testing.assert_close(both, want)


# ---- other ways to call a model


class Stack(nn.Module):
    """Blocks that return tuples, as older libraries' do, perhaps recomputed in backward with their hooks inside."""

    def __init__(self, recompute: bool = False, tuples: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([Tupled(tuples), Tupled(tuples)])
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            out = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


class Tupled(nn.Module):
    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.fc, self.tuples = nn.Linear(6, 6), tuples

    def forward(self, x):
        y = x + self.fc(x).tanh()
        return (y, "cache") if self.tuples else y


def stack(**options: bool) -> Stack:
    model = Stack(**options)
    ll.attach(model, ll.LoReFTConfig(r=2, positions="f1+l1"))
    randomise(model)
    return model


def test_blocks_that_return_tuples():
    x, model = torch.randn(2, 5, 6), stack().eval()
    seen = []
    model.layers[0].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        y = model(x)
        assert torch.equal(y, stack(tuples=False).eval()(x))
        with ll.active(model, None):
            assert not torch.equal(y, model(x))
    (edited, cache), (plain, _) = seen
    assert cache == "cache" and (edited != plain).any(-1).tolist() == [[True, False, False, False, True]] * 2


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_under_checkpointing(recompute):
    """Backward runs after the `with` block; the recomputation must see the positions of its forward."""
    x, model, twin = torch.randn(2, 5, 6), stack(recompute=recompute).train(), stack().train()
    grads = []
    for m in (model, twin):
        with ll.prompt(m, (4, 2)):
            loss = m(x).square().sum()
        loss.backward()
        grads.append([p.grad for p in ll.adapters(m)["default"].parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()


def test_two_prompts_that_wait_for_recomputation_raise():
    x, model = torch.randn(2, 5, 6), stack(recompute=True).train()
    losses = []
    for lengths in ((4, 2), (5, 5)):
        with ll.prompt(model, lengths):
            losses.append(model(x).square().sum())
    with pytest.raises(ll.SelectionError, match="several adapter selections or prompts"):
        sum(losses).backward()
    with ll.prompt(model, (4, 2)):  # and the next step works, also with the same prompt twice
        sum(model(x).square().sum() for _ in range(2)).backward()


@needs("torch", "2.7", "compiler that follows the words of `positions`")
@pytest.mark.parametrize("positions", ["f2+l3", "prompt"])
def test_compiled_in_one_graph(positions):
    torch.compiler.reset()
    model, batch = adapted(positions), padded(prompts((6, 3)))
    with torch.no_grad():
        want = model(**batch, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits, want)
        with ll.prompt(model, (2, 2)):
            torch.testing.assert_close(
                compiled(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits
            )
        assert model._lora_lite_state.here.now.call is None
    torch.compiler.reset()


def test_a_model_that_changes_the_number_of_tokens():
    class Prefixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy()

        def forward(self, x):
            return self.inner(torch.cat((x, x), 1))

    model = Prefixed().eval()
    ll.attach(model, ll.DiReFTConfig(r=2, positions="f1"))
    with pytest.raises(ll.SelectionError, match="adds, drops or flattens"):
        model(torch.randn(2, 3, 12))


def test_save_and_load(tmp_path):
    model, batch = adapted("f2+l3", share=False), padded(prompts((6, 3)))
    with torch.no_grad():
        want = model(**batch).logits
        ll.save(model, tmp_path / "a.safetensors")
        fresh = decoder()
        ll.load(fresh, tmp_path / "a.safetensors", name="again")
        assert torch.equal(fresh(**batch).logits, want)
    with pytest.raises(ll.StateError, match="residual stream"):
        ll.merge(fresh)


def test_the_oracle():
    """Of the tests: spelled out by hand."""
    assert tokens_of("f2+l3", 9, 9) == [0, 1, 6, 7, 8]
    assert tokens_of("f2+l3", 4, 9) == [0, 1, 2, 3]
    assert tokens_of("f7+l7", 5, 5) == [0, 1, 3, 4]
    assert tokens_of("f1+l1", 1, 1) == [] and tokens_of("l2", 1, 3) == [0]
    assert all(tokens_of(w, 0, 3) == [] for w in itertools.islice(WORDS, 5))


@pytest.mark.parametrize("option", ["plain", "checkpointing", "packing", "unmasked"])
def test_under_an_sft_trainer(tmp_path, option, monkeypatch):
    """Prompt/completion rows tell the prompt by their labels, whatever recomputes; packed and unmasked rows raise."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    if option == "packing" and older("trl", "1.0"):
        pytest.skip("packed batches of this version of trl look like one sequence")
    import tiny_llm
    from lora_lite.interop.trainer import adapter_trainer
    from lora_lite.runtime.call import root

    model, found, locate = tiny_llm.model(), [], root.locate
    ll.attach(model, ll.LoReFTConfig(r=2, positions="prompt"))
    monkeypatch.setattr(root, "locate", lambda *args: found.append(locate(*args)) or found[-1])
    rows = [{"prompt": "ab" * (1 + i % 3) + "=", "completion": "cd"} for i in range(8)]
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, bf16=False,
        gradient_checkpointing=option == "checkpointing", packing=option == "packing",
        completion_only_loss=option != "unmasked",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip

    def made():
        return adapter_trainer(trl.SFTTrainer)(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tiny_llm.tokenizer(),
        )

    if option == "packing":
        with pytest.raises(ll.StateError, match="several texts into"):
            made()
        return
    trainer = made()
    if option == "unmasked":
        with pytest.raises(ll.SelectionError, match="does not start with -100"):
            trainer.train()
        return
    before = ll.adapter_state_dict(model)
    trainer.train()
    assert all(not torch.equal(before[k], v) for k, v in ll.adapter_state_dict(model).items() if "lora_R" not in k)
    lengths = {n for call in found for n in call.found["prompt"][1].sum(1).tolist()}
    assert lengths == {3, 5, 7}


class Remembers(nn.Module):
    """A block list whose call takes whatever it is given."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, input_ids, **more):
        h = self.emb(input_ids)
        for block in self.layers:
            h = h + block(h)
        return h


class OfAnotherKind:
    """A cache of a class that cannot say how many tokens it holds."""


@pytest.mark.parametrize("mode", ["prompt", "generated", "f2"])
@pytest.mark.parametrize(
    "more",
    [
        {"inference_params": OfAnotherKind(), "use_cache": True},
        {"my_cache": OfAnotherKind()},
        {"past": OfAnotherKind()},
        {"state": [torch.zeros(1, 8, 2)]},
    ],
)
def test_a_cache_that_does_not_tell_how_much_it_holds_is_refused(more, mode):
    model = Remembers().eval()
    ll.attach(model, ll.DiReFTConfig(r=2, alpha=3, positions=mode))
    step = torch.tensor([[7]])
    with pytest.raises(ll.SelectionError, match=r"does not tell how many tokens came before"):
        model(step, **more)
    if mode != "generated":  # these are no caches
        model(step, use_cache=True, output_hidden_states=False, memory=torch.zeros(1, 5, 8), kind="x", options={"a": 1})
