"""`import lora_lite` brings torch and safetensors, and nothing that torch would not have brought."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = {"transformers", "accelerate", "bitsandbytes", "peft", "datasets", "trl", "tyro", "rich", "matplotlib"}
OF_TORCH = {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions"}
"""What torch itself requires: loaded late by some of its modules."""


def loaded(statement: str) -> set[str]:
    """Top-level modules of a fresh interpreter after `statement`, without the standard library."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) - set(sys.stdlib_module_names)


def test_the_probe_sees_a_package():
    assert "numpy" in loaded("import numpy")


def test_import_loads_torch_and_safetensors_only():
    ours = loaded("import lora_lite")
    assert "lora_lite" in ours
    assert not ours & OPTIONAL
    extra = ours - loaded("import torch, safetensors.torch") - OF_TORCH - {"lora_lite"}
    assert not extra, f"import lora_lite also loads {sorted(extra)}"


def test_import_draws_no_random_number_and_starts_no_cuda():
    code = (
        "import torch; before = torch.get_rng_state(); import lora_lite; "
        "assert torch.equal(before, torch.get_rng_state()); assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
