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
    "VERA": Row("lora", shared.vera),
    "PVERA": Row("lora", shared.pvera),
    "VBLORA": Row("lora", shared.vblora),
    "TINYLORA": Row("lora", shared.tinylora),
    "RANDLORA": Row("whole", shared.randlora),
    "HIRA": Row("whole", shared.hira),
    "GLORA": Row("whole", shared.glora),
    "SUPERTUNING": Row("whole", shared.supertuning),
    "UNILORA": Row("lora", shared.unilora, named=True),
    "OSF": Row("whole", shared.osf),
    "FROD": Row("whole", shared.frod),
}
"""peft_type -> how it is read."""
