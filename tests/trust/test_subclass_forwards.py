"""A subclass with a forward of its own need not do what its parent does: it is tried, and refused by name where an
adapter would act elsewhere than in its weight."""

from __future__ import annotations

import copy
import re
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.testing import toy

# ---- layers that are not what they seem


class SoftRouter(nn.Linear):
    def forward(self, x):
        z = super().forward(x)
        return z.softmax(-1), z


class TopK(nn.Linear):
    """Its first output is linear, and what it decided by it is not changed with it."""

    def forward(self, x):
        z = super().forward(x)
        return z, z.topk(2, -1).indices


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)


class Capped(nn.Linear):
    def forward(self, x):
        return 30 * torch.tanh(super().forward(x) / 30)


class CappedFarOut(nn.Linear):
    def forward(self, x):
        return 150 * torch.tanh(super().forward(x) / 150)


class Named(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Gated(nn.Linear):
    def forward(self, x, gate):
        return super().forward(x) * gate


class ByParameters(nn.Module):
    """No subclass of anything: known by its attributes."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x):
        return F.relu(x @ self.weight.mT)


class Positions(nn.Embedding):
    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1]).expand_as(ids) + 2)


class FromMask(nn.Embedding):
    def forward(self, mask, past):
        return super().forward(mask.cumsum(1) + past)


class Normalised(nn.Embedding):
    def forward(self, ids):
        return F.normalize(super().forward(ids), dim=-1)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Trimmed(nn.Conv1d):
    def forward(self, x):
        return super().forward(x)[..., :-1]


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


STRANGE = {
    "soft router": lambda: SoftRouter(12, 6),
    "top-k router": lambda: TopK(12, 6),
    "cosine router": lambda: Cosine(12, 6),
    "capped head": lambda: Capped(12, 6),
    "head capped far out": lambda: CappedFarOut(12, 6),
    "dictionary": lambda: Named(12, 6),
    "gated": lambda: Gated(12, 6),
    "by its attributes": lambda: ByParameters(12, 6),
    "positions": lambda: Positions(20, 12),
    "positions of a mask": lambda: FromMask(20, 12),
    "normalised rows": lambda: Normalised(20, 12),
    "causal convolution": lambda: Causal(3, 4, 3),
    "trimmed convolution": lambda: Trimmed(3, 4, 3),
    "standardised weights": lambda: Standardised(3, 4, 3),
}
KINDS = ("linear", "embedding", "conv")


class Beside(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.odd, self.plain = odd, nn.Linear(12, 12)


@pytest.mark.parametrize("degenerate", ["", "zero", "nan"])
@pytest.mark.parametrize("name", STRANGE)
def test_refused_by_name_and_no_default_target(name, degenerate):
    model = Beside(STRANGE[name]())
    if degenerate:
        model.odd.weight.data.fill_({"zero": 0.0, "nan": float("nan")}[degenerate])
    before, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan = ll.plan(model, ll.LoRAConfig(r=2, target_kinds=KINDS))
    assert [t.path for t in plan.targets] == ["plain"]
    assert "a forward of its own" in dict(plan.unadapted)["odd"]
    with pytest.raises(ll.TargetError, match=rf"odd: this {type(model.odd).__name__} .*exclude_names"):
        ll.attach(model, ll.LoRAConfig(r=2, target_kinds=KINDS, target_names=("odd", "plain")))
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in model.state_dict().items())
    assert torch.equal(draws, torch.get_rng_state()) and model.odd.training and not ll.adapters(model)


@pytest.mark.parametrize("name", ["soft router", "positions", "causal convolution"])
def test_a_file_that_adapts_one_is_refused_too(name, tmp_path):
    """Written when the layer was a plain one."""
    odd = STRANGE[name]()
    parent = next(c for c in type(odd).__mro__ if c.__module__.startswith("torch"))
    plain = Beside(copy.deepcopy(odd))
    plain.odd.__class__ = parent
    ll.attach(plain, ll.LoRAConfig(r=2, target_kinds=KINDS))
    file = ll.save(plain, tmp_path / "a")
    model = Beside(odd)
    with pytest.raises(ll.FileError, match="odd: this"):
        ll.load(model, file, base_check="ignore")
    assert not ll.adapters(model)


# ---- layers that are


class Logged(nn.Linear):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class WithBias(nn.Linear):
    """As Megatron's: the bias goes out beside y."""

    def forward(self, x):
        return F.linear(x, self.weight), self.bias


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class ReadsBias(nn.Linear):
    def forward(self, x):
        return x @ self.weight.mT + self.bias.to(x.dtype)


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.tril(), self.bias)


class Rounds(nn.Linear):
    """Activations of eight bits, as in dynamic quantisation."""

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return super().forward((x / step).round() * step)


LINEAR = {"logged": Logged, "bias beside": WithBias, "halved": Halved, "reads its bias": ReadsBias, "masked": Masked}
METHODS = [v for v in ll.variants() if v.site == "linear" and not v.needs_data and "linear" in v.config().target_kinds]


def randomised(model: nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for handle in ll.adapters(model).values():
            for p in handle.parameters():
                p.add_(scale * torch.randn(p.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [*LINEAR.values(), Rounds])
def test_affine_layers_are_default_targets(layer, dtype):
    model = nn.Sequential(layer(12, 6).to(dtype))
    assert [t.path for t in ll.plan(model, ll.LoRAConfig(r=2)).targets] == ["0"]


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("variant", METHODS, ids=lambda v: v.name)
def test_merged_is_adapted(variant, name):
    """Whatever the subclass does to its product, merging keeps what the adapted layer computed."""
    model, x = nn.Sequential(LINEAR[name](12, 12)).double().eval(), torch.randn(3, 4, 12, dtype=torch.double)
    try:
        ll.attach(model, variant.config(variant=variant.name, r=2, dtype="float64"))
    except ll.LoraLiteError as e:
        assert "0" in str(e) or "target_roles=None takes all" in str(e)
        return
    randomised(model)
    want = _first(model(x))
    if not variant.affine:
        return
    try:
        ll.merge(model)
    except ll.LoraLiteError as e:
        assert name == "bias beside" and "keep the adapter attached" in str(e)
        return
    torch.testing.assert_close(_first(model(x)), want, rtol=1e-6, atol=1e-6)
    ll.unmerge(model)
    assert torch.equal(_first(model(x)), want) and type(model[0]) is LINEAR[name]


def _first(y):
    return y[0] if isinstance(y, tuple) else y


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.embedding_dim**0.5


class Tied(nn.Module):
    def __init__(self, tie: bool, layer: type[nn.Embedding] = Scaled) -> None:
        super().__init__()
        self.emb, self.lin, self.head = layer(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        if tie:
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lin(self.emb(ids))))

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def get_output_embeddings(self) -> nn.Module:
        return self.head


IDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(3))
ON_EMBEDDINGS = [v for v in ll.variants() if not v.needs_data]


@pytest.mark.parametrize("variant", ON_EMBEDDINGS, ids=lambda v: v.name)
def test_a_scaled_embedding_scales_every_change(variant):
    """The adapter is a change of the rows: what it does to a plain embedding, times the layer's number."""
    scaled, plain = nn.Sequential(Scaled(20, 16)).double().eval(), nn.Sequential(nn.Embedding(20, 16)).double().eval()
    plain.load_state_dict(scaled.state_dict())
    base = scaled(IDS)
    cfg = variant.config(variant=variant.name, r=4, dtype="float64", target_kinds=("embedding",))
    try:
        for model in (plain, scaled):
            torch.manual_seed(1)
            ll.attach(model, cfg)
            if model is scaled and variant.exact_identity:
                assert torch.equal(model(IDS), base)
            randomised(model)
    except ll.LoraLiteError:
        return
    want = 4 * plain(IDS)
    torch.testing.assert_close(scaled(IDS), want, rtol=1e-9, atol=1e-9)
    if variant.affine:
        ll.merge(scaled)
        torch.testing.assert_close(scaled(IDS), want, rtol=1e-9, atol=1e-9)
        ll.unmerge(scaled)
        torch.testing.assert_close(scaled(IDS), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_on_a_scaled_embedding_is_the_base_bit_for_bit(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(20, 7)).to(dtype)  # 7 ** 0.5 is no power of two
    base = model(IDS)
    ll.attach(model, ll.LoRAConfig(r=2, target_kinds=("embedding",)))
    assert torch.equal(model(IDS), base)


@pytest.mark.parametrize("tie", [False, True])
def test_token_rows_of_a_scaled_embedding(tie):
    model = Tied(tie).eval()
    ll.attach(model, ll.TokenRowsConfig(token_ids=(2, 5)))
    randomised(model, 1.0)
    rows = model.emb.lora_rows.detach()
    want = Tied(tie)
    ref = {k: v for k, v in model.state_dict().items() if "lora" not in k}
    want.load_state_dict(ref)
    with torch.no_grad():
        want.emb.weight[[2, 5]] += rows
    got = model(IDS)
    torch.testing.assert_close(got, want(IDS))
    ll.merge(model)
    torch.testing.assert_close(model(IDS), want(IDS))


@pytest.mark.parametrize("wrapped", ["emb", "head"])
def test_modules_trained_whole_in_a_peft_folder(wrapped, tmp_path):
    """PEFT trains a copy of the scaled embedding, and we the difference of its weight: both ways."""
    peft = pytest.importorskip("peft")
    base = Tied(False).eval()
    cfg = peft.LoraConfig(r=2, target_modules=["lin"], modules_to_save=[wrapped])
    theirs = peft.get_peft_model(copy.deepcopy(base), cfg).eval()
    with torch.no_grad():
        for q in theirs.parameters():
            if q.requires_grad:
                q.add_(torch.randn_like(q) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    ll.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)
    ll.export(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)


def test_scaled_embeddings_of_transformers(tmp_path):
    """Gemma keeps the number in a buffer, BART in an attribute."""
    from transformers import BartConfig, BartModel, GemmaConfig, GemmaModel
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    bart = BartModel(
        BartConfig(
            vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
            scale_embedding=True, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        )
    ).eval()  # fmt: skip
    assert any(isinstance(m, BartScaledWordEmbedding) for m in bart.modules())
    plan = ll.plan(bart, ll.LoRAConfig(r=2, target_kinds=("embedding",), target_names=(r"encoder\.embed_tokens",)))
    assert [t.path for t in plan.targets] == ["encoder.embed_tokens"]
    positions = re.escape("encoder.embed_positions")
    with pytest.raises(ll.TargetError, match="embed_positions: this BartLearnedPositionalEmbedding"):
        ll.plan(bart, ll.LoRAConfig(r=2, target_kinds=("embedding",), target_names=(positions,)))
    gemma = GemmaModel(
        GemmaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    model = copy.deepcopy(gemma)
    ll.attach(model, ll.LoRAConfig(r=2, alpha=3, target_kinds=("embedding",)))
    randomised(model, 1.0)
    emb = model.embed_tokens
    with torch.no_grad():
        gemma.embed_tokens.weight += (1.5 * emb.lora_B @ emb.lora_A).T
        torch.testing.assert_close(model(IDS)[0], gemma(IDS)[0], rtol=1e-4, atol=1e-5)
        ll.merge(model)
        torch.testing.assert_close(model(IDS)[0], gemma(IDS)[0], rtol=1e-4, atol=1e-5)


# ---- where nothing can be tried


def test_on_the_meta_device_the_first_call_tries():
    """Shapes are all that there is at attach."""
    with torch.device("meta"):
        model = Beside(SoftRouter(12, 6))
    model.forward = lambda x: model.odd(model.plain(x))  # type: ignore[method-assign]
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    assert any("SoftRouter" in note and "first call" in note for note in plan.notes)
    ll.attach(model, ll.LoRAConfig(r=2))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    with pytest.raises(ll.TargetError, match="odd: this SoftRouter"):
        model(torch.randn(2, 12))


def test_a_scaled_embedding_that_was_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(Scaled(20, 16))
    ll.attach(model, ll.LoRAConfig(r=2, target_kinds=("embedding",)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    W = model[0].weight + (model[0].lora_B @ model[0].lora_A).T
    torch.testing.assert_close(model(IDS), 4 * W[IDS])


def test_packed_layers_are_not_tried():
    """A quantised layer's forward is its backend's own."""
    from lora_lite.testing.toy import FakeQuantLinear

    class Spy(FakeQuantLinear):
        def forward(self, x):
            raise AssertionError("was tried")

    plan = ll.plan(toy(kind=Spy), ll.LoRAConfig(r=2))
    assert len(plan.targets) == 4


class Counts(nn.Linear):
    """Its forward leaves traces: it counts, draws, and depends on its mode and on a child's."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        y = super().forward(self.drop(x))
        return y + torch.randn_like(y) if self.training else y


def test_a_trial_leaves_the_layer_alone():
    layer = Counts(6, 5)
    layer.weight.data.zero_()  # which shows nothing, so the trial takes another one
    model, stored = nn.Sequential(layer).train(), layer.weight
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    ll.attach(model, ll.LoRAConfig(r=2))
    assert torch.equal(torch.rand(2), want)
    assert layer.training and layer.drop.training and layer.weight is stored and not layer.weight.any()
    assert not layer.calls.any() and set(vars(layer)) - {"_lora_lite_site"} == set(vars(Counts(6, 5)))


def test_a_forward_that_was_put_on_the_layer_is_tried():
    bent, straight = nn.Linear(6, 6), nn.Linear(6, 6)
    bent.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight).relu(), bent)
    straight.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight), straight)
    straight.weight.data.zero_()
    plan = ll.plan(nn.Sequential(bent, straight), ll.LoRAConfig(r=2))
    assert [t.path for t in plan.targets] == ["1"]
    assert "not linear" in dict(plan.unadapted)["0"]
