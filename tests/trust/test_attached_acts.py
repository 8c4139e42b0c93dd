"""Attached means acting: a layer whose weight other code reads, or that was replaced, is named; a layer that was
skipped by chance is not."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.testing import toy

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
METHODS = [v for v in ll.variants() if v.site == "linear" and not v.needs_data and v.on_step is None]


class Scan(torch.autograd.Function):
    """A fused kernel."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.mT

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[1], None


class Reads(nn.Module):
    """q is read by other code; o is called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.read(x)))

    def read(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.weight, self.q.bias)


class ByProduct(Reads):
    def read(self, x):
        return x @ self.q.weight.t() + self.q.bias


class BySlices(Reads):
    def read(self, x):
        return torch.cat([F.linear(x, w) for w in self.q.weight.chunk(2)], -1)


class ByKernel(Reads):
    def read(self, x):
        return Scan.apply(x, self.q.weight)


class ByForward(Reads):
    """The method itself, past the hooks."""

    def read(self, x):
        return self.q.forward(x)


class ByConvolution(Reads):
    def read(self, x):
        return F.conv1d(x[..., None], self.q.weight[..., None], self.q.bias)[..., 0]


class ByData(Reads):
    def read(self, x):
        return x @ self.q.weight.data.mT


READERS = [Reads, ByProduct, BySlices, ByKernel, ByForward, ByConvolution, ByData]


def adapted(model: nn.Module, variant: type[ll.Variant] | None = None, **fields: object) -> nn.Module:
    cfg = ll.LoRAConfig(r=2, **fields) if variant is None else variant.config(variant=variant.name, r=2, **fields)
    ll.attach(model, cfg)
    return model


def train(model: nn.Module, steps: int = 1) -> None:
    for _ in range(steps):
        model(X).square().sum().backward()


@pytest.mark.parametrize("reader", READERS)
def test_named_at_the_first_call_and_refused_at_the_second(reader, tmp_path):
    model = adapted(reader())
    with pytest.warns(ll.LoraLiteWarning, match=r"'q' was never called as a module.*exclude_names=\('q',\)"):
        train(model)
    with pytest.raises(ll.StateError, match=r"'default': 'q' was never called"):
        train(model)
    with pytest.raises(ll.StateError, match="1 of 2 targets got no gradient: 'q'. 'q' was.*learns nothing"):
        ll.check(model)
    with pytest.raises(ll.StateError, match="'q' was never called.*ll.merge"):
        ll.merge(model)
    with pytest.warns(ll.LoraLiteWarning, match="'default': 'q' was never called.*what is saved"):
        ll.save(model, tmp_path / "a")
    ll.detach(model)
    adapted(model, exclude_names=("q",))
    train(model, 3)
    ll.check(model)
    ll.save(model, tmp_path / "a")


@pytest.mark.parametrize("variant", METHODS, ids=lambda v: v.name)
def test_every_method(variant):
    try:
        model = adapted(Reads(), variant, target_roles=(), target_names=("q", "o"))
    except ll.LoraLiteError as e:
        assert "r" in str(e)
        return
    with pytest.warns(ll.LoraLiteWarning, match="'q' was never called"):
        model(X)


def test_in_evaluation_it_is_named_once():
    model = adapted(Reads().eval())
    with torch.no_grad():
        with pytest.warns(ll.LoraLiteWarning, match="'q' was never called"):
            model(X)
        model(X)
    with pytest.raises(ll.StateError, match="'q'"):
        ll.merge(model)


def test_check_says_so_where_nothing_else_is_adapted():
    model = adapted(Reads(), target_names=("q",))
    with pytest.warns(ll.LoraLiteWarning, match="'q'"):
        model(X)
    model(X.clone().requires_grad_()).sum().backward()
    with pytest.raises(ll.StateError, match="'q' was never called as a module"):
        ll.check(model)


def test_a_head_whose_weight_a_fused_loss_reads():
    """Tied or not; the embedding that reads the same tensor is another layer."""

    class LM(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.embed, self.mid, self.lm_head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            if tie:
                self.lm_head.weight = self.embed.weight

        def forward(self, ids):
            h = torch.tanh(self.mid(self.embed(ids)))
            return F.cross_entropy(F.linear(h, self.lm_head.weight).flatten(0, 1), ids.flatten())

    for tie in (False, True):
        model = adapted(LM(tie), target_names=("mid", "lm_head"))
        with pytest.warns(ll.LoraLiteWarning, match="'lm_head' was never called"):
            model(torch.randint(0, 9, (2, 3)))


class Chances(nn.Module):
    """Layers that do not run in every call: a router's experts, a dropped block, a branch of another task."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.other = nn.Linear(8, 8)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        x = x.to(self.other.weight.dtype) + torch.zeros_like(self.other.weight)[0]  # not its values
        x = self.experts[self.step % 2](x)
        for i, block in enumerate(self.blocks):
            if i != self.step % 3:
                x = block(x)
        return x


def test_layers_skipped_by_chance_are_no_errors(tmp_path):
    model = adapted(Chances(), target_names=(".*",), exclude_names=("experts.2", "other"))
    train(model, 6)
    ll.save(model, tmp_path / "a")
    ll.merge(model)


def test_what_never_ran_is_named_at_save(tmp_path):
    model = adapted(Chances(), target_names=(".*",))
    ll.save(model, tmp_path / "before")  # nothing was trained yet
    train(model, 6)
    with pytest.warns(ll.LoraLiteWarning, match=r"'default': 'experts\.2', 'other' never ran.*exclude_names"):
        ll.save(model, tmp_path / "a")


def test_a_tied_embedding_is_not_the_head():
    """The head is not called, and its weight is looked up by the embedding alone."""

    class LM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids, logits: bool = False):
            h = self.mid(self.embed(ids))
            return self.head(h) if logits else h

    model = adapted(LM(), target_names=("mid", "head"))
    ids = torch.randint(0, 9, (2, 3))
    model(ids).sum().backward()
    model(ids, True).sum().backward()


def test_listening_ends_with_the_call():
    """Also with one that fails, which is not counted."""
    from torch.overrides import _get_current_function_mode

    class Fails(Reads):
        def forward(self, x):
            super().forward(x)
            raise ValueError("of the model")

    model = adapted(Fails())
    for _ in range(2):
        with pytest.raises(ValueError, match="of the model"):
            model(X)
        assert _get_current_function_mode() is None
    model.__class__ = Reads
    with pytest.warns(ll.LoraLiteWarning, match="'q'"):
        model(X)
    assert _get_current_function_mode() is None


def test_a_later_adapter_is_listened_to_as_well():
    model = adapted(Reads(), target_names=("o",))
    train(model, 2)
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("q",)), name="second")
    with pytest.warns(ll.LoraLiteWarning, match="'q'"):
        model(X)
    ll.activate(model, "default")
    train(model, 2)  # the one that acts is well
    ll.activate(model, ["default", "second"])
    with pytest.raises(ll.StateError, match="'second': 'q'"):
        train(model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts_say_nothing(backend, tmp_path):
    """Hooks in compiled code cannot note that they ran."""
    torch._dynamo.reset()
    model = adapted(toy())
    model.layers[0] = torch.compile(model.layers[0], backend=backend)
    x = torch.randn(2, 3, 12)
    model.train()
    for _ in range(2):
        model(x).sum().backward()
    ll.save(model, tmp_path / "a")


def scaled(x: Tensor, w: Tensor) -> Tensor:
    return torch.relu(x) * 2 @ w


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_function_that_the_model_compiled_is_called_as_before():
    """Also with fullgraph, which would not take a break in the first call."""

    class Helped(Reads):
        compiled = staticmethod(torch.compile(scaled, backend="eager", fullgraph=True))

        def forward(self, x):
            return self.compiled(self.o(self.q(x)), torch.eye(8))

    torch._dynamo.reset()
    model = adapted(Helped())
    train(model, 3)
    ll.check(model)


def test_after_the_first_calls_nothing_is_watched():
    model = adapted(toy())
    x = torch.randn(2, 3, 12)
    for training in (True, False):
        model.train(training)
        model(x).sum().backward()
    state = model.__dict__["_lora_lite_state"]
    sites = [m.__dict__["_lora_lite_site"] for m in model.modules() if "_lora_lite_site" in m.__dict__]
    assert len(sites) == 4 and not any(site.awaited for site in sites) and state.watch is None
    model.train()(x)
    assert not any(site.awaited for site in sites) and state.watch is None


def test_the_first_calls_of_two_threads():
    """Each listens to its own functions, or to none."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    meet = Barrier(2, timeout=20)

    class Meets(Reads):
        def read(self, x):
            meet.wait()
            y = super().read(x)
            meet.wait()
            return y

    model = adapted(Meets().eval())
    with warnings.catch_warnings(record=True) as said, ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("always")
        a, b = pool.map(model, (X, X))
    assert torch.equal(a, b) and sum("'q' was never called" in str(w.message) for w in said) == 1


def test_an_interrupted_call_is_not_listened_to_for_ever():
    """Ctrl-C passes by the hooks."""
    from torch.overrides import _get_current_function_mode

    class Stopped(Reads):
        def read(self, x):
            raise KeyboardInterrupt

    model = adapted(Stopped())
    with pytest.raises(KeyboardInterrupt):
        model(X)
    model.__class__ = Reads
    with pytest.warns(ll.LoraLiteWarning, match="'q' was never called"):
        model(X)
    assert _get_current_function_mode() is None


# ---- layers that were replaced


def fuse(model: nn.Module) -> None:
    model.layers[0].up, model.layers[0].down = nn.Linear(12, 20), nn.Linear(20, 12)


def swap_block(model: nn.Module) -> None:
    model.layers[1] = toy().layers[1]


def swap_all(model: nn.Module) -> None:
    model.layers = toy().layers


def copied_block(model: nn.Module) -> None:
    """Its adapter belongs to nobody's optimiser."""
    model.layers[1] = copy.deepcopy(model.layers[1])


def deleted(model: nn.Module) -> None:
    model.layers = model.layers[:1]


def quantised(model: nn.Module) -> None:
    for block in model.layers:
        block.up = nn.Sequential(nn.Linear(12, 20))


CONVERSIONS = [fuse, swap_block, swap_all, copied_block, deleted, quantised]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_replaced_layer_raises_in_the_next_call(convert, called, training):
    model = adapted(toy()).train(training)
    x = torch.randn(2, 3, 12)
    if called:
        model(x)
    convert(model)
    for _ in range(2):
        with pytest.raises(
            ll.StateError, match=r"'default': 'layers\.\d\.\w+'.*replaced.*ll.detach\(model, 'default'\)"
        ):
            model(x)
    with ll.active(model, None):
        model(x)  # the bare base is what it is
    ll.detach(model)
    model(x)


@pytest.mark.parametrize("variant", METHODS, ids=lambda v: v.name)
def test_a_replaced_layer_under_every_method(variant):
    model = toy()
    ll.attach(model, variant.config(variant=variant.name, r=4))
    model(torch.randn(2, 3, 12))
    swap_all(model)
    with pytest.raises(ll.StateError, match="replaced"):
        model(torch.randn(2, 3, 12))


def test_only_an_adapter_that_acts_is_missed():
    model = adapted(toy(), target_names=("layers.0.up",))
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("layers.1.up",)), name="second")
    model.layers[0].up = nn.Linear(12, 20)
    model(torch.randn(2, 3, 12))
    for choice in ("default", ["default", "second"]):
        with ll.active(model, choice), pytest.raises(ll.StateError, match="'default': 'layers.0.up' was replaced"):
            model(torch.randn(2, 3, 12))
    with ll.rows(model, ["default", "second"]), pytest.raises(ll.StateError, match="'default'"):
        model(torch.randn(2, 3, 12))


class Wrapper(nn.Module):
    """As checkpoint_wrapper or a sharding unit puts one around a block."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._inner = inner

    def forward(self, *args):
        return self._inner(*args)


def test_a_wrapped_layer_is_still_there():
    model, x = adapted(toy()), torch.randn(2, 3, 12)
    with torch.no_grad():
        for p in ll.adapters(model)["default"].parameters():
            p.normal_()
    want = model(x)
    model.layers[0] = Wrapper(model.layers[0])
    assert torch.equal(model(x), want)
    model.layers[0]._inner.up = nn.Linear(12, 20)
    with pytest.raises(ll.StateError, match="replaced"):
        model(x)


def test_merging_a_packed_layer_and_back_is_no_replacement():
    from lora_lite.testing.toy import FakeQuantLinear

    model, x = adapted(toy(kind=FakeQuantLinear)), torch.randn(2, 3, 12)
    model(x)
    ll.merge(model, dequantize=True)
    model(x)
    ll.unmerge(model)
    model(x)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_watch_their_own_layers(copier):
    model, x = adapted(toy()), torch.randn(2, 3, 12)
    model(x)
    other = copier(model)
    other(x)
    other.layers[0].up = nn.Linear(12, 20)
    with pytest.raises(ll.StateError, match="replaced"):
        other(x)
    model(x)


def test_tools_that_convert_layers_and_copy_hooks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(adapted(Reads().eval(), target_names=("o",)), {nn.Linear})
        with pytest.raises(ll.StateError, match="'o' was replaced.*ll.merge"):
            model(X)


# ---- architectures of which it is known


def _wavlm():
    from transformers import WavLMConfig, WavLMModel

    return WavLMModel(
        WavLMConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8,),
            conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=1,
        )
    ), {"input_values": torch.randn(1, 400)}  # fmt: skip


def _xvector():
    from transformers import Wav2Vec2Config, Wav2Vec2ForXVector

    return Wav2Vec2ForXVector(
        Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8,),
            conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=1, tdnn_dim=(8, 8), tdnn_kernel=(3, 1), tdnn_dilation=(1, 1), xvector_output_dim=6,
        )
    ), {"input_values": torch.randn(1, 400)}  # fmt: skip


def _bloom():
    from transformers import BloomConfig, BloomForCausalLM

    cfg = BloomConfig(vocab_size=20, hidden_size=16, n_layer=2, n_head=2, pretraining_tp=2, slow_but_exact=True)
    return BloomForCausalLM(cfg), {"input_ids": torch.randint(0, 20, (1, 5))}


def _mamba():
    from transformers import MambaConfig, MambaForCausalLM

    cfg = MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(cfg), {"input_ids": torch.randint(0, 20, (1, 5))}


KNOWN = {
    "wavlm": (_wavlm, ("q_proj", "k_proj", "v_proj", "out_proj")),
    "xvector": (_xvector, ("kernel",)),
    "bloom": (_bloom, ("dense", "dense_4h_to_h")),
    "mamba": (_mamba, ("x_proj", "dt_proj")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KNOWN)
def test_known_ones_are_no_default_targets(name):
    make, children = KNOWN[name]
    torch.manual_seed(0)
    model, batch = make()
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    left = {path: why for path, why in plan.unadapted if path.rsplit(".", 1)[-1] in children}
    attention = {path for path in left if "called as a module" in left[path]}
    assert attention and not {t.path for t in plan.targets} & attention
    assert {path.rsplit(".", 1)[-1] for path in attention} == set(children)
    ll.attach(model, ll.LoRAConfig(r=2))
    model.eval()
    for _ in range(2):
        model(**batch)[0].sum().backward()
    ll.check(model)


@pytest.mark.parametrize("name", ["wavlm", "xvector", "bloom"])
def test_a_known_one_that_is_named_is_refused(name):
    make, children = KNOWN[name]
    model, _ = make()
    with pytest.raises(ll.TargetError, match="never called as a module.*exclude_names"):
        ll.plan(model, ll.LoRAConfig(r=2, target_names=children))


class FusedLoss(nn.Module):
    """With labels the head's weight is multiplied by the loss itself; without, the head is called."""

    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x, labels=None):
        h = self.body(x).tanh()
        return self.lm_head(h) if labels is None else F.cross_entropy(h @ self.lm_head.weight.T, labels)


def test_a_call_of_another_form_is_listened_to_as_well():
    """A model that is tried without labels, with a gradient, and then trained with them."""
    model = FusedLoss()
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("body", "lm_head")))
    x, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    model(x).sum().backward()
    model(x, labels=None).sum().backward()
    with pytest.warns(ll.LoraLiteWarning, match="'lm_head' was never called as a module"):
        model(x, labels=labels).backward()
    with pytest.raises(ll.StateError, match="'lm_head' was never called as a module"):
        model(x, labels=labels)
    with pytest.raises(ll.StateError, match=r"ll.merge would change the output"):
        ll.merge(model)


def test_few_forms_of_calls_are_listened_to():
    """A model that is called with names that change at each call pays for the first ones only."""

    class TakesAnything(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(3, 3)

        def forward(self, x, **more):
            return self.up(x)

    model = TakesAnything()
    ll.attach(model, ll.LoRAConfig(r=2))
    state = model.__dict__["_lora_lite_state"]
    for i in range(20):
        model(torch.randn(2, 3), **{f"more{i}": 1})
    assert len(state.unhooked) == 8 and state.watch is None
