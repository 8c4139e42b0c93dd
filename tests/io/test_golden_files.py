"""Files of every layout as they were once written, by PEFT, by the original lora-lite and by us: they are read for
ever, and what is exported stays the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_lite as ll

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft_prompts
import tiny_llm
from peft_files import IDS, Net

GOLDEN = Path(__file__).parents[1] / "golden"
OUTPUTS = load_file(GOLDEN / "outputs.safetensors")
PROMPTED = load_file(GOLDEN / "prompts" / "outputs.safetensors")
FORMATS = sorted((p.parent.name, p.name) for p in (GOLDEN / "written").glob("*/*"))


def bare() -> Net:
    model = Net().eval()
    model.load_state_dict(load_file(GOLDEN / "base.safetensors"))
    return model


@pytest.mark.parametrize("place", sorted(OUTPUTS))
def test_a_golden_file_is_read(place):
    model, want = bare(), OUTPUTS[place]
    base = model(IDS).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        ll.load(model, GOLDEN / place)
    assert (model(IDS) - want).abs().max() <= 1e-5 * want.abs().max()
    assert (want - base).abs().max() > 1e-2
    ll.detach(model)
    assert torch.equal(model(IDS), base)


@pytest.mark.parametrize("place", sorted(PROMPTED))
def test_a_golden_prompt_is_read(place):
    model, X = tiny_llm.model().eval(), peft_prompts.X
    model.load_state_dict(load_file(GOLDEN / "prompts" / "base.safetensors"))
    base, want = model(X).logits.detach(), PROMPTED[place]
    ll.load(model, GOLDEN / "prompts" / place)
    got = peft_prompts.ours_on(model, "multitask" in place)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (want - base).abs().max() > 1e-2


@pytest.mark.parametrize(("method", "format"), FORMATS)
def test_what_is_exported_stays_the_same(method, format, tmp_path):
    model = bare()
    ll.load(model, GOLDEN / "native" / f"{method}.safetensors")
    ll.export(model, tmp_path / "new", format=format)
    old = GOLDEN / "written" / method / format
    assert {p.name for p in (tmp_path / "new").iterdir()} == {p.name for p in old.iterdir()}
    for file in old.iterdir():
        new = tmp_path / "new" / file.name
        if file.suffix == ".json":
            assert json.loads(new.read_text()) == json.loads(file.read_text())
            continue
        want, got = load_file(file), load_file(new)
        assert want.keys() == got.keys()
        for key, t in want.items():
            torch.testing.assert_close(got[key], t, rtol=1e-6, atol=1e-6)


def test_every_layout_has_a_golden_file():
    layouts = {place.split("/")[0] for place in OUTPUTS}
    assert layouts == {"peft", "native", "written", "lycoris", "mlx", "upstream"}
    from lora_lite.interop.upstream import READ
    from lora_lite.io.export import FORMATS as WRITTEN
    from lora_lite.io.peft_prompts import PROMPTS
    from lora_lite.io.peft_types import TYPES

    assert {f for _, f in FORMATS} == set(WRITTEN) - {"mlx"}
    assert {f"upstream/{name}.safetensors" for name in READ} <= set(OUTPUTS)
    kinds = {json.loads(p.read_text())["peft_type"] for p in (GOLDEN / "peft").glob("*/adapter_config.json")}
    live = {"ADAMSS", "POLY"}  # scikit-learn, tasks: tests of their own
    prompts = {json.loads(p.read_text())["peft_type"] for p in (GOLDEN / "prompts").glob("*/adapter_config.json")}
    assert prompts == set(PROMPTS)
    assert kinds | live | prompts >= set(TYPES)
