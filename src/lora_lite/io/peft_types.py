"""The table of PEFT's types: who reads a layer of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .peft_site import Reading, Site
from .peft_tables import lora, products, rotations, shared


@dataclass(frozen=True)
class Row:
    """One `peft_type`."""

    variant: str
    """The method here; its config is the adapter's."""
    read: Callable[[Site], Reading]
    """The change of variables."""
    named: bool = False
    """The file holds nothing for a single layer: the names in the config say where it stands."""


TYPES: dict[str, Row] = {
    "LORA": Row("lora", lora.lora),
    "ADALORA": Row("adalora", lora.adalora),
    "TRAINABLE_TOKENS": Row("token_rows", lora.token_rows),
    "IA3": Row("ia3", rotations.ia3),
    "BEFT": Row("bitfit", rotations.beft),
    "LN_TUNING": Row("whole", rotations.ln_tuning),
    "OFT": Row("oft", rotations.oft),
    "BOFT": Row("boft", rotations.boft),
    "HRA": Row("hra", rotations.hra),
    "ROAD": Row("road", rotations.road),
    "PSOFT": Row("psoft", rotations.psoft),
    "LOHA": Row("loha", products.loha),
    "LOKR": Row("lokr", products.lokr),
    "MISS": Row("miss", products.miss),
    "GRALORA": Row("gralora", products.gralora),
    "C3A": Row("c3a", products.c3a),
    "SHIRA": Row("shira", products.shira),
    "FOURIERFT": Row("fourierft", products.fourierft),
    "WAVEFT": Row("waveft", products.waveft),
    "DELORA": Row("delora", products.delora),
    "DEFT": Row("deft", products.deft),
    "VERA": Row("vera", shared.vera),
    "PVERA": Row("pvera", shared.pvera),
    "VBLORA": Row("vblora", shared.vblora),
    "TINYLORA": Row("tinylora", shared.tinylora),
    "RANDLORA": Row("randlora", shared.randlora),
    "HIRA": Row("hira", shared.hira),
    "PEANUT": Row("peanut", shared.peanut),
    "GLORA": Row("whole", shared.glora),
    "SUPERTUNING": Row("supertuning", shared.supertuning),
    "UNILORA": Row("unilora", shared.unilora, named=True),
    "POLY": Row("poly", shared.poly),
    "OSF": Row("whole", shared.osf),
    "FROD": Row("whole", shared.frod),
    "ADAMSS": Row("whole", shared.adamss),
}
"""peft_type -> how it is read."""
