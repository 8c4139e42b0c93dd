"""Numbers and surroundings that people meet: damaged weights, large ones, other layouts of memory, inference mode,
default devices, 16 bits. A start works, or its error names the layer."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_lite as ll
import lora_lite.runtime.view.layer as staged_view
from lora_lite.testing.case import Case, randomise
from lora_lite.testing.toy import Snapshot, batches

METHODS = [pytest.param(v, id=v.name) for v in ll.variants()]
LAYER = "layers.1.up"


def damaged(case: Case, value: float) -> nn.Module:
    model = case.model()
    with torch.no_grad():
        model.get_submodule(LAYER).weight[3, 4] = value
    return model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return ll.adapter_state_dict(model, "default")


def reads_weight(case: Case) -> bool:
    """Whether its start reads a weight: on a sound model, what reading goes through is called."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged_view, "check_sound", lambda w, *_: seen.append(w) or w)
        case.attach(case.model())
    return bool(seen)


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("-inf"), marks=pytest.mark.slow), 1e30])
@pytest.mark.parametrize("variant", METHODS)
def test_a_bad_number_in_a_weight_is_named_or_does_no_harm(variant, value):
    case = Case(variant)
    model = damaged(case, value)
    before = Snapshot(model)
    try:
        case.attach(model)
    except ll.LoraLiteError as e:
        assert LAYER in str(e) and "linalg" not in str(e)
        assert before.difference(model) == ""
        return
    assert not reads_weight(case), "its start reads the weight"
    assert all(t.isfinite().all() for t in tensors_of(model).values() if t.is_floating_point())
    if value == 1e30 and variant.identity_bound == 0:
        assert torch.equal(model(case.x()), damaged(case, value)(case.x()))


@pytest.mark.parametrize("name", ["pissa", "svft", "corda", "abba"])
def test_large_weights_all_over_are_named_instead_of_decomposed(name):
    case = Case(ll.get_variant(name))
    model = case.model()
    with torch.no_grad():
        model.get_submodule(LAYER).weight.mul_(1e20)
    with pytest.raises(ll.WeightError, match=rf"{LAYER}.* holds numbers up to \d"):
        case.attach(model)


def test_data_that_a_bad_weight_has_spoilt_names_that_weight_and_not_the_layer_behind_it():
    case = Case(ll.get_variant("eva"))
    with pytest.raises(ll.WeightError, match=rf"{LAYER}\.weight holds NaN"):
        case.attach(damaged(case, float("nan")))
    sound = case.model()
    data = batches()
    data[1]["x"][0, 0, 0] = float("nan")
    with pytest.raises(ll.StateError, match="calibration data"):
        ll.attach(sound, case.cfg(), data)


def test_a_bad_number_in_reference_weights_is_named(tmp_path):
    model = Case(ll.get_variant("lora")).model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state[f"{LAYER}.weight"][0, 0] = float("inf")
    save_file(state, tmp_path / "reference.safetensors")
    with pytest.raises(ll.WeightError, match=rf"{LAYER} in the reference: its weight holds infinity"):
        ll.attach(model, ll.LoRAConfig(r=2), reference_weights=tmp_path)


def test_combining_a_diverged_adapter_names_it():
    case = Case(ll.get_variant("lora"))
    model = case.random("a", "b")
    with torch.no_grad():
        next(ll.adapters(model)["b"].parameters())[0, 0] = float("nan")
    with pytest.raises(ll.StateError, match="'b' has values that are not finite at layers.0.up"):
        ll.combine(model, {"a": 0.5, "b": 0.5}, name="c", rank=2)


def test_delora_on_large_weights():
    """Squares of the column norms leave fp32, and the norms themselves fp16; neither stands in the update."""
    model = Case(ll.get_variant("delora")).model()
    with torch.no_grad():
        model.get_submodule(LAYER).weight.mul_(1e25)
    x = torch.randn(3, 5, 12)
    bare = model(x)
    ll.attach(model, ll.DeLoRAConfig(r=3))
    assert torch.equal(model(x), bare)
    exact = model.get_submodule(LAYER).weight.double().norm(dim=0)
    assert torch.allclose(model.get_submodule(LAYER).lora_w.double(), exact, rtol=1e-6)

    half = Case(ll.get_variant("delora"), torch.float16)
    model = half.model()
    model.get_submodule(LAYER).weight.data.fill_(40000.0)
    x = half.x() * 1e-6
    bare = model(x)
    half.attach(model)
    assert bool(bare.isfinite().all()) and float(model.get_submodule(LAYER).lora_w.max()) > 65504
    assert torch.equal(model(x), bare)


def test_dora_on_large_weights_keeps_the_lengths_of_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(1e20)  # a row's squared length leaves fp32
    W = model[0].weight.detach().double().clone()
    ll.attach(model, ll.DoRAConfig(r=2, alpha=3))
    with torch.no_grad():
        model[0].lora_B.normal_().mul_(3e17)
    V = W + 1.5 * (model[0].lora_B.double() @ model[0].lora_A.double()).detach()
    x = torch.randn(5, 6)
    want = x.double() @ (V * (W.norm(dim=1) / V.norm(dim=1))[:, None]).T
    size = float(want.abs().max())
    assert float((x.double() @ V.T - want).abs().max()) > 1e-3 * size
    assert torch.allclose(model(x).double(), want, rtol=0, atol=1e-5 * size)


# ---- shapes of inputs


@pytest.mark.parametrize("variant", [p for p in METHODS if Case(p.values[0]).linear])
def test_one_vector_is_a_batch_of_one_forward_and_backward(variant):
    case = Case(variant)
    found = []
    for one in (case.x(1), case.x(1)[0]):
        model = case.random()
        x = one.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append([y.flatten(), x.grad.flatten(), *(p.grad for p in ll.adapters(model)["default"].parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and torch.allclose(a, b, atol=1e-5, rtol=1e-4))


@pytest.mark.parametrize("group_size", [2, 4, 64])
def test_groups_of_pairs_of_one_vector(group_size):
    torch.manual_seed(0)
    found = []
    for shape in ((1, 6), (6,)):
        model = nn.Sequential(nn.Linear(6, 11))
        torch.manual_seed(1)
        nn.init.normal_(model[0].weight)
        nn.init.normal_(model[0].bias)
        ll.attach(model, ll.RoadConfig(group_size=group_size))
        randomise(model)
        model(torch.linspace(-1, 1, 6).view(shape)).square().sum().backward()
        found.append([p.grad for p in ll.adapters(model)["default"].parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5) and bool(a.any())


@pytest.mark.parametrize("variant", METHODS)
def test_no_rows_and_no_tokens(variant):
    case = Case(variant)
    try:
        case.model()(torch.zeros(3, 0, 12))
    except Exception:
        pytest.skip("the bare model does not take them")
    model = case.random()
    assert model(torch.zeros(0, 5, 12)).shape == (0, 5, 12)
    assert model(torch.zeros(3, 0, 12)).shape == (3, 0, 12)


# ---- layouts of memory


class Flat(nn.Module):
    """A convolution whose output is looked at as rows, as its contiguous memory allows."""

    def __init__(self, n: int):
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n]
        self.conv, self.head = kind(3, 4, 3, padding=1), nn.Linear(4 * 5**n, 2)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_convolutions_output_keeps_its_strides(n):
    torch.manual_seed(0)
    model, x = Flat(n), torch.randn(2, 3, *[5] * n)
    bare, strides = model(x), model.conv(x).stride()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=3, target_kinds=("conv",)))
    assert model.conv(x).stride() == strides
    assert torch.equal(model(x), bare)
    randomise(model)
    model(x).sum().backward()
    dense = model.conv.weight + 1.5 * (model.conv.lora_B @ model.conv.lora_A).view_as(model.conv.weight)
    with torch.no_grad():
        adapted, model.conv.weight.data = model(x), dense.data
        with ll.active(model, None):
            assert torch.allclose(model(x), adapted, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("names", [("lora", "dora", "loha"), pytest.param(None, marks=pytest.mark.slow)])
def test_a_fresh_adapter_is_the_identity_on_a_resnet_to_the_bit(names, layout):
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    small = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck")
    model = ResNetModel(small).eval().to(memory_format=layout)
    x = torch.randn(2, 3, 24, 24).to(memory_format=layout)
    with torch.no_grad():
        bare, seen = model(x).last_hidden_state, 0
        for variant in ll.variants() if names is None else map(ll.get_variant, names):
            try:
                ll.attach(model, variant.config(variant=variant.name, r=2, alpha=3.0, target_kinds=("conv",)))
            except ll.LoraLiteError:
                continue
            y = model(x).last_hidden_state
            assert y.stride() == bare.stride(), variant.name
            assert torch.equal(y, bare) or variant.identity_bound > 0, variant.name
            ll.detach(model)
            seen += 1
    assert seen > (20 if names is None else 2)


# ---- layers of other people


class AddsItsBias(nn.Module):
    """A linear layer that adds `self.bias` without asking whether there is one."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.randn(d_out, d_in) * d_in**-0.5)
        self.bias = nn.Parameter(torch.randn(d_out) * 0.3)

    def forward(self, x):
        return x @ self.weight.T + self.bias.to(x.dtype)


@pytest.mark.parametrize("variant", [p for p in METHODS if Case(p.values[0]).linear])
def test_layers_whose_forward_reads_their_bias(variant):
    case = Case(variant)
    model = case.model(kind=AddsItsBias)
    bias = model.layers[0].up.bias
    case.attach(model)
    randomise(model)
    want = model(case.x())
    if case.affine:
        ll.merge(model, dequantize=True)
        assert torch.allclose(model(case.x()), want, atol=1e-4)
        ll.unmerge(model)
    assert model.layers[0].up.bias is bias and torch.equal(model(case.x()), want)


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    small = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [1, 2, 2]}
    return SwinModel(SwinConfig(window_size=2, **small)).eval()


class Towers(nn.Module):
    """Two stacks of blocks, of widths 8 and 12, as a model that sees and reads has them."""

    def __init__(self):
        super().__init__()
        self.vision, self.text = nn.Module(), nn.Module()
        self.vision.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(2))
        self.text.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 12)) for _ in range(3))
        self.join = nn.Linear(8, 12)

    def forward(self, x):
        for block in self.vision.blocks:
            x = x + block(x)
        x = self.join(x)
        for block in self.text.layers:
            x = x + block(x)
        return x


@pytest.mark.parametrize("name", ["loreft", "noreft", "direft"])
@pytest.mark.parametrize("make, x, widths", [(swin, (2, 3, 16, 16), {8, 16, 32}), (Towers, (2, 5, 8), {8, 12})])
def test_reft_on_stages_of_other_widths(name, make, x, widths, tmp_path):
    torch.manual_seed(0)
    model, x = make(), torch.randn(x)

    def run():
        with torch.no_grad():
            y = model(x)
        return getattr(y, "last_hidden_state", y)

    bare = run()
    variant = ll.get_variant(name)
    adapter = ll.attach(model, variant.config(variant=name, r=2, alpha=3.0, positions="all"))
    assert {t.d_out for t in adapter.record.targets.values()} == widths
    assert torch.equal(run(), bare)
    randomise(model)
    want = run()
    assert not torch.allclose(want, bare, atol=1e-3)
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(run(), want)


def test_a_block_whose_stream_is_not_as_wide_as_its_layers_say_is_named():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.cat((x, self.b(self.a(x)))).unflatten(0, (2, -1)).movedim(0, -2).flatten(-2)

    model = nn.Module()
    model.layers = nn.ModuleList([Doubles(), Doubles()])
    model.forward = lambda x: model.layers[0](x)
    ll.attach(model, ll.LoReFTConfig(r=2, positions="all"))
    with pytest.raises(ll.SelectionError, match=r"layers\.0.*16 features.*for 8"):
        model(torch.randn(2, 5, 8))


# ---- surroundings


@contextmanager
def default_dtype(dtype):
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def all_at_once():
    with torch.inference_mode(), torch.device("meta"), default_dtype(torch.bfloat16), torch.autocast("cpu"):
        yield


SURROUNDINGS = {
    "all": all_at_once,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "device": lambda: torch.device("meta"),
    "default_device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


WHERE = [w if w == "all" else pytest.param(w, marks=pytest.mark.slow) for w in SURROUNDINGS]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("variant", METHODS)
def test_attaching_does_not_depend_on_where_it_is_called(variant, where):
    case, data = Case(variant), None
    if variant.needs_data:
        data = case.data(case.dtype)
    want = case.model()
    cfg = case.cfg()
    ll.attach(want, cfg, data)
    model = case.model()
    with SURROUNDINGS[where]():
        adapter = ll.attach(model, cfg, data)
    for key, t in tensors_of(want).items():
        got = tensors_of(model)[key]
        assert got.dtype == t.dtype and not got.is_inference()
        if where in ("all", "autocast") and variant.needs_data:  # the model runs as the caller runs it
            assert got.shape == t.shape
        else:
            assert torch.equal(got, t), key
    parameters = list(adapter.parameters())
    if parameters:
        model.train()
        optimizer = torch.optim.AdamW(parameters)
        if variant.on_step is not None:
            ll.schedule(model, optimizer, 10)
        model(**batches()[0]).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("where", [w for w in WHERE if w != "all"])
@pytest.mark.parametrize("variant", METHODS)
def test_other_verbs_do_not_either(variant, where, tmp_path):
    check_other_verbs(Case(variant), SURROUNDINGS[where], tmp_path, where == "autocast")


@pytest.mark.parametrize("name", ["lora", "dora", "mora", "shira", "loreft", "oft"])
def test_some_methods_in_inference_mode_on_another_device(name, tmp_path):
    @contextmanager
    def around():
        with torch.inference_mode(), torch.device("meta"):
            yield

    check_other_verbs(Case(ll.get_variant(name)), around, tmp_path)


def check_other_verbs(case: Case, around, tmp_path, rounds=False) -> None:
    """Run, save, load, export and merge inside of some surroundings, and look from outside."""
    variant, model, x = case.variant, case.random(), case.x()
    rows = ["default", None, "default"]
    want = model(x)
    with ll.rows(model, rows):
        mixed = model(x)
    with around():
        assert rounds or torch.equal(model(x), want)
        with ll.rows(model, rows):
            assert rounds or torch.equal(model(x), mixed)
        ll.save(model, tmp_path / "a.safetensors")
        state = ll.adapter_state_dict(model)
        ll.load_adapter_state_dict(model, "default", state)
        if variant.factors is not None:
            ll.export(model, tmp_path / "peft")
    other = case.model()
    with around():
        loaded = ll.load(other, tmp_path / "a.safetensors", trainable=True)
    assert torch.equal(other(x), want)
    if list(loaded.parameters()) and variant.on_step is None:
        other.train()
        other(**batches()[0]).loss.backward()
    if case.affine:
        with around():
            ll.merge(model)
        assert torch.allclose(model(x), want, atol=1e-4)
        with around():
            ll.unmerge(model)
        assert torch.equal(model(x), want)


def test_a_model_made_in_inference_mode_cannot_train_and_says_so(tmp_path):
    ll.save(Case(ll.get_variant("lora")).random(), tmp_path / "a.safetensors")
    with torch.inference_mode():
        model = Case(ll.get_variant("lora")).model()
    for attempt in (
        lambda: ll.attach(model, ll.LoRAConfig(r=2)),
        lambda: ll.load(model, tmp_path / "a.safetensors", trainable=True),
    ):
        with pytest.raises(ll.StateError, match=r"made inside torch\.inference_mode.* outside of inference_mode"):
            attempt()
    assert not ll.adapters(model)
    ll.load(model, tmp_path / "a.safetensors")
    with torch.inference_mode():
        model(torch.randn(2, 3, 12))
    ll.adapters(model)["default"].trainable = False
    with pytest.raises(ll.StateError, match="inference_mode"):
        ll.adapters(model)["default"].trainable = True


# ---- 16 bits


def moved(variant, dtype, steps=50, lr=2.5e-5) -> torch.Tensor | None:
    """Which elements of the trained tensors AdamW moves on a base of this dtype."""
    case = Case(variant, dtype)
    model = case.model()
    adapter = case.attach(model)
    parameters = list(adapter.parameters())
    if not parameters:
        return None
    assert all(p.dtype == torch.float32 for p in parameters)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=lr))
    if variant.on_step is not None:
        ll.schedule(model, optimizer, 100 * steps)
    model.train()
    data = batches(dtype)
    for i in range(steps):
        optimizer.zero_grad()
        model(**data[i % len(data)]).loss.backward()
        optimizer.step()
    return torch.cat([(a != b).flatten() for a, b in zip(adapter.parameters(), before, strict=True)])


QUICK = ("lora", "dora")


@pytest.mark.parametrize(
    "variant",
    [p if p.id in QUICK else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in METHODS],
)
def test_small_steps_move_adapters_of_16_bit_bases(variant):
    """Of the elements that a base in fp32 would let move: a method whose pages pick few of its numbers trains those."""
    full = moved(variant, torch.float32)
    if full is None:
        return
    half = moved(variant, torch.float16)
    assert half is not None and bool(full.any())
    assert float(half[full].float().mean()) >= 0.99
    if variant.name in QUICK:
        assert float(half.float().mean()) >= 0.99


def test_surroundings_are_as_before_after_an_error():
    case = Case(ll.get_variant("pissa"))
    model = damaged(case, float("nan"))
    with torch.device("meta"), pytest.raises(ll.WeightError):
        ll.attach(model, case.cfg())
    with torch.device("meta"):
        with pytest.raises(ll.WeightError):
            ll.attach(model, case.cfg())
        assert torch.empty(0).is_meta
    assert torch.empty(0).device.type == "cpu"
