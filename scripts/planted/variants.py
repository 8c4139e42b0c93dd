"""Bugs on the pages of methods."""

from __future__ import annotations

from .bug import Bug

E = "tests/equations/"

BUGS = [
    Bug("rotation transposed", "variants/oft.py", "Q = skew(theta, b)", "Q = skew(theta, b).mT", E + "test_oft.py"),
    Bug(
        "reflections in the other order",
        "variants/hra.py",
        "a, b = U.view(len(first), 2, -1).unbind(1)",
        "b, a = U.view(len(first), 2, -1).unbind(1)",
        E + "test_hra.py",
    ),
    Bug(
        "reflections that turn further the wider",
        "variants/hra.py",
        "init=fill_pairs",
        'init="kaiming"',
        E + "test_authors_rules.py -k hra",
    ),
    Bug(
        "a penalty that grows with the targets",
        "variants/adalora.py",
        "/ (2 * layer.peers)",
        "/ 2",
        E + "test_authors_rules.py -k mean",
    ),
    Bug(
        "scale forgotten",
        "variants/_lowrank.py",
        "layer.lora_A, layer.lora_B, layer.cfg.scale)",
        "layer.lora_A, layer.lora_B, 1.0)",
        "tests/io/test_native.py -k golden",
    ),
    Bug(
        "dropout forgotten",
        "variants/_lowrank.py",
        "lowrank_update(y, layer.dropout(x),",
        "lowrank_update(y, x,",
        "tests/contract/test_fields.py -k lora-ignored",
    ),
    Bug(
        "rsLoRA without its root",
        "variants/_lowrank.py",
        "self.r**0.5 if self.use_rslora",
        "self.r if self.use_rslora",
        E + "test_lora_starts.py",
    ),
    Bug(
        "norm not detached",
        "variants/dora.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
        E + "test_dora.py",
    ),
    Bug(
        "bias inside the magnitude",
        "variants/dora.py",
        "longer, h, layer.bias, s)",
        "longer, h, None, s)",
        E + "test_dora.py",
    ),
    Bug(
        "base weight written in init",
        "variants/dora.py",
        "layer.lora_norm = layer.row_norms()",
        "layer.lora_norm = layer.row_norms(); layer.weight.mul_(0.5)",
        "tests/contract/test_1_base_read_only.py -k dora",
    ),
    Bug(
        "the magnitude is pulled to nothing",
        "variants/dora.py",
        "ParamSpec((d_out,), decay=False, lr_ratio=cfg.lr_ratio_m)",
        "ParamSpec((d_out,), lr_ratio=cfg.lr_ratio_m)",
        "tests/runtime/test_optimisers.py -k magnitude",
    ),
    Bug(
        "steering acts on one edit at a time",
        "variants/_reft.py",
        "y = span.add(y, layer.cfg.scale * change",
        "y = span.add(y, change",
        E + "test_loreft.py",
    ),
    Bug(
        "padding stands for a row",
        "variants/_steering.py",
        "last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)",
        "last = torch.full((len(h),), h.shape[1] - 1)",
        "tests/runtime/test_interventions.py -k padding",
    ),
    Bug(
        "the budget falls in a straight line",
        "variants/_budget.py",
        "(first - last) * left**3",
        "(first - last) * left",
        E + "test_adalora.py",
    ),
    Bug(
        "factors without the start",
        "variants/_deviation.py",
        "return A, layer.cfg.scale * B",
        "return A, B",
        "tests/contract/test_what_works_where.py -k the_page_says_what_is[pissa]",
    ),
    Bug(
        "singular directions in the file's dtype",
        "variants/_svd_core.py",
        "z * change if change.dim() == 1 else z @ change.mT",
        "z * change if change.dim() == 1 else z @ change",
        E + "test_svd_core.py",
    ),
    Bug(
        "one draw for all randomised starts",
        "variants/_svd.py",
        'layer.generator("svd")',
        "torch.Generator()",
        "tests/runtime/test_draws.py -k randomised",
    ),
    Bug(
        "pruned parts go on",
        "variants/adalora.py",
        'view.master("lora_E").mul_(view.master("lora_live"))',
        "pass",
        E + "test_adalora.py",
    ),
    Bug(
        "the importance without its uncertainty",
        "variants/adalora.py",
        "importance = smooth * spread",
        "importance = smooth",
        E + "test_adalora.py -k importance",
    ),
    Bug(
        "the strength per direction forgotten",
        "variants/delora.py",
        '(layer.tiny("lora_lambda") / layer.cfg.r)',
        '(layer.tiny("lora_lambda") / 1)',
        E + "test_delora.py",
    ),
    Bug(
        "the sampled rank never acts", "variants/dylora.py", "if not layer.training:", "if True:", E + "test_dylora.py"
    ),
    Bug(
        "EVA's ranks change the scale",
        "variants/eva.py",
        "view.resize(r=r, alpha=view.cfg.scale * r)",
        "view.resize(r=r)",
        E + "test_eva.py",
    ),
    Bug(
        "a gradient's start uphill",
        "variants/lora_one.py",
        "(V * root).mT, -U * root",
        "(V * root).mT, U * root",
        E + "test_gradient_starts.py",
    ),
    Bug(
        "a fresh adapter is not the identity",
        "variants/ia3.py",
        '"lora_g": ParamSpec((d_out if cfg.side == "output" else d_in,), decay',
        '"lora_g": ParamSpec((d_out if cfg.side == "output" else d_in,), init="constant:1e-3", decay',
        "tests/contract/test_2_identity.py -k ia3-",
    ),
    Bug(
        "the moved values of OSF forgotten",
        "variants/osf.py",
        "return PU * (s0 + s) + U0 * s + ",
        "return PU * (s0 + s) + ",
        E + "test_osf.py",
    ),
    Bug(
        "one side of OSF turns, not both",
        "variants/osf.py",
        "(turned + torch.diag(s0 + s)) @ M",
        "torch.diag(s0 + s) @ M",
        E + "test_osf.py",
    ),
    Bug(
        "Lily's router compares tokens, not experts",
        "variants/lily.py",
        "(layer.lora_R @ z).softmax(0)",
        "(layer.lora_R @ z).softmax(1)",
        "tests/parity/test_rest_of_peft.py -k lily",
    ),
]
