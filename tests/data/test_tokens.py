"""Tokens and labels are those of SFTTrainer, for templates that went wrong before."""

from __future__ import annotations

import pytest

import tiny_llm
from lora_lite import ConfigError, FileError
from lora_lite.data.batches import batches, collate
from lora_lite.data.forms import formed, layout_of
from lora_lite.data.tokens import IGNORED, PLAIN, closing_ids, prompt_ids, tokenised

pytest.importorskip("trl")
TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]
CHATML = (
    "{{ bos_token }}{% for m in messages %}({{ m['role'] }}) {{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant) {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}(assistant) {% generation %}{{ m['content'] }}<end>"
    "{% endgeneration %}{% else %}({{ m['role'] }}) {{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}(assistant) {% endif %}"
)
THINKING = CHATML.replace("(assistant) {% endif %}", "(assistant) #{% endif %}")
"""Its generation prompt opens a thought that finished answers do not have."""
FORGETFUL = (
    "{% for m in messages %}({{ m['role'] }}){% if loop.last %} {{ m['content'] }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)


def tokenizer(template: str | None = CHATML, bos: bool = False):
    tok = tiny_llm.tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<end>"]})
    if bos:
        from tokenizers.processors import TemplateProcessing

        tok.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tok.chat_template = template
    return tok


def by_trl(rows, tok, **options):
    """What a whole SFTTrainer would train on."""
    import tempfile

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, bf16=False, report_to=[], gradient_checkpointing=False, **options)
        trainer = SFTTrainer(tiny_llm.model(), args, train_dataset=Dataset.from_list(rows), processing_class=tok)
        return [{k: list(row[k]) for k in ("input_ids", "labels")} for row in trainer.train_dataset]


def learned(row, tok) -> str:
    return tok.decode([label for label in row["labels"] if label != IGNORED])


CHAT = [{"prompt": TURNS[:1], "completion": TURNS[1:2]}, {"prompt": TURNS[:3], "completion": TURNS[3:]}]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, THINKING], ids=["chatml", "thinking"])
def test_chat_rows_are_those_of_trl(template, bos):
    tok = tokenizer(template, bos)
    made = tokenised(CHAT, tok)
    assert made.rows == by_trl(CHAT, tok)
    assert all(row["input_ids"].count(tok.bos_token_id) == 1 for row in made.rows)
    assert [learned(row, tok).count("<end>") for row in made.rows] == [1, 1]


@pytest.mark.parametrize("bos", [False, True])
def test_text_rows_are_those_of_trl(bos):
    tok = tokenizer(None, bos)
    for rows in ([{"text": "abc"}, {"text": "d<eos>"}], [{"prompt": "1+1=", "completion": "2"}]):
        assert tokenised(rows, tok).rows == by_trl(rows, tok)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("row", "asked"),
    [({"instruction": "Add 1.", "output": "2"}, "Add 1."), ({"prompt": "Add 1.", "completion": "2"}, "Add 1."),
     ({"prompt": "Q: Add 1.\nA:", "completion": "2"}, "Add 1."), ({"text": "Add 1."}, "Add 1.")],
    ids=["alpaca", "prompt", "wordmath", "text"],
)  # fmt: skip
def test_a_turn_is_asked_as_the_prompts_of_its_rows_were(row, asked, bos):
    tok = tokenizer(None, bos)
    formed_row = formed([(row, "here")], {}, chat=False)[0]
    layout = layout_of(formed_row, wordmath="Q:" in str(row), bos=bos)
    turns = [{"role": "user", "content": asked}]
    want = prompt_ids(formed_row.get("prompt", formed_row.get("text")), tok)
    assert prompt_ids(turns, tok, layout) == want and want.count(tok.bos_token_id) == bos
    longer = [*turns, {"role": "assistant", "content": "2"}, *turns]
    text = tok.decode(prompt_ids(longer, tok, layout))
    assert text.count("Add 1.") == 2 and "2<eos>" in text and text.count("<bos>") == bos


def test_turns_are_laid_out_by_the_tokenizer():
    for row in ({"messages": TURNS}, {"prompt": TURNS[:1], "completion": TURNS[1:2]}):
        assert layout_of(row) is layout_of(row, chat=True) is None
    assert layout_of({"text": "<|user|>1"}, chat=True) is None  # whole texts are taken to hold the template's marks


def test_marks_of_the_template_are_followed():
    tok = tokenizer(MARKED)
    rows = [{"messages": TURNS}, {"messages": TURNS[:2]}]
    made = tokenised(rows, tok)
    assert made.rows == by_trl(rows, tok, assistant_only_loss=True)
    assert learned(made.rows[0], tok) == "2<end>4<end>"


def test_every_turn_or_the_last_is_learned_without_marks_too():
    tok = tokenizer(CHATML)
    rows = [{"messages": TURNS}, {"messages": [TURNS[1], *TURNS[:2]]}]
    every, last = tokenised(rows, tok), tokenised(rows, tok, turns="last")
    assert [learned(row, tok) for row in every.rows] == ["2<end>\n4<end>\n", "2<end>\n"]
    assert [learned(row, tok) for row in last.rows] == ["4<end>\n", "2<end>\n"]
    assert every.rows[0]["input_ids"] == last.rows[0]["input_ids"]
    assert last.rows == by_trl([{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows], tok)


def test_a_template_that_forgets_earlier_turns_is_refused_for_every_turn():
    tok = tokenizer(FORGETFUL)
    with pytest.raises(FileError, match="--turns last"):
        tokenised([{"messages": TURNS}], tok)


def test_the_template_of_tokenizers_without_one():
    tok = tokenizer(PLAIN)
    row = tokenised([{"messages": TURNS}], tok).rows[0]
    assert tok.decode(row["input_ids"]) == "user: 1+1?\nassistant: 2<eos>\nuser: And 2+2?\nassistant: 4<eos>\n"
    assert learned(row, tok) == " 2<eos> 4<eos>"


def test_rows_of_all_forms_keep_their_order():
    tok = tokenizer(CHATML)
    rows = [{"text": "abc"}, {"messages": TURNS[:2]}, {"prompt": "1+1=", "completion": "2"}, {"text": "z"}]
    assert [learned(r, tok) for r in tokenised(rows, tok).rows] == ["abc<eos>", "2<end>\n", "2<eos>", "z<eos>"]


def test_what_is_cut_off_or_empty_is_counted_and_said():
    tok = tokenizer(None)
    rows = [
        {"prompt": "12", "completion": "3"},
        {"prompt": "12", "completion": "3456789"},
        {"prompt": "0123456789", "completion": "1"},
        {"prompt": "1", "completion": " "},
    ]
    made = tokenised(rows, tok, 6)
    assert (made.cut, made.lost, made.empty, made.kept) == (1, 1, 1, [0, 1, 3])
    assert made.rows == by_trl(rows, tok, max_length=6)
    said = " ".join(made.remarks(6))
    assert "1 rows are left out: --max-length 6" in said and "1 rows are cut" in said and "empty answer" in said
    end = tokenised(rows, tok, 6, truncation="keep_end")
    assert tok.decode(end.rows[2]["input_ids"]) == "67891<eos>" and end.lost == 0


def test_what_trl_warns_of_is_said(capfd):
    made = tokenised([{"prompt": TURNS[:1], "completion": TURNS[1:2]}], tokenizer(THINKING.replace("#", "##")))
    assert any("not a prefix" in note for note in made.notes) or not made.notes  # TRL says it once a process
    assert "prefix" not in capfd.readouterr().err


def test_a_tokenizer_without_an_end_is_refused():
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        tokenised([{"text": "a"}], tok)


def test_a_template_that_refuses_rows_is_named():
    tok = tokenizer("{{ raise_exception('only one turn') }}")
    with pytest.raises(FileError, match="refuses these rows: only one turn"):
        tokenised([{"messages": TURNS}], tok)


def test_prompts_and_their_ends():
    tok = tokenizer(CHATML, bos=True)
    assert tok.decode(prompt_ids(TURNS[:1], tok)) == "<bos>(user) 1+1?<end>\n(assistant) "
    assert tok.decode(prompt_ids("1+1=", tok)) == "<bos>1+1="
    assert closing_ids(tok) == sorted([tok.eos_token_id, tok.convert_tokens_to_ids("<end>")])
    assert closing_ids(tokenizer(None)) == [tok.eos_token_id]


def test_batches_are_padded_on_the_right_and_padding_is_not_learned():
    rows = [{"input_ids": [5, 6], "labels": [IGNORED, 6]}, {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}]
    batch = collate(rows, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].sum(1).tolist() == [2, 3]
    assert batch["labels"][0].tolist() == [IGNORED, 6, IGNORED]
    assert [b["input_ids"].shape[0] for b in batches(rows * 3, 4, 0)] == [4, 2]
