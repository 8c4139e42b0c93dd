"""Methods that start from data, against PEFT."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll


class Net(nn.Module):
    """An odd function of an embedding that is odd in the token, so that all inputs have mean zero: PEFT's EVA centres
    them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 20)
        self.fc1, self.fc2 = nn.Linear(20, 12, bias=False), nn.Linear(12, 15, bias=False)
        with torch.no_grad():
            self.embed.weight.mul_(torch.logspace(0.5, -1, 20))  # gaps between the singular values
            self.fc1.weight.mul_(torch.logspace(0.5, -1, 12)[:, None])
            self.embed.weight[32:] = -self.embed.weight[:32].flip(0)
        self.config = type("C", (), {"to_dict": lambda self: {}, "model_type": "net"})()

    def forward(self, input_ids, **_):
        return self.fc2(torch.tanh(self.fc1(self.embed(input_ids))))


def net_and_data():
    torch.manual_seed(2)
    ids = torch.randint(0, 32, (4, 10, 6))
    return Net(), [{"input_ids": torch.cat((i, 63 - i))} for i in ids]


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_spans_the_same_subspace(rho):
    model, data = net_and_data()
    config = peft.LoraConfig(
        r=3,
        target_modules=["fc1", "fc2"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, use_label_mask=False, tau=0.9999),
        lora_alpha=7,
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
    # their incremental decomposition is exact only when one batch holds everything
    all_ids = {"input_ids": torch.cat([b["input_ids"] for b in data])}
    peft.initialize_lora_eva_weights(theirs, [all_ids] * 2, show_progress_bar=False)
    handle = ll.attach(model, ll.EVAConfig(r=3, alpha=7, rho=rho), data)
    for path, target in handle.record.targets.items():
        A = theirs.base_model.model.get_submodule(path).lora_A["default"].weight
        mine = model.get_submodule(path).lora_A
        assert A.shape == mine.shape and target.cfg.r == A.shape[0]
        assert (
            torch.linalg.svdvals(nn.functional.normalize(A, dim=1) @ mine.mT).min() > 1 - 1e-3
        )  # their decomposition is randomised
        scale = theirs.base_model.model.get_submodule(path).scaling["default"]
        assert target.cfg.scale == pytest.approx(scale) == pytest.approx(7 / 3)


class Loss(nn.Module):
    """Two layers and a loss, in the shape of a model with labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.fc1, self.fc2 = nn.Linear(20, 14), nn.Linear(14, 15, bias=False)
        self.config = type("C", (), {"to_dict": lambda self: {}, "model_type": "net"})()

    def forward(self, x, target=None, **_):
        out = self.fc2(torch.tanh(self.fc1(x)))
        loss = None if target is None else ((out - target) ** 2).mean()
        return type("Out", (), {"loss": loss, "logits": out})()


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return {"x": torch.randn(1, 40, 20, generator=g), "target": torch.randn(1, 40, 15, generator=g)}


def corda_of_peft(monkeypatch, mode):
    monkeypatch.setitem(
        sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass)
    )  # all it asks of it
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, config = (
        Loss(),
        peft.LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=["fc1", "fc2"],
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=mode),
        ),
    )

    def run() -> None:
        model(**batch())

    preprocess_corda(model, config, run_model=run)
    return peft.get_peft_model(model, config)


def lora_ga_of_peft():
    from peft.tuners.lora.loraga import preprocess_loraga

    model, config = (
        Loss(),
        peft.LoraConfig(
            r=3,
            lora_alpha=7,
            use_rslora=True,
            target_modules=["fc1", "fc2"],
            init_lora_weights="lora_ga",
            lora_ga_config=peft.LoraGAConfig(stable_gamma=16),
        ),
    )

    def step() -> None:
        model(**{**batch(), "x": batch()["x"].requires_grad_()}).loss.backward()

    preprocess_loraga(model, config, step)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_from_the_same_components(monkeypatch, mode):
    theirs, model = corda_of_peft(monkeypatch, mode), Loss()
    ll.attach(model, ll.CorDAConfig(r=3, alpha=7, mode=mode), [batch()])
    for path in ("fc1", "fc2"):
        layer, peft_layer = model.get_submodule(path), theirs.base_model.model.get_submodule(path)
        want = peft_layer.lora_B["default"].weight @ peft_layer.lora_A["default"].weight
        # the product: PEFT's normalisation of x only moves a factor between A and B
        torch.testing.assert_close(layer.lora_B0 @ layer.lora_A0, want, atol=2e-5, rtol=1e-3)


def test_lora_ga_starts_from_the_same_directions():
    theirs, model = lora_ga_of_peft(), Loss()
    ll.attach(model, ll.LoRAGAConfig(r=3, alpha=7), [batch()])
    for path in ("fc1", "fc2"):
        layer, peft_layer = model.get_submodule(path), theirs.base_model.model.get_submodule(path)
        for mine, other in (
            (layer.lora_A0, peft_layer.lora_A["default"].weight),
            (layer.lora_B0.mT, peft_layer.lora_B["default"].weight.mT),  # PEFT multiplies these by singular values
        ):
            cosines = nn.functional.cosine_similarity(mine, other.detach(), dim=1).abs()
            assert cosines.min() > 1 - 1e-4


@pytest.mark.parametrize("config", [ll.CorDAConfig, ll.LoRAGAConfig])
def test_the_deviation_is_lora_on_the_rewritten_weight(config):
    model, theirs = Loss(), Loss()
    handle = ll.attach(model, config(r=3, alpha=7), [batch()])
    s = next(iter(handle.record.targets.values())).cfg.scale
    rslora = config is ll.LoRAGAConfig
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, target_modules=["fc1", "fc2"])
    )
    pairs = []
    for path in ("fc1", "fc2"):
        layer, other = model.get_submodule(path), theirs.base_model.model.get_submodule(path)
        for short in ("A", "B"):
            p = getattr(layer, f"lora_{short}")
            nn.init.normal_(p, std=0.1)
            q = getattr(other, f"lora_{short}")["default"].weight
            with torch.no_grad():
                q.copy_(getattr(layer, f"lora_{short}0") + p)
            pairs.append((p, q))
        with torch.no_grad():
            other.base_layer.weight -= s * layer.lora_B0 @ layer.lora_A0
    mine, other = model(**batch()), theirs(**batch())
    torch.testing.assert_close(mine.logits, other.logits, atol=1e-5, rtol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
