"""What a method learns from data: the right sums, on the untouched model, which is given back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll
from lora_lite.core.errors import ConfigError, StateError
from lora_lite.runtime.model.record import Record
from lora_lite.runtime.plan import plan
from lora_lite.runtime.start.calibrate import Targets
from lora_lite.runtime.start.staging import stage
from lora_lite.testing.toy import FakeQuantLinear, toy

VOCAB = 50


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).to(dtype)


def targets_of(model: nn.Module, **fields) -> Targets:
    the_plan = plan(model, ll.LoRAConfig(r=2, **fields))
    record = Record("t", ll.get_variant("lora"), the_plan.cfg, {t.path: t for t in the_plan.targets})
    return Targets(model, stage(model, record))


def batches(padding: int = 0, side: str = "right", n: int = 2) -> list[dict[str, torch.Tensor]]:
    """Rows of different length, padded with the token `padding`."""
    g = torch.Generator().manual_seed(5)
    found = []
    for _ in range(n):
        ids = torch.full((2, 7), padding)
        mask = torch.zeros(2, 7, dtype=torch.long)
        for row, length in enumerate((7, 4)):
            at = slice(0, length) if side == "right" else slice(7 - length, 7)
            ids[row, at] = torch.randint(1, VOCAB, (length,), generator=g)
            mask[row, at] = 1
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.clone()})
    return found


def inputs_of(model: nn.Module, path: str, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """All unpadded inputs of one layer, collected the slow way."""
    rows = []
    layer = model.get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    model.eval()
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    return torch.cat([x[b["attention_mask"].bool()] for x, b in zip(rows, data, strict=True)])


def test_gram_and_moments_are_the_sums_over_unpadded_tokens():
    model = llama()
    data, found = batches(), {}
    targets = targets_of(model)
    found, moments = targets.gram(data), targets.moments(data)
    for view in targets:
        X = inputs_of(model, view.path, data)
        torch.testing.assert_close(found[view.path], X.mT @ X, atol=1e-10, rtol=0)
        m = moments[view.path]
        assert m.n == len(X) == 22
        torch.testing.assert_close(m.sum, X.sum(0), atol=1e-10, rtol=0)
        torch.testing.assert_close(m.abs, X.abs().sum(0), atol=1e-10, rtol=0)
        torch.testing.assert_close(m.square, X.square().sum(0), atol=1e-10, rtol=0)


def test_gradients_are_those_of_autograd():
    model = llama()
    data = batches()
    found = targets_of(model).gradients(data)
    for batch in data:
        masked = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
        (model(**{**batch, "labels": masked}).loss / len(data)).backward()
    for path, g in found.items():
        torch.testing.assert_close(g, model.get_submodule(path).weight.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_triplets_of_a_gradient_from_few_tokens_and_from_many(few, monkeypatch):
    monkeypatch.setattr("lora_lite.runtime.start.gradients.FEW", 0 if few else 100)
    model, data = llama(), batches()
    dense = targets_of(model).gradients(data)
    for view, U, S, V in targets_of(model).each_gradient_svd(data, lambda view: 2 * view.cfg.r):
        u, s, vh = torch.linalg.svd(dense[view.path], full_matrices=False)
        torch.testing.assert_close(S, s[:4])
        torch.testing.assert_close((U * S) @ V.mT, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-9 * float(s[0]), rtol=0)


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_c_can_be_multiplied_without_c(few, monkeypatch):
    monkeypatch.setattr("lora_lite.runtime.start.calibrate.FEW", 0 if few else 100)
    model, data = llama(), batches()
    dense = targets_of(model).gram(data)
    for gram in targets_of(model).each_gram(data):
        v = torch.randn(len(gram.sum), 3, dtype=torch.float64)
        torch.testing.assert_close(gram.times(v), dense[gram.views[0].path] @ v)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(side):
    model = llama()
    model.train()
    for kind in ("gram", "gradients"):
        a, b = (getattr(targets_of(model), kind)(batches(padding, side)) for padding in (0, 17))
        for path in a:
            torch.testing.assert_close(a[path], b[path], atol=1e-12, rtol=1e-9)


def test_labelled_tokens_only():
    model = llama()
    data = batches()
    for batch in data:
        batch["labels"][:, :3] = -100
    found = targets_of(model).gram(data, labelled=True)
    path = "model.layers.1.mlp.down_proj"
    for batch in data:
        batch["attention_mask"][:, :3] = 0
    layer, rows = model.get_submodule(path), []
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    for batch in batches():
        model(**batch)
    hook.remove()
    X = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(rows, data, strict=True)])
    torch.testing.assert_close(found[path], X.mT @ X, atol=1e-10, rtol=0)


def test_layers_that_share_an_input_share_one_gram():
    grams = list(targets_of(llama()).each_gram(batches()))
    tails = [{v.path.rsplit(".", 1)[-1] for v in g.views} for g in grams]
    assert tails == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}] * 2
    assert {g.n for g in grams} == {22}


def test_an_input_changed_in_place_is_not_shared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.mul_(3))

    model = Net().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    found = targets_of(model).gram([x])
    torch.testing.assert_close(found["a"], x.mT @ x)
    torch.testing.assert_close(found["b"], 9 * x.mT @ x)


def test_a_small_budget_takes_more_passes_and_gives_the_same():
    model, data = llama(), batches()
    whole = targets_of(model).gram(data)
    seen = {v.path: g.C for g in targets_of(model).each_gram(data, budget=20 * 20 * 8) for v in g.views}
    assert seen.keys() == whole.keys() and all(torch.equal(seen[p], whole[p]) for p in whole)
    g = targets_of(model).gradients(data)
    parts = {v.path: t for v, t in targets_of(model).each_gradient(data, budget=4000)}
    assert parts.keys() == g.keys()
    for path in g:
        torch.testing.assert_close(parts[path], g[path], atol=1e-12, rtol=1e-9)
    with pytest.raises(ConfigError, match="used up"):
        list(targets_of(model).each_gram(iter(data), budget=20 * 20 * 8))


def snapshot(model: nn.Module):
    return (
        {n: (p.detach().clone(), p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
        {n: m.training for n, m in model.named_modules()},
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        list(model.state_dict()),
    )


def same(a, b) -> bool:
    tensors = all(torch.equal(a[0][n][0], b[0][n][0]) and a[0][n][1:] == b[0][n][1:] for n in a[0])
    return tensors and a[0].keys() == b[0].keys() and a[1:] == b[1:]


def broken():
    yield batches()[0]
    raise RuntimeError("the data broke")


@pytest.mark.parametrize("what", ["each_gram", "gram", "moments", "gradients"])
def test_the_model_comes_back_also_when_the_data_raises(what):
    model = llama()
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    before = snapshot(model)
    run = getattr(targets_of(model), what)
    list(run(batches()))
    assert same(before, snapshot(model))
    with pytest.raises(RuntimeError, match="broke"):
        list(run(broken()))
    assert same(before, snapshot(model))


def test_attach_is_all_or_nothing_when_the_data_raises():
    model = llama()
    model.train()
    before, state = snapshot(model), torch.get_rng_state()

    def noisy():
        torch.rand(3)
        yield from broken()

    with pytest.raises(RuntimeError, match="broke"):
        ll.attach(model, ll.EVAConfig(r=2), noisy())
    assert same(before, snapshot(model)) and torch.equal(state, torch.get_rng_state())
    assert ll.adapters(model) == {}
    ll.attach(model, ll.EVAConfig(r=2), (b for b in batches()))
    assert torch.equal(state, torch.get_rng_state())


def test_statistics_are_of_the_model_without_its_adapters():
    plain = targets_of(llama()).gram(batches())
    model = llama()
    handle = ll.attach(model, ll.LoRAConfig(r=2, dtype="float64"), name="first")
    for p in handle.parameters():
        nn.init.normal_(p)
    found = targets_of(model).gram(batches())
    assert all(torch.equal(plain[path], found[path]) for path in plain)
    assert handle.active
    gradients = targets_of(model).gradients(batches())
    assert gradients and all(p.requires_grad and p.grad is None for p in handle.parameters())


def test_refusals():
    model = llama()
    targets = targets_of(model)
    used = iter(batches())
    list(used)
    for data in ([], used):
        with pytest.raises(ConfigError, match="used up"):
            targets.gram(data)
    with pytest.raises(ConfigError, match="no tensor"):
        targets.gram([{"input_ids": [1, 2]}])
    with pytest.raises(ConfigError, match="got str"):
        targets.gram(["text"])
    with pytest.raises(ConfigError, match="labels"):
        targets.gradients([{"input_ids": batches()[0]["input_ids"]}])
    with pytest.raises(ConfigError, match="labels"):
        targets.gram([{"input_ids": batches()[0]["input_ids"]}], labelled=True)
    with pytest.raises(ConfigError, match="attention_mask has shape"):
        targets.gram([{**batches()[0], "attention_mask": torch.ones(2, 1, 7, 7)}])
    with pytest.raises(ConfigError, match="starts from data"):
        ll.attach(model, ll.EVAConfig(r=2))
    with pytest.raises(ConfigError, match="uses no calibration data"):
        ll.attach(model, ll.LoRAConfig(r=2), batches())


def test_a_layer_that_is_never_reached_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.a(x)

    with pytest.raises(StateError, match="never reached 'b'"):
        targets_of(Net()).gram([torch.randn(5, 6)])
    with pytest.raises(StateError, match="never reached 'b'"):
        targets_of(Net()).each_gradient([torch.randn(5, 6)], loss=lambda y: y.sum()).__next__()


def test_quantised_layers_are_refused_before_the_data_is_read():
    """CorDA reads its weights after minutes of data."""

    def data():
        raise AssertionError("the data was read")
        yield

    model = toy(kind=FakeQuantLinear)
    with pytest.raises(ll.WeightError, match="dequantize=True"):
        ll.attach(model, ll.CorDAConfig(r=3, alpha=7), data())
