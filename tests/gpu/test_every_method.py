"""Every registered method on a CUDA device: it computes what it computes on the CPU, starts alike, trains, merges, and
its files go from one to the other.

A tensor that a page makes itself (an identity, a mask, indices) and forgets to put beside the weight is found here.
"""

from __future__ import annotations

import copy

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.case import Case, randomise
from lora_lite.testing.toy import batches
from methods import every_method, merges, trains

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
EXACT = 1e-4
"""Of a tensor's largest entry: fp32 on two devices, sums in another order."""


@pytest.fixture(autouse=True)
def _full_fp32():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def moved(data):
    """Calibration data, or any nest of tensors, on the device."""
    if isinstance(data, torch.Tensor):
        return data.to(DEVICE)
    if isinstance(data, dict):
        return {k: moved(v) for k, v in data.items()}
    return type(data)(moved(v) for v in data)


def attached(case: Case, name: str = "default"):
    """The toy on the device, adapted there."""
    model = case.model().to(DEVICE)
    data = moved(case.data(case.dtype)) if case.variant.needs_data else None
    ll.attach(model, case.cfg(), data, name=name)
    return model


def both(case: Case):
    """(CPU model, the same on the device): attached and filled on the CPU, then moved."""
    here = case.random()
    return here, copy.deepcopy(here).to(DEVICE)


def outputs(model, case: Case):
    """The output and the gradients of the input and of every trained tensor."""
    device = next(model.parameters()).device
    x = case.x(3, 5).to(device).requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, y.numel(), device=device, dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), [x, *trained], allow_unused=True)
    return [y, *grads]


def same(a, b, share=EXACT):
    """Tensors differ by at most `share` of the largest entry."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            largest = float(one.detach().double().abs().max()) if one.numel() else 0.0
            torch.testing.assert_close(other.cpu(), one.cpu(), rtol=0, atol=share * largest + 1e-7)


@every_method()
def test_a_moved_adapter_computes_the_same(case):
    here, there = both(case)
    assert {p.device.type for p in there.parameters()} == {DEVICE}
    same(outputs(here, case), outputs(there, case))


@every_method()
def test_it_starts_there_as_it_starts_here(case):
    """The same seed gives the same tensors, and what is computed from the weight or from data gives the same
    function."""
    here, there = case.fresh(), attached(case)
    with torch.no_grad():
        same([here(case.x())], [there(case.x().to(DEVICE))], share=1e-3)
    if not case.variant.needs_weight and not case.variant.needs_data:
        expected = {k: v for k, v in here.state_dict().items() if "lora_" in k}
        got = {k: v for k, v in there.state_dict().items() if "lora_" in k}
        assert list(expected) == list(got)
        same(list(expected.values()), list(got.values()))
    randomise(there)
    assert torch.isfinite(there(case.x().to(DEVICE))).all()


@every_method(trains)
def test_it_trains_there(case):
    model = attached(case)
    handle = ll.adapters(model)["default"]
    optimizer = torch.optim.AdamW(handle.param_groups(lr=1e-2))
    if case.variant.on_step is not None:
        ll.schedule(model, optimizer, 4)
    frozen = {k: v.clone() for k, v in model.named_parameters() if not v.requires_grad}
    losses = []
    for _ in range(4):
        batch = moved(batches(case.dtype, 1)[0])
        loss = model(**batch).loss
        (loss + ll.penalty(model) if case.variant.penalty is not None else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses
    for name, p in model.named_parameters():
        if name in frozen and "lora_" not in name:
            assert torch.equal(p, frozen[name]), name


@every_method(merges)
def test_it_merges_there(case):
    _, model = both(case)
    x = case.x().to(DEVICE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        ll.merge(model)
        same([expected], [model(x)])
        ll.unmerge(model)
    for name, tensor in model.state_dict().items():
        assert tensor.is_cuda and torch.equal(tensor, before[name]), name


@every_method()
def test_its_file_is_written_there_and_read_here(case, tmp_path):
    _, model = both(case)
    path = ll.save(model, tmp_path / "a.safetensors")
    x = case.x()
    fresh = case.model()
    ll.load(fresh, path)
    back = case.model().to(DEVICE)
    ll.load(back, path)
    assert {p.device.type for p in back.parameters()} == {DEVICE}
    with torch.no_grad():
        expected = [model(x.to(DEVICE))]
        same(expected, [fresh(x)])
        same(expected, [back(x.to(DEVICE))], share=1e-6)


@every_method()
def test_rows_of_two_adapters(case):
    here = case.random("a", "b")
    there = copy.deepcopy(here).to(DEVICE)
    names = ["a", None, "b"]
    with torch.no_grad(), ll.rows(here, names):
        expected = here(case.x(3, 5))
    with torch.no_grad(), ll.rows(there, names):
        same([expected], [there(case.x(3, 5).to(DEVICE))])


@every_method(dtype=torch.bfloat16)
def test_bf16(case):
    """Against the CPU's bf16, to a few roundings; and nothing turns into fp32 on the way out."""
    here, there = both(case)
    with torch.no_grad():
        a, b = here(case.x()), there(case.x().to(DEVICE))
    assert b.dtype == torch.bfloat16
    same([a.float()], [b.float()], share=5e-2)


@every_method()
def test_under_autocast(case):
    """fp32 weights with autocast to bf16 are near the plain fp32 result."""
    _, model = both(case)
    x = case.x().to(DEVICE)
    with torch.no_grad():
        plain = model(x)
        with torch.autocast(DEVICE, torch.bfloat16):
            cast = model(x)
    error = (cast.float() - plain).abs().max() / plain.abs().max()
    assert error < 0.05, f"{float(error):.3f} of the largest output"
