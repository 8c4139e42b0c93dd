"""The structure of a model: its linear layers, its stack of blocks, the width of its residual stream, the role of each
layer."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..layers.kinds import DEFAULT_KIND, KINDS, kind_named
from ..layers.linear import dims
from ..layers.tensors import bias_of

Stacks = list[tuple[str, nn.ModuleList | nn.Sequential]]
"""(path, list of blocks)."""

# A square layer says nothing by its shape. Common names decide; unknown ones are "inner".
# Low-rank queries and keys, and the steps of state-space mixers, lie inside a block whatever their shape.
INNER = re.compile(r"(^|[._])(q_b_proj|kv_b_proj|k_b_proj|v_b_proj|dt_proj|x_proj)$")
READS = re.compile(
    r"(^|[._])(q|k|v|query|key|value|qkv|q_proj|k_proj|v_proj|qkv_proj|in_proj|c_attn|c_fc|query_key_value|fc1|wi|wi_0|wi_1|gate|up|gate_proj|up_proj|"
    r"gate_up_proj|to_q|to_k|to_v|w1|w3|intermediate\.dense|dense_h_to_4h|lin1|q_lin|k_lin|v_lin|linear1|fc_in|query_proj|key_proj|value_proj)$"
)
WRITES = re.compile(
    r"(^|[._])(o|o_proj|out_proj|c_proj|fc2|wo|down|down_proj|to_out\.0|out_lin|lin2|w2|output\.dense|dense_4h_to_h|attention\.dense|self_attention\.dense|proj|linear2|fc_out)$"
)
HEADS = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs|lm_head\.decoder|head|cls\.predictions\.decoder|output_projection)$"
)


@dataclass(frozen=True)
class Place:
    """One layer of a model that a method may stand on."""

    path: str
    module: nn.Module
    d_in: int
    d_out: int
    layer: int | None
    """Index of the block it lies in, None outside of the blocks."""
    role: str
    """reader, writer, inner."""
    is_head: bool = False
    uncalled: str = ""
    """Why its forward is never called, if so."""
    kind: str = DEFAULT_KIND


@dataclass
class Structure:
    """What `describe` found."""

    places: list[Place]
    d_model: int | None
    n_layers: int
    blocks: list[tuple[str, int, nn.Module]] = field(default_factory=list)
    """(path, index, module) of every block."""
    raw: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """(path, shape) of parameters with two or more dimensions that no linear-like layer, embedding, norm or bank of
    experts owns."""
    aliases: dict[int, list[str]] = field(default_factory=dict)
    """id of a module -> all its paths, where there are several."""


def describe(model: nn.Module) -> Structure:
    """Read a model's structure from its modules; reads shapes only, so it works on the meta device."""
    stacks = _block_stacks(model)
    blocks = [(f"{path}.{i}" if path else str(i), i, block) for path, stack in stacks for i, block in enumerate(stack)]
    linear = [(path, size) for path, m in kind_named(DEFAULT_KIND).find(model, None) if (size := dims(m)) is not None]
    d_model = _width(model, [(size, _block_index(path, stacks)) for path, size in linear])
    places = _places(model, stacks, d_model, _stack_widths(stacks, linear, d_model))
    layers = [s.module for s in places if not kind_named(s.kind).apart]
    owned = {id(p) for m in layers for p in m.parameters()}
    owned |= {id(t) for m in layers for t in (getattr(m, "weight", None), bias_of(m))}
    raw = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.dim() >= 2 and id(p) not in owned]
    n_layers = max((len(stack) for _, stack in stacks), default=0)
    return Structure(places, d_model, n_layers, blocks, raw, _aliases(model))


def _places(model: nn.Module, stacks: Stacks, d_model: int | None, widths: dict[str, int | None]) -> list[Place]:
    """Every layer of a known kind, kind by kind; a module that two kinds know belongs to the first."""
    head, uncalled = _output_head(model), _uncalled(model)
    found: dict[int, Place] = {}
    for kind in KINDS.values():
        for path, module in kind.find(model, d_model):
            size = kind.size(module)
            if size is None or id(module) in found:
                continue
            layer, role = _block_index(path, stacks), "inner"
            if kind.plain_vectors:
                role = role_of(path, *size, next((w for p, w in widths.items() if path.startswith(p)), d_model))
            is_head = kind.inside_blocks and (module is head or (layer is None and HEADS.search(path) is not None))
            why = uncalled.get(path, "")
            found[id(module)] = Place(path, module, *size, layer, role, is_head, why, kind.name)
    return list(found.values())


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """id of a module -> all its paths, where there are several."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return {k: v for k, v in paths.items() if len(v) > 1}


def _uncalled(model: nn.Module) -> dict[str, str]:
    """Path -> why its forward is never called."""
    return {
        f"{path}.out_proj" if path else "out_proj": "nn.MultiheadAttention passes its weight to a function"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def role_of(path: str, d_in: int, d_out: int, d_model: int | None) -> str:
    """reader: takes the residual stream; writer: adds to it; inner: neither, or a square layer whose name says
    nothing."""
    if d_model is None or (d_in != d_model and d_out != d_model) or INNER.search(path):
        return "inner"
    if d_in != d_out:
        if d_in == d_model:
            return "reader"
        return "inner" if READS.search(path) else "writer"  # keys of another width, as in cross-attention
    if READS.search(path):
        return "reader"
    return "writer" if WRITES.search(path) else "inner"


def _block_stacks(model: nn.Module) -> Stacks:
    """The outermost lists of like children that hold linear layers: `model.layers`, `transformer.h`, `encoder.block`,
    ..."""
    stacks: Stacks = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{p}." if p else "") and path != p for p, _ in stacks)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not inside and _is_stack(path, module):
            stacks.append((path, module))
    return stacks


def _is_stack(path: str, module: nn.ModuleList | nn.Sequential) -> bool:
    """Composite children, of one class or called layers, with a linear layer in one of them."""
    named = re.search(r"(^|\.)(layers|layer|h|block|blocks)$", path) is not None
    composite = len(module) > 0 and all(any(True for _ in child.children()) for child in module)
    if not composite or not any(dims(m) for child in module for m in child.modules()):
        return False
    alike = len({type(child) for child in module}) == 1
    return (alike and (len(module) > 1 or named)) or (named and isinstance(module, nn.ModuleList))


def _block_index(path: str, stacks: Stacks) -> int | None:
    for stack, _ in stacks:
        prefix = f"{stack}." if stack else ""
        if path.startswith(prefix):
            segment = path[len(prefix) :].split(".", 1)[0]
            if segment.isdigit():
                return int(segment)
    return None


def _stack_widths(
    stacks: Stacks,
    found: list[tuple[str, tuple[int, int]]],
    d_model: int | None,
) -> dict[str, int | None]:
    """Prefix -> width, for stacks whose stream is not of the model's width (the towers of a multimodal model)."""
    widths: dict[str, int | None] = {}
    for stack, _ in stacks:
        prefix = f"{stack}." if stack else ""
        sizes = [size for path, size in found if path.startswith(prefix)]
        if not any(d_model in size for size in sizes):
            widths[prefix] = _commonest(sizes)
    return widths


def _commonest(sizes: list[tuple[int, int]]) -> int | None:
    """The width that most layers read or write; the smallest of several, never simply the largest."""
    count = Counter(side for size in sizes for side in size)
    return min((width for width, n in count.items() if n == max(count.values())), default=None)


def _width(model: nn.Module, found: list[tuple[tuple[int, int], int | None]]) -> int | None:
    """d_model: from the config, else the size most layers of the blocks read or write."""
    config = getattr(model, "config", None)
    for holder in (
        config,
        getattr(config, "text_config", None),
        getattr(config, "decoder", None),
        getattr(config, "encoder", None),
    ):
        for name in ("hidden_size", "n_embd", "d_model", "dim", "model_dim"):
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    inside = [size for size, layer in found if layer is not None] or [size for size, _ in found]
    return _commonest(inside)


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Module) else None
