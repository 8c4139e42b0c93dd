"""Write docs/api.md: every public name, from its docstring.

python scripts/api_reference.py            # rewrite the page
python scripts/api_reference.py --check    # exit 1 if that would change anything
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.core.layer import Layer
from lora_lite.core.variant import Derived
from lora_lite.interop import trainer
from lora_lite.runtime.check import CheckReport
from lora_lite.runtime.merge import MergeReport

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
COMMAND = "make tables"
LAYER = Layer
"""What pages take as `layer`."""
METHODS = [v for v in ll.variants() if v.__module__.startswith("lora_lite.")]
WIDTH = 100
HEAD = f"""# API reference

Every public name, generated from the docstrings by `{COMMAND}`. `import lora_lite as ll`; `model` is any
`torch.nn.Module`. A call that raises leaves the model as it was. Shapes are written (rows, columns), weights
(d_out, d_in); `name=None` means the only adapter attached, or the only active one, unless said otherwise.
[All of lora-lite](all-of-lora-lite.md) shows these calls at work.
"""


@dataclasses.dataclass
class Group:
    """A chapter: its title, a sentence, and (name to type, object) of what it lists."""

    title: str
    about: str
    entries: list[tuple[str, Any]]


def named(names: str) -> list[tuple[str, Any]]:
    return [(f"ll.{name}", getattr(ll, name)) for name in names.split()]


def groups() -> list[Group]:
    """All chapters in their order; each public name stands in one of them."""
    tested = [(f"ll.testing.{n}", getattr(ll.testing, n)) for n in ll.testing.__all__]
    return [
        Group(
            "Attach",
            "What would be adapted, and adapting it.",
            named("plan Plan attach Adapter adapters detach rename"),
        ),
        Group(
            "Choose which adapters act",
            "From now on, in a block, or per row.",
            named("activate active rows prompt context"),
        ),
        Group(
            "Train",
            "Beside the optimiser that is already there.",
            [
                *named("check"),
                ("lora_lite.runtime.check.CheckReport", CheckReport),
                *named("schedule penalty compact precondition trainer"),
                ("ll.callbacks.SaveAdapter", ll.callbacks.SaveAdapter),
                ("lora_lite.interop.trainer.adapter_trainer", trainer.adapter_trainer),
                ("lora_lite.interop.trainer.load_checkpoint", trainer.load_checkpoint),
            ],
        ),
        Group(
            "Save and load",
            "One safetensors file per adapter.",
            named("save load AdapterStore export adapter_state_dict load_adapter_state_dict"),
        ),
        Group(
            "Merge and combine",
            "Adapters in the base weights, and adapters made of adapters.",
            [
                *named("merge"),
                ("lora_lite.runtime.merge.MergeReport", MergeReport),
                *named("unmerge merge_and_unload combine factors"),
            ],
        ),
        Group("Count the cost", "On shapes, before anything is trained.", named("cost Cost")),
        Group(
            "Configs",
            "The fields that all methods share. Every config is frozen, takes keywords only and survives JSON.",
            named("AdapterConfig BlockConfig"),
        ),
        Group(
            "Configs of the methods",
            "Each has the fields of `AdapterConfig` and these.",
            [(f"ll.{v.config.__name__}", v.config) for v in METHODS if v.config is not ll.AdapterConfig],
        ),
        Group(
            "Write a method",
            "[Adding a method](adding-a-method.md) goes from nothing to a tested one.",
            [*named("register Variant ParamSpec"), ("ll.Layer", LAYER), *named("variants get_variant")],
        ),
        Group(
            "Test a method", "The contract, for anybody's method. `ll.testing` is loaded when it is asked for.", tested
        ),
        Group(
            "Errors",
            "All inherit `LoraLiteError`; each says what is wrong, where, what is allowed and what to type instead.",
            named(
                "LoraLiteError ConfigError TargetError WeightError StateError SelectionError FileError "
                "BaseMismatchError LoraLiteWarning"
            ),
        ),
    ]


# ---- docstrings: of objects, and of what has none for Python (a bare string below a field or constant)


def bare_docs(body: list[ast.stmt]) -> dict[str, tuple[str, str]]:
    """Name -> (annotation, docstring) of the assignments in a class, a module, or a function's `self.x = ...`."""
    found: dict[str, tuple[str, str]] = {}
    for i, node in enumerate(body):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        name = target.id if isinstance(target, ast.Name) else target.attr if isinstance(target, ast.Attribute) else ""
        after = body[i + 1].value if i + 1 < len(body) and isinstance(body[i + 1], ast.Expr) else None
        text = after.value if isinstance(after, ast.Constant) and isinstance(after.value, str) else ""
        kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        found[name] = (re.sub(r"^ClassVar\[(.*)\]$", r"\1", kind), inspect.cleandoc(text))
    return found


def lineage(cls: type) -> list[type]:
    """A class and its bases in this library, without those that have an entry of their own; bases first."""
    shown = (ll.AdapterConfig, ll.BlockConfig, ll.Variant)
    return [c for c in reversed(cls.__mro__) if c.__module__.startswith("lora_lite") and (c is cls or c not in shown)]


def fields_of(cls: type) -> dict[str, tuple[str, str]]:
    """Name -> (annotation, docstring) of the public attributes that a class declares, also in `__init__`; a field
    that a class only gives another default keeps its docstring."""
    found: dict[str, tuple[str, str]] = {}
    for c in lineage(cls):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(c))).body
        assert isinstance(body, ast.ClassDef)
        inits = [node for node in body.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        for declared in (bare_docs(body.body), *(bare_docs(node.body) for node in inits)):
            for name, (kind, doc) in declared.items():
                found[name] = kind, doc or found.get(name, ("", ""))[1] or _inherited(cls, name)
    return {name: both for name, both in found.items() if name and not name.startswith("_")}


def _inherited(cls: type, name: str) -> str:
    if cls is ll.AdapterConfig or not issubclass(cls, ll.AdapterConfig):
        return ""
    return fields_of(ll.AdapterConfig).get(name, ("", ""))[1]


def members_of(cls: type) -> dict[str, Any]:
    """The public methods and properties that a class defines, in their order."""
    kinds = (property, staticmethod, classmethod, types.FunctionType)
    own = {name: value for c in lineage(cls) for name, value in vars(c).items() if isinstance(value, kinds)}
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return {name: value for name, value in own.items() if not name.startswith("_") and name not in fields}


def docstring(name: str, obj: Any) -> str:
    """The docstring of a public object; of a constant, the string below it."""
    if inspect.isclass(obj) or callable(obj):
        own = vars(obj).get("__doc__") if inspect.isclass(obj) else obj.__doc__
        return "" if own is None or own.startswith(f"{obj.__name__}(") else inspect.cleandoc(own)
    module = next(m for m in list(sys.modules.values()) if _defines(m, name.rpartition(".")[2], obj))
    return bare_docs(ast.parse(inspect.getsource(module)).body)[name.rpartition(".")[2]][1]


def _defines(module: Any, name: str, obj: Any) -> bool:
    if not getattr(module, "__name__", "").startswith("lora_lite.") or vars(module).get(name) is not obj:
        return False
    return name in bare_docs(ast.parse(inspect.getsource(module)).body)


# ---- markdown


def escaped(text: str) -> str:
    """Stars and tags outside of code are meant literally."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*<])", r"\\\1", p) for p in parts)


def prose(doc: str) -> str:
    """A docstring as markdown: paragraphs, and its sections (Args, Returns, Raises) as lists."""
    out: list[str] = []
    for part in re.split(r"\n(?=(?:Args|Returns|Yields|Raises):)", "\n" + doc):
        title, colon, rest = part.strip("\n").partition(":")
        if title in ("Args", "Returns", "Yields", "Raises"):
            out.append(section(title, rest))
        else:
            out.append(escaped(part.strip("\n")))
    return "\n\n".join(out)


def section(title: str, rest: str) -> str:
    inline, _, body = rest.partition("\n")
    body, _, example = textwrap.dedent(body).strip("\n").partition("\n\n")
    lines = [f"**{title}:**{escaped(inline)}".rstrip(), ""]
    for item in filter(None, re.split(r"\n(?=\S)", body)):
        head, colon, text = " ".join(item.split()).partition(": ")
        is_name = colon and re.fullmatch(r"[\w*, ]+", head) and title in ("Args", "Raises")
        lines.append(f"- `{head}`: {escaped(text)}" if is_name else f"- {escaped(' '.join(item.split()))}")
    if example:
        lines += ["", fenced(textwrap.dedent(example))]
    return "\n".join(lines).rstrip()


def arguments(doc: str) -> tuple[str, dict[str, str]]:
    """A dataclass's docstring without its Args, and name -> text of those."""
    head, _, rest = doc.partition("\n\nArgs:\n")
    found: dict[str, str] = {}
    for item in filter(None, re.split(r"\n(?=\S)", textwrap.dedent(rest))):
        names, _, text = " ".join(item.split()).partition(": ")
        found |= dict.fromkeys(names.split(", "), text)
    return head, found


def default_of(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if value != int(value) else repr(value)
    return getattr(value, "__name__", None) or repr(value)


def signature(name: str, function: Any, method: bool = False) -> str:
    """`name(a: int = 3) -> str`, one parameter a line where it is long."""
    sig = inspect.signature(function)
    found: list[str] = []
    for p in list(sig.parameters.values())[1 if method else 0 :]:
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        if p.kind is p.KEYWORD_ONLY and "*" not in found and not any(f.startswith("*") for f in found):
            found.append("*")
        kind = "" if p.annotation is p.empty else f": {p.annotation}"
        equals = " = " if kind else "="
        found.append(f"{star}{p.name}{kind}" + ("" if p.default is p.empty else equals + default_of(p.default)))
    back = "" if sig.return_annotation is sig.empty else f" -> {_returned(function, sig)}"
    line = f"{name}({', '.join(found)}){back}"
    return line if len(line) <= WIDTH else f"{name}(\n    " + ",\n    ".join(found) + f",\n){back}"


def _returned(function: Any, sig: inspect.Signature) -> str:
    """A context manager is written as a function that yields once."""
    text = str(sig.return_annotation)
    return "context manager" if hasattr(function, "__wrapped__") and text.startswith("Iterator") else text


def fenced(code: str) -> str:
    return f"```text\n{code}\n```"


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def items(cls: type) -> list[str]:
    """One list item per public attribute, property and method of a class."""
    defaults = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    said = arguments(docstring("", cls))[1] if defaults else {}
    is_method = issubclass(cls, ll.AdapterConfig) and cls not in (ll.AdapterConfig, ll.BlockConfig)
    lines = []
    for name, (kind, doc) in fields_of(cls).items():
        if not (is_method and name == "variant"):
            value = _default(defaults[name]) if name in defaults else _class_default(cls, name)
            kind = "bool" if kind == "Derived" else kind
            lines.append(_item(f"{name}: {kind}", value, doc or said.get(name, "")))
    for name, value in members_of(cls).items():
        if isinstance(value, property):
            back = inspect.signature(value.fget).return_annotation  # type: ignore[arg-type]
            lines.append(_item(f"{name}: {back}", "", inspect.getdoc(value) or ""))
        elif not is_method:
            bound = getattr(cls, name) if isinstance(value, classmethod) else value
            head = signature(name, bound, method=isinstance(value, types.FunctionType))
            lines.append(_item(" ".join(head.split()), "", inspect.getdoc(bound) or ""))
    return lines


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {default_of(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()!r}"
    return ""


def _class_default(cls: type, name: str) -> str:
    value = vars(cls).get(name, "")
    if isinstance(value, Derived):
        return f", from {value.since}"
    return "" if value == "" else f" = {default_of(value)}"


def _item(head: str, default: str, doc: str) -> str:
    body = textwrap.indent(prose(doc), "  ").strip()
    return f"- `{head}{default}`" + (f": {body}" if body else "")


def heading(name: str, obj: Any) -> str:
    return f"class {name}" if inspect.isclass(obj) else name


def entry(name: str, obj: Any) -> str:
    """One name: heading, signature, docstring, members."""
    out = [f"### {heading(name, obj)}"]
    if not inspect.isclass(obj):
        out += [fenced(signature(name, obj))] if callable(obj) else []
        return "\n\n".join([*out, prose(docstring(name, obj))]) + "\n"
    if issubclass(obj, ll.AdapterConfig) and obj not in (ll.AdapterConfig, ll.BlockConfig):
        out.append(_method_of(obj))
    elif dataclasses.is_dataclass(obj):
        out.append(prose(arguments(docstring(name, obj))[0]))
    else:
        out.append(prose(docstring(name, obj)))
    return "\n\n".join(filter(None, [*out, "\n".join(items(obj))])) + "\n"


def _method_of(config: type) -> str:
    """A method's config says little itself: the method's name, its formula and its source."""
    method = next(v for v in METHODS if v.config is config)
    also = " Also `positions` of `BlockConfig`." if issubclass(config, ll.BlockConfig) else ""
    return f"Method `{method.name}`.{also}\n\n{prose(inspect.cleandoc(method.__doc__ or ''))}"


def page() -> str:
    chapters = groups()
    text = HEAD + "\n"
    for group in chapters:
        links = [f"[`{name.removeprefix('ll.')}`](#{anchor(heading(name, obj))})" for name, obj in group.entries]
        text += f"- [{group.title}](#{anchor(group.title)}): {', '.join(links)}\n"
    for group in chapters:
        text += f"\n## {group.title}\n\n{group.about}\n\n"
        text += "\n".join(entry(name, obj) for name, obj in group.entries)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    new = page()
    if parser.parse_args().check:
        stale = not PAGE.is_file() or PAGE.read_text() != new
        if stale:
            print(f"docs/api.md is stale: {COMMAND}")
        return int(stale)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
