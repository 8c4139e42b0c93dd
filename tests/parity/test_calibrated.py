"""Methods that start from data, against PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll


class Net(nn.Module):
    """An odd function of an embedding that is odd in the token, so that all inputs have mean zero: PEFT's EVA centres them."""

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
