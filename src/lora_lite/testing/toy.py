"""A model of two blocks with odd sizes, stand-ins for layers of other libraries, and a snapshot that notices any
change."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, HIDDEN, VOCABULARY = 12, 20, 17
SIZES_OF_LAYERS = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}


class Conv1D(nn.Module):
    """As transformers' layer of this name: the weight is stored (d_in, d_out), the sizes as `nf` and `nx`."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.nf, self.nx = d_out, d_in
        self.weight = nn.Parameter(torch.empty(d_in, d_out).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.bias = nn.Parameter(torch.empty(d_out).uniform_(-0.3, 0.3)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class FakeQuantLinear(nn.Module):
    """A weight-only quantised layer: int8 codes and a step per row, dequantised in every call; differentiable in x."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        w = torch.empty(d_out, d_in).uniform_(-(d_in**-0.5), d_in**-0.5)
        step = w.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((w / step).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scales", step)
        self.bias = nn.Parameter(torch.empty(d_out).uniform_(-0.3, 0.3)) if bias else None

    def dequantised(self) -> Tensor:
        """The dense weight, computed without the layer's forward."""
        scales: Tensor = self.scales  # pyright: ignore[reportAssignmentType]
        return self.weight.to(scales.dtype) * scales

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype), self.bias)


class Output(dict[str, Any]):
    """Logits and loss, by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Block(nn.Module):
    """h + down(tanh(up(h)))."""

    def __init__(self, bias: bool, kind: type[nn.Module]) -> None:
        super().__init__()
        self.up = kind(WIDTH, HIDDEN, bias)
        self.down = kind(HIDDEN, WIDTH, bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(self.up(h).tanh())


class Toy(nn.Module):
    """Two residual blocks 12 -> 20 -> 12 and a head. Tokens do not mix, rows do not mix.

    Takes vectors `x` (..., 12) or `input_ids` (batch, tokens); returns the stream after the blocks, or, with `labels`
    (batch, tokens), logits and loss.
    """

    gradient_checkpointing = False
    """Whether blocks run again in backward."""

    def __init__(self, bias: bool = True, kind: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block(bias, kind), Block(bias, kind)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(
        self,
        x: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Any:
        return self.answer(self.through(self.embed(input_ids) if x is None else x), labels)

    def through(self, h: Tensor, *more: Any) -> Tensor:
        """The stream after the blocks."""
        for layer in self.layers:
            h = checkpoint(layer, h, *more, use_reentrant=False) if self.gradient_checkpointing else layer(h, *more)  # type: ignore[assignment]
        return h

    def answer(self, h: Tensor, labels: Tensor | None) -> Any:
        """What a call returns."""
        if labels is None:
            return h
        logits = self.head(h)
        loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100)
        return Output(loss=loss, logits=logits)


class AttentionConfig:
    """What transformers' attention functions and our kind of layer read."""

    _attn_implementation = "sdpa"

    def __init__(self, width: int) -> None:
        self.hidden_size, self.num_attention_heads, self.num_key_value_heads = width, 2, 1


class ToyAttention(nn.Module):
    """Causal self-attention as transformers writes it: two heads of queries, one of keys and values."""

    def __init__(self, width: int, bias: bool, kind: type[nn.Module], layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = AttentionConfig(width), layer_idx, True
        self.num_key_value_groups, self.head_dim = 2, width // 2
        self.q_proj, self.o_proj = kind(width, width, bias), kind(width, width, bias)
        self.k_proj, self.v_proj = kind(width, width // 2, bias), kind(width, width // 2, bias)

    def forward(self, h: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend: Any = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, _ = attend(self, q, k, v, mask, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.o_proj(y.flatten(2))


class AttentiveBlock(nn.Module):
    """h + attention(h), and then as `Block`."""

    def __init__(self, width: int, bias: bool, kind: type[nn.Module], layer_idx: int) -> None:
        super().__init__()
        self.attn = ToyAttention(width, bias, kind, layer_idx)
        self.up, self.down = kind(width, width * 5 // 3, bias), kind(width * 5 // 3, width, bias)

    def forward(self, h: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        h = h + self.attn(h, mask, cache)
        return h + self.down(self.up(h).tanh())


class AttentiveToy(Toy):
    """The toy with attention and positions, for methods that stand there; needs transformers. Vectors without a token
    dimension are rows of one token."""

    def __init__(self, bias: bool = True, kind: type[nn.Module] = nn.Linear, width: int = WIDTH) -> None:
        nn.Module.__init__(self)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([AttentiveBlock(width, bias, kind, i) for i in range(2)])
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models say it."""
        return self.embed

    def forward(
        self,
        x: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        given = inputs_embeds if x is None else x
        h = self.embed(input_ids) if given is None else given
        shape, T = h.shape, h.shape[-2] if h.dim() > 2 else 1
        h = h.reshape(-1, T, h.shape[-1])
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        at = torch.arange(past, past + T, device=h.device)[None] if position_ids is None else position_ids
        waves = torch.sin(at[..., None] / torch.arange(1, h.shape[-1] + 1, device=h.device))
        mask = None
        if attention_mask is not None:
            mask = torch.ones(T, T, dtype=torch.bool, device=h.device).tril() & attention_mask[:, None, None].bool()
        return self.answer(self.through(h + waves.to(h.dtype), mask, past_key_values).view(shape), labels)


def toy(
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    kind: type[nn.Module] = nn.Linear,
    cls: type[Toy] = Toy,
    **more: Any,
) -> Toy:
    """The same model at every call, in eval mode; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        return cls(bias, kind, **more).to(dtype).eval()


def batches(dtype: torch.dtype = torch.float32, n: int = 4) -> list[dict[str, Tensor]]:
    """Calibration data: padded batches of vectors with labels, 24 tokens in each."""
    g = torch.Generator().manual_seed(99)
    found = []
    for _ in range(n):
        mask = torch.ones(4, 6, dtype=torch.long)
        mask[1, 4:] = 0
        found.append(
            {
                "x": torch.randn(4, 6, WIDTH, generator=g).to(dtype),
                "labels": torch.randint(0, VOCABULARY, (4, 6), generator=g),
                "attention_mask": mask,
            }
        )
    return found


def pairs(dtype: torch.dtype = torch.float32, n: int = 4) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Calibration data of methods that are fitted from contrast pairs: (positive batch, negative batch)."""
    found = batches(dtype, 2 * n)
    return list(zip(found[::2], found[1::2], strict=True))


def experts(
    dtype: torch.dtype = torch.float32, n: int = 3, sizes: dict[str, tuple[int, int]] | None = None
) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """What a method reads that is made of other adapters: path -> (A, B) of each of them, their ranks 2, 3, ...; those
    of the toy, or of layers of other `sizes` (d_in, d_out)."""
    g = torch.Generator().manual_seed(98)
    sizes = sizes or {f"layers.{i}.{name}": size for i in range(2) for name, size in SIZES_OF_LAYERS.items()}
    return [
        {
            p: (torch.randn(2 + k, d_in, generator=g) / d_in**0.5, torch.randn(d_out, 2 + k, generator=g) / 2)
            for p, (d_in, d_out) in sizes.items()
        }
        for k in range(n)
    ]


class Kept(NamedTuple):
    """One tensor as it was."""

    identity: int
    value: Tensor
    grad: bool


class Traits(NamedTuple):
    """What a module has beside tensors."""

    identity: int
    training: bool
    attributes: list[str]
    children: list[str]
    hooks: dict[str, list[int]]
    forward: object

    @classmethod
    def of(cls, m: nn.Module) -> Traits:
        hooks = {k: list(v) for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)}
        return cls(id(m), m.training, sorted(vars(m)), sorted(m._modules), hooks, vars(m).get("forward"))


class Snapshot:
    """Everything of a model that an adapter could leave behind: tensors, identities, flags, modes, hooks, attributes,
    the random state, its output."""

    def __init__(self, model: nn.Module, *inputs: Any, bits_only: bool = False) -> None:
        self.tensors = {
            name: Kept(id(t), t.detach().clone(), t.requires_grad)
            for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        }
        self.keys = list(model.state_dict())
        self.modules = {name: Traits.of(m) for name, m in model.named_modules(remove_duplicate=False)}
        self.inputs, self.bits_only = inputs, bits_only
        self.output = _run(model, inputs) if inputs else []
        self.rng = torch.get_rng_state()

    def difference(self, model: nn.Module) -> str:
        """What is not as it was, as a sentence; empty when nothing is."""
        if not torch.equal(self.rng, torch.get_rng_state()):
            return "the global random state moved"
        new = Snapshot(model, *self.inputs)
        return next(filter(None, (self._names(new), self._tensors(new), self._modules(new), self._output(new))), "")

    def _names(self, new: Snapshot) -> str:
        for what, old, now in (
            ("tensors", list(self.tensors), list(new.tensors)),
            ("state_dict keys", self.keys, new.keys),
            ("modules", list(self.modules), list(new.modules)),
        ):
            if old != now:
                gone, come = [k for k in old if k not in now], [k for k in now if k not in old]
                return f"{what}: gone {gone}, new {come}, or in another order"
        return ""

    def _tensors(self, new: Snapshot) -> str:
        for name, old in self.tensors.items():
            now = new.tensors[name]
            if old.value.shape != now.value.shape or not torch.equal(_bits(old.value), _bits(now.value)):
                return f"the values of {name} changed"
            if old.grad != now.grad:
                return f"requires_grad of {name} went from {old.grad} to {now.grad}"
            if old.identity != now.identity and not self.bits_only:
                return f"{name} is another object now"
        return ""

    def _modules(self, new: Snapshot) -> str:
        for name, old in self.modules.items():
            for what, a, b in zip(Traits._fields, old, new.modules[name], strict=True):
                if a != b and not (self.bits_only and what == "identity"):
                    return f"{what} of {name or 'the model'} went from {a} to {b}"
        return ""

    def _output(self, new: Snapshot) -> str:
        for a, b in zip(self.output, new.output, strict=True):
            if not torch.equal(a, b):
                return f"its output differs by {float((a - b).abs().max()):.2e}"
        return ""


def _bits(t: Tensor) -> Tensor:
    """A view whose equality is that of the bits, so that NaN equals NaN."""
    t = t.contiguous()
    return t.view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    out: Any = model(*inputs)
    if isinstance(out, dict):
        out = list(out.values())
    values = out if isinstance(out, (tuple, list)) else (out,)
    return [v.clone() for v in values if isinstance(v, Tensor)]
