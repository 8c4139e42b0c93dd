"""Two methods whose layers share tensors, for tests: frozen ones by shape, and a trained one of the whole model."""

from __future__ import annotations

import lora_lite as ll
from lora_lite import ParamSpec


def vera():
    """VeRA (Kopiczko et al. 2023, arXiv 2310.11454): y + b ∘ B(d ∘ Ax), one frozen A per d_in and one B per d_out."""

    @ll.register
    class Vera(ll.Variant):
        """Frozen random matrices for all layers, two trained vectors for each."""

        name = "vera_for_tests"
        ignores = ("alpha",)
        width_growth = 0.5  # A and B do not shrink with the widths

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"lora_d": ParamSpec((cfg.r,), init="constant:0.1"), "lora_b": ParamSpec((d_out,))}

        @staticmethod
        def shared_specs(targets, cfg):
            by_in, by_out = {}, {}
            for t in targets:
                by_in.setdefault(t.d_in, []).append(t)
                by_out.setdefault(t.d_out, []).append(t)
            frozen, kept = {"init": "normal", "trainable": False}, {"init": "normal", "as_buffer": True}
            groups = [(some, {"lora_A": ParamSpec((cfg.r, d), **frozen)}) for d, some in by_in.items()]
            return groups + [(some, {"lora_B": ParamSpec((d, cfg.r), **kept)}) for d, some in by_out.items()]

        @staticmethod
        def factors(layer):
            return layer.lora_d[:, None] * layer.lora_A, layer.lora_b[:, None] * layer.lora_B

        @staticmethod
        def forward(layer, x, y):
            z = layer.dropout(x) @ layer.lora_A.mT * layer.lora_d
            return y + z @ layer.lora_B.mT * layer.lora_b

    return Vera


def bank():
    """As VB-LoRA and NoLA: A = c · bank, and every layer of the model reads, and trains, the one bank."""

    @ll.register
    class Bank(ll.Variant):
        """One trained bank of rows for the whole model."""

        name = "bank_for_tests"

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"lora_c": ParamSpec((cfg.r, 5), init="kaiming"), "lora_B": ParamSpec((d_out, cfg.r))}

        @staticmethod
        def shared_specs(targets, cfg):
            return {"lora_bank": ParamSpec((5, max(t.d_in for t in targets)), init="kaiming")}

        @staticmethod
        def factors(layer):
            return layer.lora_c @ layer.lora_bank[:, : layer.in_features], layer.cfg.scale * layer.lora_B

        @staticmethod
        def forward(layer, x, y):
            A, B = Bank.factors(layer)
            return y + layer.dropout(x) @ A.mT @ B.mT

    return Bank
