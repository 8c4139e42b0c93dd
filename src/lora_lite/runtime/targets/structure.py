"""The structure of a model: its linear layers, its stack of blocks, the width of its residual stream, the role of each
layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from ..layers.kinds import DEFAULT_KIND, KINDS, kind_named
from ..layers.linear import dims
from ..layers.tensors import bias_of
from .uncalled import AT_TIMES, NEVER, find

Stacks = list[tuple[str, nn.ModuleList | nn.Sequential]]
"""(path, list of blocks)."""
Size = tuple[int, int]
"""(d_in, d_out)."""

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
    n_layers: int = 0
    """Number of blocks in the stack it lies in, 0 outside of the blocks."""
    bypassed: str = ""
    """Why its forward is not called at times, if so."""


@dataclass(frozen=True)
class StackBlock:
    """One block of a stack."""

    path: str
    index: int
    module: nn.Module
    width: int | None
    """Of the residual stream there."""
    n_layers: int
    """Number of blocks in its stack."""


@dataclass
class Structure:
    """What `describe` found."""

    places: list[Place]
    d_model: int | None
    stacked: list[StackBlock] = field(default_factory=list)
    """Every block of every stack."""
    raw: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """(path, shape) of parameters with two or more dimensions that no linear-like layer, embedding, norm or bank of
    experts owns."""
    composite: list[Place] = field(default_factory=list)
    """Every module with modules inside but the model itself, as wide as the stream: what a config may name."""
    aliases: dict[int, list[str]] = field(default_factory=dict)
    """id of a module -> all its paths, where there are several."""

    @property
    def n_layers(self) -> int:
        """Number of blocks in the longest stack."""
        return max((block.n_layers for block in self.stacked), default=0)

    @property
    def blocks(self) -> list[tuple[str, int, nn.Module]]:
        """(path, index, module) of every block."""
        return [(block.path, block.index, block.module) for block in self.stacked]


def describe(model: nn.Module) -> Structure:
    """Read a model's structure from its modules; reads shapes only, so it works on the meta device."""
    linear = [(path, size) for path, m in kind_named(DEFAULT_KIND).find(model, None) if (size := dims(m)) is not None]
    stacks = _block_stacks(model)
    d_model = _width(model, linear, stacks)
    blocks = [block for path, stack in stacks for block in _blocks_of(path, stack, linear, d_model)]
    places = _places(model, blocks, d_model)
    layers = [s.module for s in places if not kind_named(s.kind).apart]
    owned = {id(p) for m in layers for p in m.parameters()}
    owned |= {id(t) for m in layers for t in (getattr(m, "weight", None), bias_of(m))}
    raw = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.dim() >= 2 and id(p) not in owned]
    return Structure(places, d_model, blocks, raw, _composite(model, blocks, d_model), _aliases(model))


def _composite(model: nn.Module, blocks: list[StackBlock], d_model: int | None) -> list[Place]:
    """Every module with modules inside but the model and lists of modules, as wide as the stream around it."""
    by_path = {block.path: block for block in blocks}
    found: list[Place] = []
    for path, module in model.named_modules():
        if not path or isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not any(True for _ in module.children()):
            continue
        block = next((by_path[p] for p in _above(path) if p in by_path), None)
        width = d_model if block is None else block.width
        if width is not None:
            layer, n = (None, 0) if block is None else (block.index, block.n_layers)
            found.append(Place(path, module, width, width, layer, "inner", n_layers=n))
    return found


def _places(model: nn.Module, blocks: list[StackBlock], d_model: int | None) -> list[Place]:
    """Every layer of a known kind, kind by kind; a module that two kinds know belongs to the first."""
    head, by_path = _output_head(model), {block.path: block for block in blocks}
    uncalled, bypassed = find(model, NEVER), find(model, AT_TIMES)
    found: dict[int, Place] = {}
    for kind in KINDS.values():
        for path, module in kind.find(model, d_model):
            size = kind.size(module)
            if size is None or id(module) in found:
                continue
            block = next((by_path[p] for p in _above(path) if p in by_path), None)
            layer, n = (None, 0) if block is None else (block.index, block.n_layers)
            role = role_of(path, *size, d_model if block is None else block.width) if kind.plain_vectors else "inner"
            is_head = kind.inside_blocks and (module is head or (layer is None and HEADS.search(path) is not None))
            why = uncalled.get(path, ""), bypassed.get(path, "")
            found[id(module)] = Place(path, module, *size, layer, role, is_head, why[0], kind.name, n, why[1])
    return list(found.values())


def _above(path: str) -> Iterator[str]:
    """The paths of the modules that hold this one, the outermost first, then its own."""
    parts = path.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """id of a module -> all its paths, where there are several."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return {k: v for k, v in paths.items() if len(v) > 1}


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
    """Composite children, of one class or called layers, with a linear layer in one of them. A list of one block is a
    stack too, as the middle of a U-Net; a sequence of one module is a wrapper, unless it is called layers."""
    named = re.search(r"(^|\.)(layers|layer|h|block|blocks)$", path) is not None
    composite = len(module) > 0 and all(any(True for _ in child.children()) for child in module)
    if not composite or not any(dims(m) for child in module for m in child.modules()):
        return False
    alike, is_list = len({type(child) for child in module}) == 1, isinstance(module, nn.ModuleList)
    return (alike and (len(module) > 1 or is_list or named)) or (named and is_list)


def _blocks_of(
    path: str, stack: nn.ModuleList | nn.Sequential, found: list[tuple[str, Size]], d_model: int | None
) -> list[StackBlock]:
    """The blocks of a stack, each with the width of its stream: that of the model; of the stack, where it never occurs
    in it (the towers of a multimodal model); or of the block itself, where the stack grows wider from stage to
    stage."""
    paths = [f"{path}.{name}" if path else name for name in stack._modules]
    inside: dict[str, list[Size]] = {p: [] for p in paths}
    for layer, size in found:
        for p in _above(layer):
            if p in inside:
                inside[p].append(size)
    everything = [size for sizes in inside.values() for size in sizes]
    width = d_model if any(d_model in size for size in everything) else _commonest(everything)
    steady = all(any(width in size for size in sizes) for sizes in inside.values() if sizes)
    widths = [width if steady or not inside[p] else _commonest(inside[p]) for p in paths]
    return [
        StackBlock(p, i, block, w, len(stack)) for i, (p, block, w) in enumerate(zip(paths, stack, widths, strict=True))
    ]


def _commonest(sizes: list[Size]) -> int | None:
    """The width that most layers read or write; the smallest of several, never simply the largest."""
    count = Counter(side for size in sizes for side in size)
    return min((width for width, n in count.items() if n == max(count.values())), default=None)


def _width(model: nn.Module, found: list[tuple[str, Size]], stacks: Stacks) -> int | None:
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
    prefixes = tuple(f"{path}." if path else "" for path, _ in stacks)
    inside = [size for path, size in found if path.startswith(prefixes)]
    return _commonest(inside or [size for _, size in found])


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Module) else None


def transformer_inside(model: nn.Module) -> tuple[str, nn.Module]:
    """(path, module) of the one transformer in a container, as in a sentence-transformer; ("", model) where the model
    is a transformer itself or holds none or several."""
    if callable(getattr(model, "save_pretrained", None)) and hasattr(model, "config_class"):
        return "", model
    inside: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if hasattr(module, "config_class") and not any(path.startswith(f"{outer}.") for outer, _ in inside):
            inside.append((path, module))
    return inside[0] if len(inside) == 1 else ("", model)


def home_of(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Where layers of these names are: in the transformer inside a container, where they are all in there and none is
    a layer of the container."""
    inside = transformer_inside(model)[1]
    outer, inner = dict(model.named_modules()), dict(inside.named_modules())
    found = list(paths)
    return inside if found and all(p in inner and p not in outer for p in found) else model
