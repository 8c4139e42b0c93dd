"""The grouped fast path for low-rank methods equals the segments, single-adapter runs and, for None rows, the base's
bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.runtime.call import grouped


class Flat(nn.Module):
    """Calls its layers with (batch * time, d), as OPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20, bias=False)])

    def forward(self, x: torch.Tensor, flat: bool = False) -> torch.Tensor:
        h = x.reshape(-1, x.shape[-1]) if flat else x
        for layer in self.layers:
            h = h + layer(h).tanh()
        return h.view(x.shape)


def model_with(ranks: list[int]) -> nn.Module:
    torch.manual_seed(0)
    model = Flat().eval()
    for i, r in enumerate(ranks):
        ll.attach(model, ll.LoRAConfig(r=r, alpha=2 * r + 1, target_names=(r"layers\.\d",)), name=f"a{i}")
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.3, generator=g)
    return model


def by_segments(monkeypatch):
    monkeypatch.setattr(
        "lora_lite.runtime.call.hooks.grouped", lambda layer, site, groups, x, y: (x if y is None else y, groups)
    )


ROWS = ["a1", None, "a0", "a2", "a1", None]


@pytest.mark.parametrize("wide", [0, 10_000], ids=["batched", "wide"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_equals_single_runs_and_the_base(monkeypatch, wide, grad, flat):
    monkeypatch.setattr(grouped, "WIDE", wide)
    model = model_with([3, 5, 2])
    x = torch.randn(6, 4, 20)
    with torch.set_grad_enabled(grad):
        alone = {}
        for name in ("a0", "a1", "a2", None):
            with ll.active(model, name):
                alone[name] = model(x, flat)
        for _ in range(2):  # the second call takes kept stacks
            with ll.rows(model, ROWS):
                mixed = model(x, flat)
                mixed = model(x, flat)
            for i, name in enumerate(ROWS):
                if name is None:
                    assert torch.equal(mixed[i], alone[None][i])
                else:
                    torch.testing.assert_close(mixed[i], alone[name][i], atol=2e-6, rtol=0)
                    assert (mixed[i] - alone[None][i]).abs().max() > 1e-2
        with ll.rows(model, ROWS[:3]):  # beams: two rows for each name
            beams = model(x, flat)
        for i in range(6):
            torch.testing.assert_close(beams[i], alone[ROWS[i // 2]][i], atol=2e-6, rtol=0)


@pytest.mark.parametrize("wide", [0, 10_000], ids=["batched", "wide"])
def test_gradients_equal_the_segments(monkeypatch, wide):
    x = torch.randn(6, 4, 20)
    grads = []
    for fast in (True, False):
        monkeypatch.setattr(grouped, "WIDE", wide)
        model = model_with([3, 5, 2])
        for handle in ll.adapters(model).values():
            handle.trainable = True
        if not fast:
            by_segments(monkeypatch)
        with ll.rows(model, ROWS):
            model(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n})
    assert all(g.abs().max() > 0 for g in grads[0].values())
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-4, rtol=1e-4)


def test_a_changed_tensor_is_seen_at_once():
    model = model_with([3, 5])
    x = torch.randn(2, 4, 20)
    with torch.no_grad(), ll.rows(model, ["a0", "a1"]):
        first = model(x)
        model.layers[0].get_parameter("lora_B@a1").mul_(2)
        second = model(x)
        ll.load_adapter_state_dict(model, "a0", {k: v * 3 for k, v in ll.adapter_state_dict(model, "a0").items()})
        third = model(x)
    assert torch.equal(first[0], second[0]) and not torch.allclose(first[1], second[1])
    assert torch.equal(second[1], third[1]) and not torch.allclose(second[0], third[0])


def test_nan_stays_in_its_row():
    model = model_with([3, 5])
    x = torch.randn(3, 4, 20)
    x[1, 2] = float("nan")
    with torch.no_grad(), ll.rows(model, ["a0", "a1", None]):
        y = model(x)
    assert y[0].isfinite().all() and y[2].isfinite().all() and y[1].isnan().any()


FEATURE_WISE = [v for v in ll.variants() if v.by_feature is not None and v.site == "linear"]


def calls(monkeypatch, name):
    """How often the grouped path ran one call for several adapters."""
    seen, real = [], getattr(grouped, name)
    monkeypatch.setattr(grouped, name, lambda *a: seen.append(len(a[2].groups)) or real(*a))
    return seen


def mixed_model(configs, dtype=torch.float32):
    torch.manual_seed(0)
    model = Flat().eval()
    for i, cfg in enumerate(configs):
        ll.attach(model, cfg, name=f"a{i}")
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.3, generator=g)
    for handle in ll.adapters(model).values():
        handle.trainable = True
    return model.to(dtype)


def test_the_feature_wise_methods_are_known():
    assert [v.name for v in FEATURE_WISE] == ["bitfit", "ia3", "ia3_ff", "road"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("variant", FEATURE_WISE, ids=lambda v: v.name)
def test_feature_wise_methods_go_in_one_call(monkeypatch, variant, flat, dtype):
    cfg = variant.config(variant=variant.name, target_names=(r"layers\.\d",))
    x = torch.randn(6, 4, 20, dtype=dtype)
    x[1, 2, 3] = float("inf")  # a row without adapter keeps even this
    outputs, grads = [], []
    for fast in (True, False):
        model = mixed_model([cfg] * 3, dtype)
        seen = calls(monkeypatch, "_by_feature")
        if not fast:
            by_segments(monkeypatch)
        with ll.rows(model, ROWS):
            y = model(x, flat)
            with torch.no_grad():
                kept = [model(x, flat) for _ in range(2)][1]
        with ll.active(model, None):
            assert torch.equal(y[1], model(x, flat)[1])
        torch.testing.assert_close(kept, y, equal_nan=True)
        y[[0, 2, 3, 4, 5]].float().square().sum().backward()
        outputs.append(y.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n})
        assert bool(seen) == fast and set(seen) <= {3}
    tolerance = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(outputs[0], outputs[1], equal_nan=True, **tolerance)
    for name in grads[0]:
        torch.testing.assert_close(
            grads[0][name], grads[1][name], atol=1e-4 if dtype == torch.float32 else 0.5, rtol=0.05
        )


def test_many_methods_in_one_batch_go_by_kin(monkeypatch):
    where = {"target_names": (r"layers\.\d",)}
    configs = [
        ll.LoRAConfig(r=3, alpha=7, **where),
        ll.IA3Config(**where),
        ll.LoRAConfig(r=2, alpha=5, **where),
        ll.IA3Config(**where),
        ll.IA3Config(side="input", **where),
        ll.RoadConfig(group_size=4, **where),
        ll.RoadConfig(group_size=2, **where),
        ll.DoRAConfig(r=2, alpha=3, **where),
    ]
    model = mixed_model(configs)
    rows = [*(f"a{i}" for i in range(8)), None]
    x = torch.randn(9, 4, 20)
    pairs, gates = calls(monkeypatch, "_low_rank"), calls(monkeypatch, "_by_feature")
    with ll.rows(model, rows):
        y = model(x)
    assert set(pairs) == {2} and set(gates) == {2}
    for i, name in enumerate(rows):
        with ll.active(model, name):
            torch.testing.assert_close(y[i], model(x)[i], atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_stacks_last_over_blocks_of_the_same_rows_and_no_longer(monkeypatch):
    model, x, built = model_with([2, 3, 4]), torch.randn(6, 2, 20), []
    page = ll.get_variant("lora").factors
    monkeypatch.setattr(ll.get_variant("lora"), "factors", staticmethod(lambda layer: built.append(1) or page(layer)))
    for slots in (layer._lora_lite_site.slots for layer in model.layers):
        for slot in slots.values():
            slot.factors = ll.get_variant("lora").factors

    def run(rows=ROWS):
        built.clear()
        with ll.rows(model, rows):
            return model(x)

    def alone():
        want = [model(x[i : i + 1]) if name is None else None for i, name in enumerate(ROWS)]
        for i, name in enumerate(ROWS):
            with ll.active(model, name):
                want[i] = model(x[i : i + 1])
        return torch.cat(want)

    first = run()
    assert len(built) == 6
    assert torch.equal(run(), first) and not built
    run(["a0", "a1", "a0", "a2", "a1", None])
    assert built
    assert torch.equal(run(), first) and built
    A = model.layers[0].get_parameter("lora_A@a1")
    A.data = A.data * 2  # of which the tensor's version says nothing
    assert torch.allclose(run(), alone(), atol=1e-5) and not torch.allclose(run(), first, atol=1e-3)
    A.mul_(2)
    assert torch.allclose(run(), alone(), atol=1e-5)
    ll.detach(model, "a1")
    ll.attach(model, ll.LoRAConfig(r=3, alpha=2, target_names=(r"layers\.\d",)), name="a1")
    model.layers[0].get_parameter("lora_B@a1").normal_()
    assert torch.allclose(run(), alone(), atol=1e-5)


class Flattening(nn.Module):
    """Takes (batch, tokens, 20), adapts what it flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(20, 20)

    def forward(self, input_ids):
        return self.up(input_ids.flatten(0, 1)).view_as(input_ids)


def test_groups_that_are_kept_are_those_of_the_same_batch():
    model = Flattening()
    for name in ("a0", "a1"):
        ll.attach(model, ll.LoRAConfig(r=3), name=name)
    with torch.no_grad(), ll.rows(model, ["a0", "a1"]):
        model(torch.randn(2, 3, 20))
        with pytest.raises(ll.SelectionError, match="do not divide"):
            model(torch.randn(3, 2, 20))  # six elements on the layer again
