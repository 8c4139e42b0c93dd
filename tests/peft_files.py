"""Configurations of PEFT's on one small network: saved by PEFT from random tensors, they must act here as there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll

try:
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
except ImportError:
    pytest.skip(f"PEFT {peft.__version__} has fewer types", allow_module_level=True)

IDS = torch.arange(21).view(3, 7) * 5 % 31
FC = ["fc1", "fc2"]


class Net(nn.Module):
    """An embedding, a convolution, linear layers with and without a bias, one that stores its weight transposed, and a
    norm."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "net"}
        self.emb, self.conv = nn.Embedding(31, 12), nn.Conv1d(12, 10, 3)
        self.fc1, self.fc2 = nn.Linear(10, 16), nn.Linear(16, 6, bias=False)
        self.turned, self.norm = Conv1D(8, 6), nn.LayerNorm(8)
        self.square, self.score = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.conv(self.emb(input_ids).mT).mT
        x = self.norm(self.turned(self.fc2(self.fc1(x).tanh())))
        return self.score(self.square(x).tanh())

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def get_output_embeddings(self) -> None:
        return None


Make = Callable[[], peft.PeftConfig]


def lora(**options: Any) -> Make:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": FC, **options})


def config(name: str, **options: Any) -> Make:
    return lambda: getattr(peft, name)(**{"target_modules": FC, **options})


OFT = {"r": 0, "oft_block_size": 2}
NO_SERIES = {**OFT, "use_cayley_neumann": False}
CASES: dict[str, Make] = {
    "LORA": lora(),
    "LORA rslora": lora(use_rslora=True),
    "LORA ranks": lora(rank_pattern={"fc1": 3, "^fc2$": 2}, alpha_pattern={"fc.*1": 9, "fc2": 5}),
    "LORA regular expression": lora(target_modules=r"(fc|tur)\w*"),
    "LORA embedding": lora(target_modules=["emb"]),
    "LORA convolution": lora(target_modules=["conv", "fc1"]),
    "LORA transposed": lora(target_modules=["turned"], fan_in_fan_out=True),
    "LORA all layers": lora(target_modules=["emb", "conv", "turned", "square"]),
    "LORA bias": lora(bias="all"),
    "LORA bias of B": lora(lora_bias=True),
    "LORA classification": lora(task_type="SEQ_CLS"),
    "LORA modules": lora(modules_to_save=["norm", "emb", "turned"]),
    "LORA token rows": lora(trainable_token_indices={"emb": [3, 11, 7]}),
    "LORA parameters": lora(target_modules=["fc1"], target_parameters=["square.weight"]),
    "LORA parameters transposed": lora(target_modules=["fc1"], target_parameters=["turned.weight"]),
    "LORA start": lora(init_lora_weights="orthogonal"),
    "LORA mica": lora(init_lora_weights="mica"),
    "LORA velora": lora(velora_config=VeloraConfig(num_groups=2, init_type="random")),
    "DoRA": lora(use_dora=True),
    "DoRA other layers": lora(use_dora=True, target_modules=["emb", "conv", "turned"]),
    "KaSA": lora(kasa_config=KasaConfig()),
    "BD-LoRA": lora(use_bdlora=BdLoraConfig(target_modules_bd_a=["fc1"], target_modules_bd_b=["fc2"], nblocks=2)),
    "ADALORA": config("AdaLoraConfig", init_r=5, lora_alpha=7, total_step=9),
    "TRAINABLE_TOKENS": config("TrainableTokensConfig", token_indices=[2, 30, 9], target_modules=["emb"]),
    "IA3": config("IA3Config", feedforward_modules=["fc2"]),
    "IA3 other layers": config("IA3Config", target_modules=["turned", "square"], feedforward_modules=["square"]),
    "BEFT": config("BeftConfig"),
    "LN_TUNING": config("LNTuningConfig", target_modules=["norm"]),
    "LN_TUNING layer": config("LNTuningConfig", target_modules=["fc1"]),
    "OFT": config("OFTConfig", **OFT),
    "OFT exact": config("OFTConfig", **NO_SERIES),
    "OFT shared block": config("OFTConfig", block_share=True, **NO_SERIES),
    "OFT bounded": config("OFTConfig", coft=True, eps=0.3, **NO_SERIES),
    "OFT embedding": config("OFTConfig", target_modules=["emb"], **OFT),
    "OFT wide blocks": config("OFTConfig", r=2, oft_block_size=0),
    "BOFT": config("BOFTConfig", boft_block_size=2),
    "BOFT odd blocks": config("BOFTConfig", boft_block_size=5, target_modules=["fc1"]),
    "BOFT gains": config("BOFTConfig", boft_block_size=4, target_modules=["fc2", "square"]),
    "HRA": config("HRAConfig", r=4),
    "HRA odd": config("HRAConfig", r=3),
    "HRA orthogonal": config("HRAConfig", r=4, apply_GS=True),
    "ROAD": config("RoadConfig", group_size=2),
    "ROAD 2": config("RoadConfig", variant="road_2", group_size=4, target_modules=["fc1", "square"]),
    "ROAD 4": config("RoadConfig", variant="road_4", group_size=8, target_modules=["fc1", "square"]),
    "PSOFT": config("PsoftConfig", r=4, psoft_alpha=4),
    "PSOFT lowrank": config("PsoftConfig", r=4, psoft_alpha=4, psoft_svd="lowrank", psoft_svd_lowrank_niter=8),
    "PSOFT series": config("PsoftConfig", r=4, psoft_alpha=4, use_cayley_neumann=True),
    "PSOFT roots": config("PsoftConfig", r=4, psoft_alpha=4, ab_svd_init="pissa_init"),
    "PSOFT any matrix": config(
        "PsoftConfig", r=4, psoft_alpha=4, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False
    ),
    "LOHA": config("LoHaConfig", r=3, alpha=7),
    "LOHA convolution": config("LoHaConfig", r=3, alpha=7, target_modules=["conv"], use_effective_conv2d=True),
    "LOHA ranks": config("LoHaConfig", r=3, alpha=7, rank_pattern={"fc2": 2}, alpha_pattern={"fc2": 5}),
    "LOKR": config("LoKrConfig", r=1, alpha=3),
    "LOKR both": config("LoKrConfig", r=1, alpha=3, decompose_both=True, decompose_factor=2),
    "LOKR convolution": config("LoKrConfig", r=2, alpha=3, target_modules=["conv"]),
    "MISS": config("MissConfig", r=4),
    "MISS bat": config("MissConfig", r=2, init_weights="bat"),
    "MISS mini": config("MissConfig", r=4, mini_r=2, init_weights="mini"),
    "GRALORA": config("GraloraConfig", r=6, alpha=9, gralora_k=2),
    "GRALORA hybrid": config("GraloraConfig", r=4, alpha=9, gralora_k=2, hybrid_r=2),
    "C3A": config("C3AConfig", block_size=2, init_weights=True),
    "SHIRA": config("ShiraConfig", r=2),
    "FOURIERFT": config("FourierFTConfig", n_frequency=40, init_weights=True, scaling=60),
    "WAVEFT": config("WaveFTConfig", n_frequency=40),
    "WAVEFT db2": config("WaveFTConfig", n_frequency=40, wavelet_family="db2", target_modules=["fc1", "square"]),
    "WAVEFT plain": config("WaveFTConfig", n_frequency=40, use_idwt=False),
    "DELORA": config("DeloraConfig", r=4, delora_lambda=5),
    "DEFT": config("DeftConfig", r=4, alpha=6, decomposition_method="relu"),
    "DEFT qr": config("DeftConfig", r=4, decomposition_method="qr"),
    "DEFT para": config("DeftConfig", r=4, para=True, decomposition_method="qr"),
    "VERA": config("VeraConfig", r=5, d_initial=0.3),
    "PVERA": config("PveraConfig", r=5, d_initial=0.3),
    "VBLORA": config("VBLoRAConfig", r=3, vector_length=2, num_vectors=7, topk=3),
    "TINYLORA": config("TinyLoraConfig", r=2, u=5),
    "TINYLORA tied": config("TinyLoraConfig", r=2, u=5, weight_tying=1.0, target_modules=["fc1", "fc2", "emb"]),
    "RANDLORA": config("RandLoraConfig", r=3, randlora_alpha=5),
    "HIRA": config("HiraConfig", r=3),
    "HIRA other layers": config("HiraConfig", r=3, target_modules=["emb", "conv", "turned"]),
    "GLORA": config("GloraConfig", r=3),
    "SUPERTUNING": config("SupertuningConfig", sparsity=0.5),
    "SUPERTUNING LoRA": config("SupertuningConfig", sparsity=0.5, r=2),
    "OSF": config("OSFConfig", effective_rank=3),
    "FROD": config("FrodConfig"),
    "VERA other layers": config("VeraConfig", r=5, target_modules=["fc1", "turned"], bias="all"),
    "VBLORA best alone": config("VBLoRAConfig", r=3, vector_length=2, num_vectors=7, save_only_topk_weights=True),
    "PEANUT": config("PeanutConfig", r=3, scaling=2.5),
    "PEANUT deep": config("PeanutConfig", r=3, depth=2, act_fn="tanh", scaling=2.5),
    "UNILORA": config("UniLoraConfig", r=3, theta_d_length=37),
}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def saved(case: str, folder: Path, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """Let PEFT write the case with random tensors, or as it starts for no `noise`. Returns the outputs of the bare
    network and of the adapted one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = net()
        bare = model(IDS).detach()
        torch.manual_seed(1)
        theirs: Any = peft.get_peft_model(model, CASES[case]())  # pyright: ignore[reportArgumentType]
        g = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(noise * torch.randn(p.shape, generator=g))
            want = theirs.eval()(input_ids=IDS)
            theirs.save_pretrained(folder)
    return bare, want


def error(case: str, folder: Path) -> float:
    """The largest difference of our outputs from PEFT's, relative to the largest output; `inf` where the adapter does
    next to nothing or leaves something behind."""
    bare, want = saved(case, folder)
    model = net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ll.load(model, folder)
    found = float((model(IDS) - want).detach().abs().max() / want.abs().max())
    ll.detach(model)
    clean = model.state_dict().keys() == state.keys() and all(
        torch.equal(v, state[k]) for k, v in model.state_dict().items()
    )
    return found if clean and (want - bare).abs().max() > 1e-2 else float("inf")
