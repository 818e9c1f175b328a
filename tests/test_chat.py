"""Replies of the real small model."""

import pytest

from helpers.chat import batch_replies, compare_replies, stop_tokens
from helpers.smollm2 import prepare_smollm2

QUESTIONS = [
    "What is the capital of France?",
    "Hi!",
    "Name three colours, please, and say in one short sentence each where you have seen them last in nature.",
]


@pytest.fixture(scope="module")
def chat_model():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = prepare_smollm2()
    # float32: in bfloat16 a near tie can fall the other way when the padding changes the shapes
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def conversations():
    return [[{"role": "user", "content": question}] for question in QUESTIONS]


def test_batched_replies_equal_single_ones(chat_model):
    model, tokenizer = chat_model
    batched = batch_replies(model, tokenizer, conversations(), max_new_tokens=24, batch_size=3)
    single = [batch_replies(model, tokenizer, [one], max_new_tokens=24)[0] for one in conversations()]
    assert batched == single
    assert "Paris" in batched[0]


def test_replies_stop_at_the_end_of_the_turn_and_show_no_special_tokens(chat_model):
    model, tokenizer = chat_model
    reply = batch_replies(model, tokenizer, [[{"role": "user", "content": "Say yes."}]], max_new_tokens=200)[0]
    assert reply and "<|" not in reply
    assert len(tokenizer(reply)["input_ids"]) < 190


def test_the_tokenizers_padding_side_is_restored(chat_model):
    model, tokenizer = chat_model
    tokenizer.padding_side = "right"
    batch_replies(model, tokenizer, conversations()[:1], max_new_tokens=1)
    assert tokenizer.padding_side == "right"


def test_stop_tokens_hold_the_end_of_turn(chat_model):
    model, tokenizer = chat_model
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop_tokens(tokenizer, model)


def test_side_by_side_escapes_markup():
    asked = [[{"role": "user", "content": "<b>Hi</b>"}]]
    comparison = compare_replies(asked, ["<script>x</script>"], ["fine"], names=("base", "tuned"))
    assert "<script>" not in comparison._repr_html_() and "&lt;script&gt;" in comparison._repr_html_()
    assert repr(comparison) == "[1] <b>Hi</b>\n  base: <script>x</script>\n  tuned: fine"


def test_side_by_side_needs_as_many_replies_as_prompts():
    with pytest.raises(ValueError, match="shorter"):
        compare_replies([[{"role": "user", "content": "Hi"}]], [], ["fine"])
