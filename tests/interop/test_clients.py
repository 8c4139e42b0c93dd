"""Other libraries on an adapted model or on what was exported from it: the largest difference from the model itself.

`scripts/clients_table.py` runs this file and writes the differences into docs/results/clients.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.testing.case import randomise
from measured import record

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs

IDS = torch.tensor([[5, 9, 30, 11, 7, 42, 8]])
METHODS = [ll.LoRAConfig(r=3, alpha=7), ll.PiSSAConfig(r=3, alpha=7), ll.HRAConfig(r=2), ll.IA3Config()]
NAMED = dict(ids=lambda cfg: cfg.variant)


@pytest.fixture
def base(tmp_path):
    """The folder of a tiny Llama."""
    return tiny_llm.save(tmp_path / "base")


def adapted(base, cfg=METHODS[0]):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ll.attach(model, cfg)
    randomise(model, seed=1)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def apart(a, b) -> float:
    return float((a - b).abs().max())


# ---- transformers and PEFT


def test_peft_and_transformers_read_the_export(tmp_path, base):
    peft = pytest.importorskip("peft")
    model = adapted(base)
    ll.export(model, tmp_path / "peft")
    want = logits(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert apart(logits(plain), want) > 0.05
    record(
        "peft", "from_pretrained", apart(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "peft")), want), 2e-6
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain.load_adapter(str(tmp_path / "peft"))
    record("transformers", "load_adapter", apart(logits(plain), want), 2e-6)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "peft")
    record("transformers", "AutoModel.from_pretrained(folder)", apart(logits(whole), want), 2e-6)


@pytest.mark.parametrize("cfg", [*METHODS, ll.LoReFTConfig(r=3)], **NAMED)
@pytest.mark.parametrize("way", ["no cache", "cache", "static cache", "beams"])
def test_generation(base, cfg, way):
    """Tokens of each way to generate, against the model called with ever longer texts."""
    model = adapted(base, cfg)
    options = {
        "no cache": dict(use_cache=False),
        "cache": {},
        "static cache": dict(cache_implementation="static", disable_compile=True),
        "beams": dict(num_beams=3),
    }[way]
    ids = torch.tensor([[7, 11, 42, 8, 6]])
    with ll.prompt(model, [5]):
        want = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0)
        single = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
    if way == "beams":
        with ll.prompt(model, [5]):
            want = model.generate(
                input_ids=ids, max_new_tokens=12, do_sample=False, num_beams=3, use_cache=False, pad_token_id=0
            )
    with ll.active(model, None):
        bare = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert not torch.equal(bare, want)
    record("transformers", f"generate: {way}, {cfg.variant} (tokens)", float((single != want).sum()), 0)


def test_assisted_decoding(base):
    model = adapted(base)
    helper = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.tensor([[7, 11, 42, 8, 6]])
    options = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    wrong = (model.generate(**options) != model.generate(**options, assistant_model=helper)).sum()
    record("transformers", "generate: assisted by the bare base (tokens)", float(wrong), 0)


def test_continuous_batching(base):
    model = adapted(base)
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    prompts = [[5, 9, 30], [7, 11, 42, 8, 6], [12, 13, 14, 15]]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(inputs=prompts, generation_config=config)
    wrong = 0
    for answer in found.values():
        ids = torch.tensor([list(answer.prompt_ids)])
        alone = adapted(base).generate(
            input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected = alone[0, ids.shape[1] :].tolist()
        wrong += sum(a != b for a, b in zip(answer.generated_tokens, expected, strict=True))
    assert len(found) == len(prompts)
    record("transformers", "continuous batching (tokens)", float(wrong), 0)


# ---- exports of the model


@pytest.mark.parametrize("cfg", METHODS, **NAMED)
def test_torch_export(base, cfg):
    model = adapted(base, cfg)
    model.config.use_cache = False
    exported = torch.export.export(model, (), {"input_ids": IDS}, strict=False).module()
    with torch.no_grad():
        found = exported(input_ids=IDS).logits
    record("torch", f"torch.export, {cfg.variant}", apart(found, logits(model)), 2e-6)


@pytest.mark.optional_backend("onnxruntime")
@pytest.mark.parametrize("cfg", METHODS[:2], **NAMED)
def test_onnx(tmp_path, base, cfg):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = adapted(base, cfg)
    model.config.use_cache = False
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (), str(path), kwargs={"input_ids": IDS}, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    found = torch.from_numpy(session.run(None, {name: IDS.numpy()})[0])
    record("onnxruntime", f"ONNX, {cfg.variant}", apart(found, logits(model)), 2e-5)


def test_dynamic_quantisation_says_merge_first(base):
    model = adapted(base)
    with pytest.raises(ll.LoraLiteError, match="merge"):
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        quantised(IDS)
    record("torch", "torch.ao quantize_dynamic: refused, merge first", 0.0, 0)


# ---- others


@pytest.mark.optional_backend("lm_eval")
def test_lm_eval(base):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = adapted(base), tiny_llm.tokenizer()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    asked = [("1+1=", "2"), ("12+3=", "15, I think"), ("hello", " you")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)])
    worst = 0.0
    for (context, answer), (value, _) in zip(asked, found, strict=True):
        ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
        logs = logits(model, ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-len(answer) :]
        worst = max(worst, abs(float(logs.sum()) - value))
    record("lm_eval", "loglikelihood", worst, 2e-5)


@pytest.mark.optional_backend("mlx_lm")
def test_mlx_lm(tmp_path, base):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load

    model = adapted(base)
    ll.export(model, tmp_path / "mlx", format="mlx")
    theirs, _ = load(str(base), adapter_path=str(tmp_path / "mlx"))
    found = torch.tensor(theirs(mx.array(IDS.tolist())).tolist())
    record("mlx-lm", "adapter_path", apart(found, logits(model)), 2e-5)


@pytest.mark.optional_backend("diffusers")
def test_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=12, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 12)
    ll.attach(unet, ll.LoRAConfig(r=3, alpha=7, target_names=("to_q", "to_k", "to_v", r"to_out\.0")))
    randomise(unet, seed=1)
    with torch.no_grad():
        want = unet(x, t, text).sample
    ll.export(unet, tmp_path / "out", format="diffusers")
    ll.export(unet, tmp_path / "peft")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    with torch.no_grad():
        assert apart(theirs(x, t, text).sample, want) > 1e-3
    theirs.load_lora_adapter(str(tmp_path / "out"), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        record("diffusers", "unet.load_lora_adapter", apart(theirs(x, t, text).sample, want), 2e-6)
    peft = pytest.importorskip("peft")
    plain = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")(x, t, text).sample
    record("peft", "from_pretrained of a UNet", apart(found, want), 2e-6)


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, folders = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(base, enforce_eager=True, dtype="float32", block_size=32, skip_tokenizer_init=True, enable_lora=True,
          max_lora_rank=8, max_model_len=64, max_num_seqs=4, gpu_memory_utilization=0.1, max_logprobs=90)
params = SamplingParams(max_tokens=1, temperature=0, logprobs=80, detokenize=False)
found = {}
for i, (name, folder) in enumerate(folders.items()):
    asked, request = [{"prompt_token_ids": [5, 9, 30, 11, 7, 42, 8]}], LoRARequest(name, i + 1, folder)
    out = llm.generate(asked, params, lora_request=request)
    found[name] = {str(k): v.logprob for k, v in out[0].outputs[0].logprobs[0].items()}
print("FOUND" + json.dumps(found))
"""


SERVED = {
    "lora": ll.LoRAConfig(r=3, alpha=7),
    "lora, one layer": ll.LoRAConfig(r=4, layers=(1,)),
    "lora, queries alone": ll.LoRAConfig(r=3, alpha=7, target_names=("q_proj",)),
    "lora, ranks and alphas by pattern": ll.LoRAConfig(
        r=3, alpha=7, rank_pattern={"q_proj": 5}, alpha_pattern={"up_proj": 2.0}
    ),
    "rslora": ll.LoRAConfig(r=3, alpha=7, use_rslora=True),
    "pissa": ll.PiSSAConfig(r=3, alpha=7),
    "olora": ll.OLoRAConfig(r=3, alpha=7),
    "lora_xs": ll.LoRAXSConfig(r=3, alpha=7),
    "vera": ll.VeRAConfig(r=4),
    "moslora": ll.MoSLoRAConfig(r=3, alpha=7),
}
"""What vLLM is given, by the name of its row."""


@pytest.mark.optional_backend("vllm")
def test_vllm(tmp_path):
    pytest.importorskip("vllm")
    base = tiny_llm.save(tmp_path / "base", width=128)
    folders, want = {}, {}
    bare = logits(transformers.AutoModelForCausalLM.from_pretrained(base).eval())[0, -1].log_softmax(-1)
    for what, cfg in SERVED.items():
        model = adapted(base, cfg)
        folders[what] = str(ll.export(model, tmp_path / str(len(folders)), format="lora"))
        want[what] = logits(model)[0, -1].log_softmax(-1)
        assert apart(want[what], bare) > 1e-2, what
    code = [sys.executable, "-c", VLLM, str(base), json.dumps(folders)]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_TARGET_DEVICE": "cpu"}
    done = subprocess.run(code, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rsplit("FOUND", 1)[1].splitlines()[0])
    package = "vllm" if "vllm" in {d.metadata["Name"] for d in importlib.metadata.distributions()} else "vllm-cpu"
    assert found.keys() == SERVED.keys()
    for what, logs in found.items():
        worst = max(abs(float(want[what][int(token)]) - value) for token, value in logs.items())
        record(package, f"LoRARequest, {what}", worst, 1e-5)
