"""Replies of the real small model."""

import copy
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers.chat.replies import (
    ChatError,
    batch_replies,
    count_tokens,
    encode_prompts,
    render_prompt,
    stop_tokens,
    stream_reply,
    trim_conversation,
)
from tests.maintain.smollm2 import prepare_smollm2

ROOT = Path(__file__).resolve().parent.parent
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


def test_prompts_are_padded_on_the_left_and_the_mask_hides_it(chat_model):
    _, tokenizer = chat_model
    batch = encode_prompts(tokenizer, conversations())
    short = len(tokenizer(render_prompt(tokenizer, conversations()[1]), add_special_tokens=False).input_ids)
    assert batch["attention_mask"][1].tolist() == [0] * (batch["input_ids"].shape[1] - short) + [1] * short


@pytest.mark.parametrize("kind", ["llama-3.1", "smollm2", "gemma"])
def test_the_prompt_is_how_training_texts_begin(kind, shared_tokenizer):
    from helpers.template.check import check_template, training_text

    tokenizer = shared_tokenizer(kind)
    assert not {"double_bos", "bos_differs", "prompt_not_prefix"} & set(check_template(tokenizer).problems)
    question = [{"role": "user", "content": " Hi\n"}]
    trained = training_text(tokenizer, [*question, {"role": "assistant", "content": "Yes."}])
    prompt = encode_prompts(tokenizer, [question])["input_ids"][0].tolist()
    assert tokenizer(trained).input_ids[: len(prompt)] == prompt
    assert prompt[:2].count(tokenizer.bos_token_id) == (1 if tokenizer.bos_token else 0)


def test_two_bos_tokens_are_refused(shared_tokenizer):
    tokenizer = copy.deepcopy(shared_tokenizer("llama-3.1"))
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(ChatError, match="two <.begin_of_text.>"):
        render_prompt(tokenizer, conversations()[0])


def test_a_missing_bos_token_is_refused_where_training_has_one(shared_tokenizer):
    tokenizer = copy.deepcopy(shared_tokenizer("llama-3.1"))
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token }}", "")
    with pytest.raises(ChatError, match="no <.begin_of_text.> at its start, expected one such token"):
        render_prompt(tokenizer, conversations()[0])


def test_the_streamed_pieces_are_the_reply(chat_model):
    model, tokenizer = chat_model
    pieces = []
    reply = stream_reply(model, tokenizer, conversations()[0], on_text=pieces.append, max_new_tokens=24)
    assert "".join(pieces).strip() == reply.text == batch_replies(model, tokenizer, conversations()[:1])[0]
    assert len(pieces) > 3
    assert 0 < reply.seconds_to_first_token < reply.seconds
    assert reply.ended_by == "end of turn"
    assert reply.tokens_per_second == (reply.tokens - 1) / (reply.seconds - reply.seconds_to_first_token)


def test_a_reply_is_cut_at_its_limit_and_says_so(chat_model):
    reply = stream_reply(*chat_model, conversations()[2], max_new_tokens=3)
    assert (reply.tokens, reply.ended_by) == (3, "max_new_tokens")


def test_a_reply_can_be_stopped(chat_model):
    stop, pieces = threading.Event(), []

    def stop_after_three(text):
        pieces.append(text)
        if len(pieces) == 3:
            stop.set()

    reply = stream_reply(*chat_model, conversations()[2], on_text=stop_after_three, max_new_tokens=200, stop=stop)
    assert reply.ended_by == "stop"
    assert 3 <= reply.tokens < 20


def test_sampling_draws(chat_model):
    import torch

    torch.manual_seed(1)
    drawn = {stream_reply(*chat_model, conversations()[2], max_new_tokens=12, temperature=1.5).text for _ in range(4)}
    assert len(drawn) > 1


def test_min_p_leaves_out_what_is_less_likely(chat_model):
    """At 1.0 only the likeliest token is left, however flat the distribution: the greedy reply."""
    import torch

    torch.manual_seed(1)
    options = dict(max_new_tokens=12)
    drawn = stream_reply(*chat_model, conversations()[2], temperature=1.5, min_p=1.0, **options)
    assert drawn.text == stream_reply(*chat_model, conversations()[2], **options).text


UNSLOTH = """
import json, sys
from unsloth import FastLanguageModel
import torch
from helpers.chat.replies import batch_replies, stream_reply
folder, *questions = json.loads(sys.argv[1])
model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype=torch.float32, load_in_4bit=False)
FastLanguageModel.for_inference(model)
conversations = [[{"role": "user", "content": question}] for question in questions]
batched = batch_replies(model, tokenizer, conversations, max_new_tokens=24, batch_size=3)
single = [batch_replies(model, tokenizer, [one], max_new_tokens=24)[0] for one in conversations]
streamed = [stream_reply(model, tokenizer, one, max_new_tokens=24).text for one in conversations]
print(json.dumps([batched, single, streamed]))
"""


@pytest.mark.slow
def test_batched_replies_equal_single_ones_through_unsloth():
    """In a process of its own: Unsloth patches Transformers, and its inference mode has its own way to generate."""
    given = json.dumps([str(prepare_smollm2()), *QUESTIONS])
    done = subprocess.run([sys.executable, "-c", UNSLOTH, given], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    batched, single, streamed = json.loads(done.stdout.splitlines()[-1])
    assert batched == single == streamed
    assert "Paris" in batched[0]


LONG = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "First question " * 20},
    {"role": "assistant", "content": "First answer " * 20},
    {"role": "user", "content": "Second question " * 20},
    {"role": "assistant", "content": "Second answer " * 20},
    {"role": "user", "content": "Third question"},
]


def test_a_conversation_is_trimmed_by_whole_turns(shared_tokenizer):
    tokenizer = shared_tokenizer("smollm2")
    whole = count_tokens(tokenizer, LONG) + 10
    fits = dict(max_new_tokens=10)
    assert trim_conversation(tokenizer, LONG, max_seq_length=whole, **fits) == (LONG, 0)
    assert trim_conversation(tokenizer, LONG, max_seq_length=whole - 1, **fits) == ([LONG[0], *LONG[3:]], 2)
    least = [LONG[0], LONG[5]]
    assert trim_conversation(tokenizer, LONG, max_seq_length=count_tokens(tokenizer, least) + 10, **fits) == (least, 4)


def test_counting_a_conversation_that_is_too_long_warns_of_nothing(shared_tokenizer):
    tokenizer = copy.deepcopy(shared_tokenizer("smollm2"))
    tokenizer.model_max_length, warned = 8, "sequence-length-is-longer-than-the-specified-maximum"
    assert count_tokens(tokenizer, LONG) > 8
    assert warned not in tokenizer.deprecation_warnings
    tokenizer(LONG[1]["content"])
    assert warned in tokenizer.deprecation_warnings


def test_a_question_that_does_not_fit_is_refused(shared_tokenizer):
    with pytest.raises(ChatError, match="the last question: found .* expected at most 20 in all"):
        trim_conversation(shared_tokenizer("smollm2"), LONG, max_seq_length=20, max_new_tokens=10)


def test_stop_tokens_hold_the_end_of_turn(chat_model):
    model, tokenizer = chat_model
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop_tokens(tokenizer, model)
