"""The chat box with the real small model: what it remembers, shows, escapes and saves. The browser: test_browser.py."""

import json
import sys
import threading
import time
import types

import pytest
from train_once import shallow_smollm2

from helpers.chat.box import ChatBox, Exchange, has_reader
from helpers.chat.replies import batch_replies, stream_reply

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The small model's lowest layers with an adapter that changes their replies."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "shallow"
    shallow_smollm2(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def box(tuned):
    return ChatBox(*tuned, max_seq_length=512, max_new_tokens=12)


def test_base_and_tuned_answer_from_one_model(box, tuned):
    box.sides = ("tuned", "base")
    box.ask(QUESTION)
    replies = box.exchanges[0].replies
    model, tokenizer = tuned
    with model.disable_adapter():
        base = stream_reply(model, tokenizer, [{"role": "user", "content": QUESTION}], max_new_tokens=12)
    assert replies["base"] == base.text
    assert replies["tuned"] != replies["base"]


def test_each_side_remembers_its_own_replies(box):
    box.system = "Be kind."
    box.exchanges += [Exchange("one", {"tuned": "t1", "base": "b1"}), Exchange("two", {"tuned": "t2"})]
    assert [turn["content"] for turn in box.conversation("tuned")] == ["Be kind.", "one", "t1", "two", "t2"]
    assert [turn["content"] for turn in box.conversation("base")] == ["Be kind.", "one", "b1"]


def test_what_no_longer_fits_is_said(box):
    box.max_seq_length = 120
    box.exchanges.append(Exchange("word " * 60, {"tuned": "word " * 40}))
    box.ask(QUESTION)
    assert "tuned: the oldest 2 messages no longer fit and are not seen" in box.exchanges[1].notes
    assert "are not seen" in box.html()


def test_markup_is_shown_and_not_executed(box):
    box.exchanges.append(Exchange("<img src=x onerror=alert(1)>", {"tuned": "<script>alert(2)</script>"}, ["<b>"]))
    for text in ("<img", "<script", "<b>\n<"):
        assert text not in box.html()
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in box.html()


def test_the_transcript_is_a_data_set(box, tmp_path):
    from helpers.conversations import read_conversations

    box.system = "Be kind."
    box.exchanges.append(Exchange("Grüße?", {"tuned": "你好", "base": ""}))
    path = box.save_transcript(tmp_path / "my talk.jsonl")
    turns = [("system", "Be kind."), ("human", "Grüße?"), ("gpt", "你好")]
    row = {"model": "tuned", "conversations": [{"from": who, "value": text} for who, text in turns]}
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [row]
    dataset, _ = read_conversations(path)
    assert [turn["content"] for turn in dataset[0]["conversations"]] == [text for _, text in turns]


def test_headless_it_asks_the_script(box, capsys):
    assert not has_reader()
    box.show(script=[QUESTION, "And of Spain?"])
    printed = capsys.readouterr().out
    assert printed.count("you: ") == 2 and printed.count("tuned: ") == 2 and printed.count("base: ") == 2


def test_a_run_without_a_reader_says_so_itself(monkeypatch):
    """Colab's kernel cannot be asked: there, what `tests.maintain.series` sets decides."""
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    assert has_reader()
    monkeypatch.setenv("HEADLESS", "1")
    assert not has_reader()


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_the_widgets_work(box, tmp_path):
    box.widget(save_to=tmp_path / "talk.jsonl")
    widgets = box._widgets
    widgets["sides"].value = "both, side by side"
    widgets["system"].value = "Be brief."
    widgets["max_new_tokens"].value = 8
    assert (box.sides, box.system, box.max_new_tokens) == (("tuned", "base"), "Be brief.", 8)
    widgets["question"].value = QUESTION
    widgets["send"].click()
    assert widgets["send"].disabled and not widgets["stop"].disabled and widgets["question"].value == ""
    wait_until(lambda: not widgets["send"].disabled)
    assert "tuned model" in widgets["history"].value and "base model" in widgets["history"].value
    widgets["save"].click()
    assert (tmp_path / "talk.jsonl").exists() and "talk.jsonl" in widgets["status"].value
    widgets["reset"].click()
    assert box.exchanges == [] and widgets["history"].value == ""


STORY = "Tell me a very long story about a lighthouse, with many chapters."


def test_the_stop_button_ends_a_reply(box):
    box.widget()
    widgets = box._widgets
    widgets["max_new_tokens"].value = 256
    widgets["sides"].value = "base model"
    widgets["question"].value = STORY
    widgets["send"].click()
    wait_until(lambda: box.exchanges and box.exchanges[0].replies.get("base"))
    widgets["stop"].click()
    wait_until(lambda: not widgets["send"].disabled)
    note = box.exchanges[0].notes[-1]
    assert note.endswith(", stop")  # left alone, the reply ends at its limit
    assert int(note.split()[1]) < 200


def test_stop_skips_the_side_that_has_not_begun(box):
    box.widget()
    widgets = box._widgets
    widgets["max_new_tokens"].value = 256
    box.sides = ("base", "tuned")  # the base model first: this adapter's replies are noise, and may be short
    widgets["question"].value = STORY
    widgets["send"].click()
    wait_until(lambda: box.exchanges and box.exchanges[0].replies.get("base"))
    widgets["stop"].click()
    wait_until(lambda: not widgets["send"].disabled)
    assert list(box.exchanges[0].replies) == ["base"]
    assert box.exchanges[0].notes[-1] == "tuned: not asked, you pressed Stop"
    assert box.conversation("tuned") == []
    assert [row["model"] for row in box.transcript()] == ["base"]


def test_both_replies_stand_in_two_columns(box):
    box.exchanges.append(Exchange("Hi", {"tuned": "t1", "base": "b1"}, ["note"]))
    columns = box.html().split("display:flex")[1]
    assert columns.index("t1") < columns.index("b1")
    inside = columns[: columns.index("b1")]
    assert inside.count("<div") - inside.count("</div>") == 1  # b1's own: the row is still open, t1 is closed
    assert "flex:1" in inside and "display:flex" not in box.html().split("display:flex")[0]


def test_sliders_and_box_agree_at_once(tuned):
    box = ChatBox(*tuned, max_seq_length=64, max_new_tokens=96)
    box.temperature, box.min_p = 3.0, 0.9
    box.widget()
    for name, value in {"max_new_tokens": 32, "temperature": 2.0, "min_p": 0.5}.items():
        assert (getattr(box, name), box._widgets[name].value) == (value, value)


def test_a_cell_waits_while_the_box_answers(box, tuned):
    """The box asks the base model; what a cell asks meanwhile is answered afterwards, and by the tuned model."""
    model, tokenizer = tuned
    alone = batch_replies(model, tokenizer, [[{"role": "user", "content": QUESTION}]], max_new_tokens=12)
    box.sides, box.max_new_tokens = ("base",), 48
    thread = threading.Thread(target=box.ask, args=(STORY,))
    thread.start()
    wait_until(lambda: box.exchanges and box.exchanges[0].replies.get("base"))
    meanwhile = batch_replies(model, tokenizer, [[{"role": "user", "content": QUESTION}]], max_new_tokens=12)
    finished = bool(box.exchanges[0].notes)
    thread.join()
    assert meanwhile == alone
    assert finished
    with model.disable_adapter():
        base = stream_reply(model, tokenizer, [{"role": "user", "content": STORY}], max_new_tokens=48)
    assert box.exchanges[0].replies["base"] == base.text


def test_a_question_that_is_too_long_is_answered_in_the_status_line(box):
    box.widget()
    box.max_seq_length = 20
    box._widgets["question"].value = QUESTION
    box._widgets["send"].click()
    wait_until(lambda: not box._widgets["send"].disabled)
    assert "the last question" in box._widgets["status"].value
