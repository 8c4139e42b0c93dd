"""Every file in `examples/` runs, for a few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import lora_lite as ll
import tiny_llm

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs


def example(name: str):
    """The module of a file there; skipped where a package is missing that it imports."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as e:
        pytest.skip(f"needs {e.name}")
    return module


def changes_the_demo(path) -> bool:
    """Whether the adapter at a path changes what the bundled base says."""
    from lora_lite.demo.data import load_model

    model, tokenizer = load_model("demo")
    ids = tokenizer("3 + 4 = 7", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model.eval()(ids).logits
        ll.load(model, path)
        return bool((model(ids).logits - before).abs().max() > 1e-4)


@pytest.mark.parametrize("name", ["plain_loop", "with_accelerate"])
def test_loops(tmp_path, name):
    example(name).main(str(tmp_path / "a.safetensors"), 3)
    assert changes_the_demo(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["with_trainer", "trl_sft", "trl_grpo"])
def test_trainers(tmp_path, name, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    module = example(name)
    if name == "trl_grpo":  # the bare base is never right in a few steps, so that nothing would be learned
        module.reward = lambda completions, **_: [float(len(text)) for text in completions]
    module.main(str(tmp_path / "out"), 4)
    assert changes_the_demo(tmp_path / "out")


def test_dpo_after_sft(tmp_path):
    example("trl_sft").main(str(tmp_path / "sft"), 4)
    assert example("trl_dpo").main(str(tmp_path / "dpo"), 2, str(tmp_path / "sft")) == 0
    assert changes_the_demo(tmp_path / "dpo")


@pytest.mark.optional_backend("sentence_transformers")
def test_sentence_transformer(tmp_path):
    module = example("sentence_transformer")
    import transformers
    from sentence_transformers import SentenceTransformer, models

    tokenizer = tiny_llm.tokenizer()
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    words = models.Transformer(str(tmp_path / "b"))
    SentenceTransformer(modules=[words, models.Pooling(32)], device="cpu").save(str(tmp_path / "base"))
    module.main(str(tmp_path / "out"), 2, str(tmp_path / "base"))
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


@pytest.mark.optional_backend("diffusers")
def test_diffusion(tmp_path):
    module = example("diffusion")
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=12, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    module.main(str(tmp_path / "out"), 2, str(tmp_path / "unet"), None)
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "merged")
    bare = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 12)
    plain = bare(x, t, text).sample
    assert (merged(x, t, text).sample - plain).abs().max() > 1e-6
    name = "pytorch_lora_weights.safetensors"
    bare.load_lora_adapter(str(tmp_path / "out" / "diffusers"), prefix="unet", weight_name=name)
    torch.testing.assert_close(bare(x, t, text).sample, merged(x, t, text).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.optional_backend("ray")
def test_ray_train(tmp_path):
    example("ray_train").main(str(tmp_path), 3)
    assert changes_the_demo(tmp_path / "adapter.safetensors")


def test_every_example_is_named_and_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    readme, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert {n for n in names if f"`{n}.py`" in readme and f'"{n}"' in tests} == names
