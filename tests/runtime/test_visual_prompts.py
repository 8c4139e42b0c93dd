"""Prompts of every block of a vision transformer: as if they stood in each block's sequence."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import randomise

transformers = pytest.importorskip("transformers")


def vision(implementation):
    torch.manual_seed(4)
    cfg = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, image_size=8, patch_size=4
    )
    cfg._attn_implementation = implementation
    return transformers.ViTModel(cfg, add_pooling_layer=False).double().eval()


@torch.no_grad()
def with_prompts(model, image, prompts):
    """The published form: each block sees its own prompts behind the image's tokens, and they are thrown away."""
    h = model.embeddings(image)
    for layer, P in zip(model.layers, prompts, strict=True):
        tokens, n = layer.layernorm_before(h), h.shape[1]
        longer = torch.cat((tokens, P.expand(len(h), -1, -1)), 1)
        h = h + layer.attention(longer)[0][:, :n]
        h = h + layer.mlp(layer.layernorm_after(h))
    return model.layernorm(h)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_vpt_deep(implementation, monkeypatch):
    # transformers' eager attention takes its softmax in fp32, which rounds by where its rows lie in memory
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda t, dim, dtype=None: t.softmax(dim))
    model, image = vision(implementation), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    bare = model(image).last_hidden_state
    adapter = ll.attach(model, ll.VisualPromptTuningConfig(r=3, dtype="float64"))
    randomise(model)
    prompts = [t for name, t in ll.adapter_state_dict(model).items() if name.endswith("lora_P")]
    assert len(prompts) == 2 and {p.shape for p in prompts} == {(3, 24)}
    got = model(image).last_hidden_state
    with ll.active(model, None):
        want = with_prompts(model, image, prompts)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    assert got.shape == bare.shape and (got - bare).abs().max() > 1e-2
    (got * torch.randn_like(got)).sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in adapter.parameters())
