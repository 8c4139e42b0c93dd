"""Rows of the usual columns in the forms that TRL knows: `text`, `prompt` and `completion`, or `messages`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import ConfigError, FileError, did_you_mean, listing
from .read import Located

Row = dict[str, Any]
Message = dict[str, Any]
COLUMNS = ("text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system",
           "chosen", "rejected", "choices", "answer")  # fmt: skip
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
"""ShareGPT's names of the roles."""
INTRO = "Below is an instruction that describes a task"
ALPACA = {
    False: INTRO + ". Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}"
    "\n\n### Response:\n",
    True: INTRO + ", paired with an input that provides further context. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
}
"""Alpaca's own prompts without and with an input, for tokenizers that have no chat template."""


def layout_of(row: Row, wordmath: bool = False, chat: bool = False, bos: bool = False) -> str | None:
    """The chat template by which a turn reads as the prompt of such a row did, where that is text; None where the row
    is laid out by the tokenizer's template or by none at all.

    Args:
        row: in TRL's form.
        wordmath: it is one of the bundled word problems.
        chat: the tokenizer has a chat template, in which whole texts are taken to be written.
        bos: the tokenizer opens every text with its first token.
    """
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return framed("", "", bos) if "text" in row and not chat else None
    if wordmath:
        return framed("Q: ", "\nA:", bos)
    if prompt.startswith(INTRO):
        before, after = ALPACA[False].split("{instruction}")
        return framed(before, after, bos)
    return framed("", "", bos)


def framed(before: str, after: str, bos: bool) -> str:
    """A chat template that puts what the user says between two texts."""
    ask = f"{{{{ {json.dumps(before)} }}}}{{{{ m['content'] }}}}{{{{ {json.dumps(after)} }}}}"
    end = "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    said = f"{{{{ m['content'] }}}}{end}"
    turn = f"{{% if m['role'] == 'user' %}}{ask}{{% else %}}{said}{{% endif %}}"
    return "{{ bos_token }}" * bos + f"{{% for m in messages %}}{turn}{{% endfor %}}"


def column_map(words: Sequence[str]) -> dict[str, str]:
    """`("prompt=question", "completion=answer")` as {"prompt": "question", ...}.

    Raises:
        ConfigError: a word has another form, or names what no row has.
    """
    found = {}
    for word in words:
        target, sign, source = word.partition("=")
        if not sign or not source or target not in COLUMNS:
            raise ConfigError(
                f"--columns takes words such as prompt=question, with one of {', '.join(COLUMNS)} on the left; got "
                f"{word!r}.{did_you_mean(target, COLUMNS)}"
            )
        found[target] = source
    return found


def formed(rows: Sequence[Located], columns: Mapping[str, str], chat: bool) -> list[Row]:
    """Every row in one of TRL's forms. `chat`: the tokenizer has a chat template, in which Alpaca's rows are written.

    Raises:
        FileError: a row has none of the known columns, or a wrong value in one; its place is named.
    """
    return [_formed(_renamed(row, where, columns), where, chat) for row, where in rows]


def _renamed(row: Row, where: str, columns: Mapping[str, str]) -> Row:
    for source in columns.values():
        if source not in row:
            raise FileError(
                f"{where}: there is no column {source!r}.{did_you_mean(source, row)} It has {listing(row)}."
            )
    return {**row, **{target: row[source] for target, source in columns.items()}}


def _formed(row: Row, where: str, chat: bool) -> Row:
    there = {name for name in COLUMNS if row.get(name) is not None}
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    if {"chosen", "rejected"} <= there:
        return _preference(row, where)
    if "messages" in there:
        return {"messages": _messages(row["messages"], where, "messages"), **tools}
    if "conversations" in there:
        return {"messages": _messages(row["conversations"], where, "conversations"), **tools}
    if {"prompt", "completion"} <= there:
        return {**_pair(row["prompt"], row["completion"], where), **tools}
    if {"instruction", "output"} <= there:
        return _alpaca(row, where, chat)
    if "text" in there:
        return {"text": _string(row["text"], where, "text")}
    raise FileError(
        f"{where}: a row needs the string 'text', 'prompt' and 'completion', 'instruction' and 'output', or the list "
        f"'messages' or 'conversations'; it has {sorted(row)}. Name other columns by --columns prompt=... "
        "completion=..."
    )


def _pair(prompt: Any, completion: Any, where: str) -> Row:
    if isinstance(prompt, list) and isinstance(completion, list):
        whole = _messages([*prompt, *completion], where, "prompt and completion")
        return {"prompt": whole[: len(prompt)], "completion": whole[len(prompt) :]}
    return {"prompt": _string(prompt, where, "prompt"), "completion": _string(completion, where, "completion")}


def _preference(row: Row, where: str) -> Row:
    """Prompt, the better answer and the worse one; a conversation that holds its prompt is cut before the last turn."""
    pair = {name: row[name] for name in ("chosen", "rejected")}
    if all(isinstance(v, list) for v in pair.values()):
        before = row["prompt"] if isinstance(row.get("prompt"), list) else []
        turns = {name: _messages([*before, *v], where, name) for name, v in pair.items()}
        if turns["chosen"][:-1] != turns["rejected"][:-1] or len(turns["chosen"]) < 2:
            raise FileError(f"{where}: chosen and rejected must answer the same turns, with one turn each.")
        return {"prompt": turns["chosen"][:-1], **{name: v[-1:] for name, v in turns.items()}}
    prompt = row.get("prompt", row.get("instruction", ""))
    return {"prompt": _string(prompt, where, "prompt"), **{k: _string(v, where, k) for k, v in pair.items()}}


def preferred(row: Row) -> Row:
    """A preference pair as a row that teaches its better answer; any other row as it is."""
    if "chosen" not in row:
        return row
    return {"prompt": row["prompt"], "completion": row["chosen"]}


def _alpaca(row: Row, where: str, chat: bool) -> Row:
    instruction = _string(row["instruction"], where, "instruction")
    extra = _string(row.get("input") or "", where, "input")
    output = _string(row["output"], where, "output")
    if not chat:
        return {"prompt": ALPACA[bool(extra)].format(instruction=instruction, input=extra), "completion": output}
    asked = f"{instruction}\n\n{extra}" if extra else instruction
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return {
        "prompt": [*system, {"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": output}],
    }


def _messages(value: Any, where: str, column: str) -> list[Message]:
    """Turns with `role` and `content`; ShareGPT's `from` and `value` are renamed."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise FileError(f"{where}: {column} is a list of objects with the strings 'role' and 'content'.")
    turns = [_turn(m, where, column) for m in value]
    if turns[-1]["role"] != "assistant":
        raise FileError(
            f"{where}: the last message is by {turns[-1]['role']!r}; it must be the assistant's, since that is what is "
            "learned."
        )
    return turns


def _turn(message: Message, where: str, column: str) -> Message:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    others = {k: v for k, v in message.items() if k in ("name", "tool_calls", "tool_call_id") and v is not None}
    if content is None and "tool_calls" in others:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise FileError(f"{where}: {column} is a list of objects with the strings 'role' and 'content'.")
    return {"role": SPEAKERS.get(role, role), "content": _written(content, where, column), **others}


def _string(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise FileError(f"{where}: the column '{column}' holds {type(value).__name__}, not a string.")
    return _written(value, where, column)


def _written(text: str, where: str, column: str) -> str:
    """Text that UTF-8 can write, as tokenizers ask; JSON can spell halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(text[e.start]):04x}"
        raise FileError(f"{where}: the column '{column}' holds half a character, {half}; write it whole.") from None
    return text


def question(row: Row) -> str | list[Message]:
    """What the model is given before it answers: text, or turns for the chat template; "" where all is learned."""
    if "messages" in row:
        return row["messages"][:-1]
    return row.get("prompt", "")


def answer(row: Row) -> str:
    """What the row teaches, as its writer wrote it."""
    row = preferred(row)
    last = row["messages"] if "messages" in row else row.get("completion", row.get("text", ""))
    return last if isinstance(last, str) else last[-1]["content"]
