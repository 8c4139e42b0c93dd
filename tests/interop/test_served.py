"""vLLM inside GRPO and RLOO: at each step the server, which keeps the base, is sent the weights with the adapter in
them, under the base's names."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.testing.case import randomise

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
vllm_generation = pytest.importorskip("trl.generation.vllm_generation")

IDS = torch.arange(5, 14)[None]


class Client:
    """What TRL asks of a server, answered by a bare model whose weights are those that were sent."""

    def __init__(self, **_):
        self.model, self.names, self.heard = tiny_llm.model().eval(), [], []

    def init_communicator(self, **_):
        pass

    reset_prefix_cache = init_communicator

    def update_named_params(self, metadata, named):
        sent = {name: p.detach().clone() for name, p in named}
        assert metadata == [(k, str(v.dtype).removeprefix("torch."), list(v.shape)) for k, v in sent.items()]
        self.names.append(list(sent))
        self.model.load_state_dict(sent)
        self.heard.append(self.model(IDS).logits.detach())

    def generate(self, prompts, n, max_tokens, **_):
        said = []
        for ids in prompts:
            out = self.model.generate(torch.tensor([ids] * n), max_new_tokens=max_tokens, do_sample=True)
            said += out[:, len(ids) :].tolist()
        return {"prompt_ids": prompts, "completion_ids": said, "logprobs": [[[0.0]] * len(ids) for ids in said]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_each_step_sends_merged_weights(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Client)
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, learning_rate=1e-2,
        max_completion_length=5, beta=0.1, use_vllm=True, vllm_mode="server", report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", logging_steps=1,
        **({"vllm_importance_sampling_correction": False} if kind == "GRPO" else {}),
    )  # fmt: skip
    model = tiny_llm.model()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    ll.attach(model, ll.LoRAConfig(r=2, alpha=3))
    randomise(model, seed=1)
    with torch.no_grad():
        start = model.eval()(IDS).logits
    trainer = ll.trainer(getattr(trl, f"{kind}Trainer"))(
        model=model, args=args, train_dataset=datasets.Dataset.from_list([{"prompt": f"{i}+1="} for i in range(8)]),
        reward_funcs=lambda completions, **_: [float(len(c)) + i for i, c in enumerate(completions)],
        processing_class=tiny_llm.tokenizer(),
    )  # fmt: skip
    trainer.train()
    client = trainer.vllm_generation.vllm_client
    assert len(client.names) == 2 and all(names == list(base) for names in client.names)
    torch.testing.assert_close(client.heard[0], start, atol=1e-5, rtol=0)
    assert (client.heard[1] - start).abs().max() > 1e-3, "what the first step has learned was not sent"
    after = dict(model.named_parameters())
    assert all(torch.equal(t, after[name]) for name, t in base.items()) and len(after) > len(base)
    assert trainer.state.log_history[0]["kl"] == 0
