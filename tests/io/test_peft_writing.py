"""What `ll.export` writes: PEFT reads the same function, and so do we."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("peft")

import peft

import lora_lite as ll
from lora_lite.io.peft_names import tails
from lora_lite.io.peft_tables.written import WRITERS
from lora_lite.testing.case import randomise
from peft_files import IDS, net
from tiny_models import build

FC = {"target_names": ("fc1", "fc2")}
EMB = {"target_names": ("emb",), "target_kinds": ("embedding",)}
CONV = {"target_names": ("conv",), "target_kinds": ("conv",)}
CASES = {
    "lora": ("LORA", {"r": 3, "alpha": 7, "train_modules": ("score",), "alpha_pattern": {"fc1": 2}, **FC}),
    "lora embedding": ("LORA", {"r": 3, "alpha": 7, **EMB}),
    "lora convolution": ("LORA", {"r": 3, "alpha": 7, **CONV}),
    "lora transposed": ("LORA", {"r": 3, "alpha": 7, "target_names": ("turned", "fc1")}),
    "vera": ("LORA", {"r": 4, **FC}),
    "loha": ("LORA", {"r": 2, "alpha": 3, **FC}),
    "adalora": ("LORA", {"r": 3, "target_r": 2, "alpha": 5, **FC}),
    "dora": ("LORA", {"r": 3, "alpha": 7, "rank_pattern": {"fc1": 2}, **FC}),
    "dora transposed": ("LORA", {"r": 3, "alpha": 7, "target_names": ("turned",)}),
    "dora embedding": ("LORA", {"r": 3, "alpha": 7, **EMB}),
    "dora convolution": ("LORA", {"r": 3, "alpha": 7, **CONV}),
    "ia3": ("IA3", {"input_names": ("fc2",), **FC}),
    "ia3 transposed": ("IA3", {"target_names": ("turned",)}),
    "ia3_ff": ("IA3", FC),
    "bitfit": ("BEFT", FC),
    "hra": ("HRA", {"r": 4, **FC}),
    "hra odd": ("HRA", {"r": 3, **FC}),
    "oft": ("OFT", {"block_size": 2, **FC}),
    "oft series": ("OFT", {"block_size": 2, "neumann_terms": 4, "max_norm": 0.3, **FC}),
    "boft": ("BOFT", {"block_size": 2, "n_factors": 1, **FC}),
    "road": ("ROAD", {"group_size": 2, **FC}),
    "road 2": ("ROAD", {"group_size": 2, "per_pair": 2, **FC}),
    "road 4": ("ROAD", {"group_size": 4, "per_pair": 4, "target_names": ("fc1", "square")}),
    "token_rows": ("TRAINABLE_TOKENS", {"token_ids": (3, 7, 1), **EMB}),
    "whole": ("LN_TUNING", FC),
    "whole norm": ("LN_TUNING", {"target_names": ("norm",), "target_kinds": ("norm",)}),
    "lokr": ("LOKR", {"r": 1, "alpha": 3, **FC}),
    "lokr multiplied out": ("LOKR", {"r": 4, "alpha": 3, "factored": True, "factor": 2, **FC}),
    "c3a": ("C3A", {"block": 4, **FC}),
    "shira": ("SHIRA", {"r": 2, **FC}),
    "deft": ("DEFT", {"r": 3, "alpha": 5, **FC}),
    "deft qr": ("DEFT", {"r": 3, "alpha": 5, "projection": "qr", **FC}),
    "hira": ("HIRA", {"r": 3, "rank_pattern": {"fc2": 2}, **FC}),
    "pvera": ("PVERA", {"r": 4, **FC}),
    "supertuning": ("SUPERTUNING", {"share": 0.2, "low_rank": True, "r": 2, "alpha": 5, **FC}),
}
APART = {"fourierft", "waveft", "rosa", "alora", "poly"}
"""Written too; tested below, and in test_peft_prompts."""


@pytest.fixture(autouse=True)
def plain_boft(monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", False)  # do not try to compile the extension


def config(case, options):
    name = case.split()[0]
    return ll.get_variant(name).config(variant=name, **options)


def adapted(cfg):
    """(the model, what the bare one gives, what it gives)."""
    model = net()
    bare = model(IDS).detach()
    ll.attach(model, cfg)
    randomise(model)
    return model.eval(), bare, model(IDS).detach()


def theirs(folder):
    return peft.PeftModel.from_pretrained(net(), folder).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_peft_and_we_read_the_same_function(case, tmp_path):
    kind, options = CASES[case]
    model, bare, want = adapted(config(case, options))
    ll.export(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == kind and (want - bare).abs().max() > 0.02
    ours = net()
    ll.load(ours, tmp_path)
    size = want.abs().max()
    assert (theirs(tmp_path)(input_ids=IDS) - want).abs().max() < 1e-5 * size
    assert (ours(IDS) - want).abs().max() < 1e-5 * size


def test_every_writer_is_tried():
    assert {case.split()[0] for case in CASES} | APART >= set(WRITERS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [peft.FourierFTConfig, peft.WaveFTConfig])
def test_places_that_peft_draws(make, tmp_path):
    """What came from PEFT goes back; coefficients at other places are refused."""
    source = peft.get_peft_model(net(), make(target_modules=["fc1", "fc2"], n_frequency=40))
    for p in source.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    source.save_pretrained(tmp_path / "a")
    want = source.eval()(input_ids=IDS)
    model = net()
    ll.load(model, tmp_path / "a")
    ll.export(model, tmp_path / "b")
    assert (theirs(tmp_path / "b")(input_ids=IDS) - want).abs().max() < 1e-5 * want.abs().max()
    name = {"FOURIERFT": "fourierft", "WAVEFT": "waveft"}[make(target_modules=[]).peft_type]
    model = net()
    ll.attach(model, config(name, {"n": 40, **FC}))
    with pytest.raises(ll.StateError, match="other places than PEFT draws"):
        ll.export(model, tmp_path / "c")


TOKENS = torch.arange(21).view(3, 7) * 5 % 61


def llama_with(cfg, **options):
    """(what the bare model gives, what the adapted one does, the adapted one)."""
    model = build("llama")
    bare = model(TOKENS).logits.detach()
    ll.attach(model, cfg, **options)
    randomise(model)
    return bare, model.eval()(TOKENS).logits.detach(), model


@pytest.mark.filterwarnings("ignore:Adapter config")
def test_rosa_is_supra(tmp_path):
    cfg = ll.RoSAConfig(r=2, alpha=5, share=0.02, target_names=("q_proj", "up_proj"))
    bare, want, model = llama_with(cfg, calibration_data=[{"input_ids": TOKENS, "labels": TOKENS}])
    ll.export(model, tmp_path)
    found = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()(TOKENS).logits
    assert (found - want).abs().max() < 1e-5 * want.abs().max() < (want - bare).abs().max()


@pytest.mark.filterwarnings("ignore:Adapter config")
def test_activated_lora(tmp_path):
    tokens = TOKENS[0, 2:4].tolist()
    cfg = ll.ALoRAConfig(r=2, alpha=5, positions=f"from:{tokens[0]},{tokens[1]}", target_names=("q_proj", "up_proj"))
    bare, want, model = llama_with(cfg)
    ll.export(model, tmp_path)
    found = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()(input_ids=TOKENS).logits
    ours = build("llama")
    ll.load(ours, tmp_path)
    for other in (found, ours(TOKENS).logits):
        assert (other - want).abs().max() < 1e-5 * want.abs().max()
    assert torch.equal(want[1:], bare[1:]) and (want[0, 2:] - bare[0, 2:]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (ll.OFTConfig(block_size=4, target_names=("fc1",)), "fc1 has 10 inputs"),
        (ll.HRAConfig(side="output", **FC), "reflects inputs only"),
        (ll.RoadConfig(group_size=4, target_names=("fc2",)), "fc2 has 6 outputs"),
        (ll.get_variant("ether").config(variant="ether", **FC), "no type that holds it"),
        (ll.OFTConfig(block_size=2, target_names=("turned",)), "does not know turned, a Conv1D"),
        (ll.HiRAConfig(r=2, **CONV), "conv is no linear layer"),
    ],
)
def test_what_no_type_holds_is_refused(cfg, words, tmp_path):
    model, _, _ = adapted(cfg)
    with pytest.raises(ll.StateError, match=words) as e:
        ll.export(model, tmp_path / "x")
    assert "rank=16" in str(e.value) and "merge_and_unload" in str(e.value) and not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore:Adapter config")
def test_the_nearest_lora_says_how_near_it_is(tmp_path):
    model, bare, want = adapted(ll.OFTConfig(block_size=2, **FC))
    with pytest.warns(ll.LoraLiteWarning, match=r"rank 1, .*: (\d+)\.\d% of the change of fc\d"):
        ll.export(model, tmp_path / "1", rank=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.LoraLiteWarning)
        ll.export(model, tmp_path / "all", rank=16)
    error = {f: float((theirs(tmp_path / f)(input_ids=IDS) - want).detach().abs().max()) for f in ("1", "all")}
    assert error["all"] < 1e-5 < error["1"] < (want - bare).abs().max()


def test_the_nearest_lora_of_a_changed_bias(tmp_path):
    """A gain of the outputs turns the bias too."""
    model, _, want = adapted(ll.IA3Config(target_names=("fc1", "square")))
    ll.export(model, tmp_path, rank=16)
    assert (theirs(tmp_path)(input_ids=IDS) - want).abs().max() < 1e-5
    with pytest.raises(ll.StateError, match="changes the bias of 'fc1'"):
        ll.export(model, tmp_path, format="lora", rank=16)


def test_names_are_the_shortest_that_mean_nothing_else():
    modules = [
        "layers.0",
        "layers.0.to_out.0",
        "layers.0.q",
        "layers.1",
        "layers.1.to_out.0",
        "layers.1.q",
        "a.v",
        "b.v",
    ]
    assert tails(["layers.0.to_out.0", "layers.1.to_out.0"], modules) == ["to_out.0"]
    assert tails(["layers.0.q", "layers.1.q"], modules) == ["q"] and tails(["layers.1.q"], modules) == ["1.q"]
    assert tails(["a.v"], modules) == ["a.v"]


class Numbered(nn.Module):
    """`to_out.0` is a layer, and so is `layers.0`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.to_out = nn.Sequential(nn.Linear(12, 12), nn.Dropout())
        self.config = {"model_type": "numbered"}

    def forward(self, input_ids):
        return self.to_out(self.layers[1](self.layers[0](input_ids)))


@pytest.mark.filterwarnings("ignore:Adapter config")
def test_a_numbered_layer_is_not_taken_for_another(tmp_path):
    model, x = Numbered().eval(), torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    ll.attach(model, ll.LoRAConfig(r=2, alpha=6, target_names=(r"to_out\.0",)))
    randomise(model)
    ll.export(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["to_out.0"]
    other = peft.PeftModel.from_pretrained(Numbered().eval(), tmp_path)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-6)


def test_base_and_task(tmp_path):
    model, _, _ = adapted(ll.LoRAConfig(r=2, **FC))

    def said(**options):
        ll.export(model, tmp_path, **options)
        found = json.loads((tmp_path / "adapter_config.json").read_text())
        return found["base_model_name_or_path"], found["task_type"]

    assert said() == (None, None)
    model.generate, model.main_input_name = lambda: None, "input_ids"
    model.config = type("Config", (), {"_name_or_path": "owner/base", "is_encoder_decoder": False})()
    assert said() == ("owner/base", "CAUSAL_LM")
    model.config.is_encoder_decoder = True
    assert said() == ("owner/base", "SEQ_2_SEQ_LM")
    model.main_input_name = "input_features"  # speech
    assert said() == ("owner/base", None)
    assert said(base_model="other", task_type="FEATURE_EXTRACTION") == ("other", "FEATURE_EXTRACTION")


def test_what_stands_beside_the_method_is_written(tmp_path):
    """Biases and token rows that came with a LoRA go with it."""
    cfg = peft.LoraConfig(r=2, target_modules=["fc1"], bias="all", trainable_token_indices={"emb": [3, 11]})
    source = peft.get_peft_model(net(), cfg)
    for name, p in source.named_parameters():
        if p.requires_grad and "fc1.base_layer" not in name:  # that one is read as a change of the weight
            torch.nn.init.normal_(p, std=0.3)
    want = source.eval()(input_ids=IDS)
    source.save_pretrained(tmp_path / "a")
    model = net()
    ll.load(model, tmp_path / "a")
    assert (model(IDS) - want).abs().max() < 1e-5 * want.abs().max()
    ll.export(model, tmp_path / "b")
    assert (theirs(tmp_path / "b")(input_ids=IDS) - want).abs().max() < 1e-5 * want.abs().max()


def test_one_form_for_every_server(tmp_path):
    """Of a block's q, all that servers stack with it are there, as zeros."""
    model = build("llama")
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5, target_names=("q_proj", "up_proj"), layers=(0,)))
    randomise(model)
    for form, names in (
        ("peft", ["q_proj", "up_proj"]),
        ("lora", ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]),
    ):
        ll.export(model, tmp_path, format=form)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == names
        found = load_file(tmp_path / "adapter_model.safetensors")
        assert len(found) == 2 * 2 * len(names) and {min(t.shape) for t in found.values()} == {2}
        assert sum(bool(t.any()) for t in found.values()) == 4


def test_a_tensor_that_the_type_does_not_have(tmp_path):
    model, _, _ = adapted(ll.LoRAConfig(r=2, **FC))
    ll.export(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.fc1.lora_C": torch.ones(2)}, path)
    with pytest.raises(ll.FileError, match="fc1 holds more than LORA has: 'lora_C'"):
        ll.load(net(), tmp_path)
