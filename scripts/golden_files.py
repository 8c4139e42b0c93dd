"""Make tests/golden: one small file of every layout, and what the adapted network gave where it was made.

python scripts/golden_files.py                      # PEFT's types, ours, its exports, LyCORIS, MLX, a torch.save
python scripts/golden_files.py --only prompts        # PEFT's prompts and prefixes alone
python scripts/golden_files.py --upstream CHECKOUT  # the original lora-lite's own too, from a checkout of its sources

Golden files are kept: whoever makes them anew says why. `tests/io/test_golden_files.py` reads and writes them again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT / "tests"))

import lora_lite as ll  # noqa: E402
import peft_prompts  # noqa: E402
import tiny_llm  # noqa: E402
from lora_lite.testing.case import randomise  # noqa: E402
from peft_files import CASES, IDS, net, saved  # noqa: E402

FORMATS = {"lora": ("peft", "lora", "llama.cpp", "diffusers", "kohya"), "dora": ("peft",)}
"""Method -> the layouts in which its golden file of ours is exported; MLX-LM's wants a transformer."""
UPSTREAM = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
import lora_lite as up
from peft_files import net, IDS
from safetensors.torch import save_file
CONFIGS = {
    "lora": up.LoRAConfig(r=3, alpha=7), "pissa": up.PiSSAConfig(r=3, alpha=7), "delora": up.DeLoRAConfig(r=3),
    "ia3": up.IA3Config(), "ia3_ff": up.IA3FFConfig(), "dora": up.DoRAConfig(r=3, alpha=7), "hra": up.HRAConfig(r=4),
    "eva": up.EVAConfig(r=3, alpha=7), "antipasto": up.AntiPaSTOConfig(r=4), "road": up.RoadConfig(group_size=2),
}
outputs = {}
for name, cfg in CONFIGS.items():
    cfg.dtype, cfg.target_roles, cfg.target_names = torch.float32, (), ("fc",)
    model = net()
    up.attach(model, cfg, calibration_data=[(IDS,)] if name == "eva" else None)
    g = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn(p.shape, generator=g))
    up.save(model, f"{sys.argv[3]}/{name}.safetensors")
    outputs[f"upstream/{name}.safetensors"] = model(IDS).detach()
save_file(outputs, f"{sys.argv[3]}/outputs")
"""


def by_peft(outputs: dict[str, Tensor]) -> None:
    """One configuration of every type."""
    made = set()
    for case in CASES:
        kind = case.split()[0]
        if kind not in made:
            made.add(kind)
            folder = GOLDEN / "peft" / kind.lower()
            outputs[f"peft/{kind.lower()}"] = saved(case, folder)[1]
            (folder / "README.md").unlink(missing_ok=True)


def by_us(outputs: dict[str, Tensor]) -> None:
    """Files of ours, and what is exported of them."""
    for method, formats in FORMATS.items():
        model = net()
        names = ("fc1", "fc2")
        ll.attach(model, ll.get_variant(method).config(r=3, alpha=7, target_names=names, rank_pattern={"fc2": 2}))
        randomise(model)
        (GOLDEN / "native").mkdir(parents=True, exist_ok=True)
        ll.save(model, GOLDEN / "native" / f"{method}.safetensors")
        places = [f"native/{method}.safetensors"]
        for format in formats:
            folder = GOLDEN / "written" / method / format
            ll.export(model, folder, format=format)
            places.append(loadable(folder))
        with torch.no_grad():
            outputs.update(dict.fromkeys(places, model(IDS)))


def loadable(folder: Path) -> str:
    """What is given to ll.load: the file of image models, else the folder."""
    file = folder / "pytorch_lora_weights.safetensors"
    return str((file if file.is_file() else folder).relative_to(GOLDEN))


def by_hand(outputs: dict[str, Tensor]) -> None:
    """Layouts whose programs are not at hand, from their rules: LyCORIS, MLX-LM, and the original's old pickles."""
    g = torch.Generator().manual_seed(5)
    a1, b1, a2, b2 = (torch.randn(s, generator=g) / 2 for s in ((16, 2), (2, 10), (16, 2), (2, 10)))
    w1, w2 = torch.randn(2, 4, generator=g) / 2, torch.randn(3, 4, generator=g) / 2
    folder = GOLDEN / "lycoris"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(3.0)}
    save_file({f"lycoris_fc1.{k}": t for k, t in parts.items()}, folder / "loha.safetensors")
    outputs["lycoris/loha.safetensors"] = moved("fc1", 1.5 * (a1 @ b1) * (a2 @ b2))
    parts = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1.0)}
    save_file({f"lycoris_fc2.{k}": t for k, t in parts.items()}, folder / "lokr.safetensors")
    outputs["lycoris/lokr.safetensors"] = moved("fc2", torch.kron(w1, w2))
    A, B = torch.randn(3, 10, generator=g), torch.randn(16, 3, generator=g)
    (GOLDEN / "mlx").mkdir(exist_ok=True)
    save_file(
        {"fc1.lora_a": A.mT.contiguous(), "fc1.lora_b": B.mT.contiguous()}, GOLDEN / "mlx" / "adapters.safetensors"
    )
    said = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 3, "scale": 0.5, "dropout": 0.0}}
    (GOLDEN / "mlx" / "adapter_config.json").write_text(json.dumps(said) + "\n")
    outputs["mlx"] = moved("fc1", 0.5 * B @ A)
    (GOLDEN / "upstream").mkdir(exist_ok=True)
    cfg = {"variant": "lora", "r": 3, "alpha": 7.0, "dtype": "float32"}
    torch.save({"cfg": cfg, "state": {"fc1.lora_A": A, "fc1.lora_B": B}}, GOLDEN / "upstream" / "old.pt")
    outputs["upstream/old.pt"] = moved("fc1", 7 / 3 * B @ A)


def prompts() -> None:
    """PEFT's prompts and prefixes, which want a transformer, and that transformer."""
    folder, outputs = GOLDEN / "prompts", {}
    folder.mkdir(exist_ok=True)
    for case in peft_prompts.THEIRS:
        name = case.lower().replace(" ", "-")
        outputs[name] = peft_prompts.saved(case, folder / name)[0].contiguous()
        (folder / name / "README.md").unlink(missing_ok=True)
    save_file(tiny_llm.model().state_dict(), folder / "base.safetensors")
    save_file(outputs, folder / "outputs.safetensors")


@torch.no_grad()
def moved(path: str, change: Tensor) -> Tensor:
    """What the network gives with this change of a weight."""
    model = net()
    model.get_submodule(path).weight += change  # type: ignore[operator]
    return model(IDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path)
    parser.add_argument("--only", choices=["prompts"])
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    prompts()
    if asked.only:
        return 0
    outputs: dict[str, Any] = {}
    GOLDEN.mkdir(exist_ok=True)
    save_file(net().state_dict(), GOLDEN / "base.safetensors")
    by_peft(outputs)
    by_us(outputs)
    by_hand(outputs)
    if asked.upstream is not None:
        from safetensors.torch import load_file

        place = GOLDEN / "upstream"
        words = [str(asked.upstream / "src"), str(ROOT / "tests"), str(place)]
        subprocess.run([sys.executable, "-c", UPSTREAM, *words], check=True)
        outputs |= load_file(place / "outputs")
        (place / "outputs").unlink()
    save_file({k: t.clone().contiguous() for k, t in outputs.items()}, GOLDEN / "outputs.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
