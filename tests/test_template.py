"""`check_template` on ten templates, with a failing input for each problem, and `training_text` down to ids."""

import copy
import re
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from templates import ALL_KINDS, chat_template, pinned

from helpers.chat.replies import render_prompt
from helpers.handoff.run import fingerprint
from helpers.template import turns
from helpers.template.check import TemplateError, check_template, training_text
from helpers.template.turns import RefusedError, TurnsError

NAMES = list(ALL_KINDS)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.fixture
def changed(shared_tokenizer):
    """`changed("chatml", chat_template=...)`: a copy of a tokenizer, with attributes of its own."""

    def make(name: str, **attributes):
        tokenizer = copy.deepcopy(shared_tokenizer(name))
        for attribute, value in attributes.items():
            setattr(tokenizer, attribute, value)
        return tokenizer

    return make


def tiny_model(vocabulary: int, eos: int | list[int]):
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **size))
    model.generation_config = GenerationConfig(eos_token_id=eos)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_templates_that_fit(shared_tokenizer, name):
    report = check_template(shared_tokenizer(name))
    # Zephyr's template writes no BOS token, its tokenizer does: training and inference differ
    assert report.problems == (("bos_differs",) if name == "zephyr" else ()), report
    assert report.ok == (name != "zephyr")
    assert repr(report) == repr(check_template(shared_tokenizer(name)))


def test_report_names_the_marks(shared_tokenizer):
    report = check_template(shared_tokenizer("llama-3.1"))
    assert ("before an answer", r"'<|start_header_id|>assistant<|end_header_id|>\n\n'") in report.facts
    assert ("end of an answer", "'<|eot_id|>'") in report.facts
    assert "&lt;|eot_id|&gt;" in report._repr_html_()
    report.raise_if_failed()


def without_generation_prompt(template: str) -> str:
    return re.sub(r"{%-? if add_generation_prompt %}.*", "", template, flags=re.DOTALL)


PROBLEMS = {
    "no_pad": ("chatml", {"pad_token": None}),
    "pad_is_eos": ("chatml", {"pad_token": "<|im_end|>"}),
    "wrong_stop": ("llama-3.1", {"eos_token": "<|end_of_text|>"}),
    "no_generation_prompt": ("chatml", {"chat_template": lambda template: without_generation_prompt(template)}),
    "prompt_not_prefix": (
        "chatml",
        {"chat_template": lambda t: t.replace("{{ '<|im_start|>assistant\n' }}", "{{ '\n<|im_start|>assistant\n' }}")},
    ),
    "not_deterministic": ("chatml", {"chat_template": lambda t: "{{ ['', ' ', '\n'] | random }}" + t}),
    "double_bos": ("gemma", {"chat_template": lambda t: "{{ bos_token }}" + t}),
    "bos_differs": ("gemma", {"chat_template": lambda t: t.replace("{{ bos_token }}", "")}),
    "bos_spelled_out": ("gemma", {"chat_template": lambda t: t.replace("{{ bos_token }}", "<bos>")}),
    "unreadable": ("chatml", {"chat_template": lambda t: "{% for m in messages %}{{ m.content }}{% endfor %}"}),
}


@pytest.mark.parametrize("code", PROBLEMS)
def test_each_problem_is_found(changed, code):
    name, attributes = PROBLEMS[code]
    tokenizer = changed(name)
    for attribute, value in attributes.items():
        setattr(tokenizer, attribute, value(tokenizer.chat_template) if callable(value) else value)
    report = check_template(tokenizer)
    assert code in report.problems, report
    assert not report.ok
    assert all(check.sentence and check.fix for check in report.details)
    with pytest.raises(TemplateError, match="Fix: "):
        report.raise_if_failed()


def test_generation_prompt_without_its_newline(changed):
    """The model would have to write the newline, which training masks."""
    tokenizer = changed("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|im_start|>assistant\n' }}", "<|im_start|>assistant"
    )
    assert check_template(tokenizer).problems == ("no_generation_prompt",)


def test_no_template(changed):
    assert check_template(changed("chatml", chat_template=None)).problems == ("unreadable",)


def test_template_whose_markers_the_tokenizer_does_not_have(changed, shared_tokenizer):
    report = check_template(changed("smollm2", chat_template=shared_tokenizer("llama-3.1").chat_template))
    assert report.problems == ("unreadable",)
    assert "<|eot_id|>" in report.details[0].sentence


def test_model_says_what_generation_stops_on(shared_tokenizer):
    tokenizer = shared_tokenizer("smollm2")
    assert check_template(tokenizer, model=tiny_model(len(tokenizer), eos=[0, 2])).ok
    assert check_template(tokenizer, model=tiny_model(len(tokenizer), eos=0)).problems == ("wrong_stop",)


def test_the_config_beside_the_tokenizer_says_what_generation_stops_on(changed, tmp_path):
    from transformers import GenerationConfig

    GenerationConfig(eos_token_id=[0, 2]).save_pretrained(tmp_path)
    tokenizer = changed("smollm2", eos_token="<|endoftext|>", name_or_path=str(tmp_path))  # id 0
    assert "wrong_stop" not in check_template(tokenizer).problems
    for other in (0, 2):  # not the end of an answer; not the EOS token
        GenerationConfig(eos_token_id=other).save_pretrained(tmp_path)
        assert "wrong_stop" in check_template(tokenizer).problems


def test_the_fix_of_a_wrong_stop_is_the_true_one(changed):
    def fix(original):
        [problem] = [check for check in check_template(llama, original=original).details if check.code == "wrong_stop"]
        return problem.fix

    llama = changed("llama-3.1", eos_token="<|end_of_text|>")
    own = changed("llama-3.1", eos_token="<|end_of_text|>")
    assert fix(own).startswith("set tokenizer.eos_token = '<|eot_id|>'")
    own.chat_template = "{{ another }}"
    assert fix(own).startswith("set CHAT_TEMPLATE to ''")
    own.chat_template = None
    assert fix(own).startswith("take the chat model")


@pytest.mark.parametrize(
    ("name", "eos", "fix"),
    [
        ("chatml", "<|im_end|>", 'set CHAT_TEMPLATE to "chatml"'),
        ("llama-3.1", "<|eot_id|>", 'set CHAT_TEMPLATE to "llama-3.1"'),
        ("llama-3.1", "<|end_of_text|>", "take the chat model"),
    ],
)
def test_a_tokenizer_without_a_template_is_told_which_fits(changed, name, eos, fix):
    [problem] = check_template(changed(name, chat_template=None, eos_token=eos)).details[:1]
    assert problem.code == "unreadable" and problem.fix.startswith(fix)


def test_token_that_the_model_does_not_have(changed):
    tokenizer = changed("smollm2")
    model = tiny_model(len(tokenizer), eos=2)
    tokenizer.pad_token = "<|a new pad token|>"
    assert check_template(tokenizer).problems == ("outside_vocabulary",)
    tokenizer.add_tokens(["<|a new pad token|>"], special_tokens=True)  # now it has an id, but still no embedding
    assert check_template(tokenizer).ok
    assert check_template(tokenizer, model=model).problems == ("outside_vocabulary",)
    assert check_template(tokenizer, original=changed("smollm2")).problems == ("outside_vocabulary",)


def test_renamed_token_is_found(changed):
    """Unsloth's Gemma template renames SmolLM2's end token, whose ids and files then say something else."""
    from unsloth.chat_templates import get_chat_template

    original = changed("smollm2")
    tokenizer = get_chat_template(copy.deepcopy(original), "gemma")
    report = check_template(tokenizer, original=original)
    assert "remapped" in report.problems
    assert "id 2 was <|im_end|>, is <end_of_turn>" in repr(report)


def test_swapped_tokens_are_found(changed):
    """A tokenizer that was loaded with the wrong EOS token: `get_chat_template` swaps the two tokens' ids."""
    from unsloth.chat_templates import get_chat_template

    original = changed("smollm2", eos_token="<|im_start|>")
    tokenizer = get_chat_template(copy.deepcopy(original), "chatml")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [2, 1]
    report = check_template(tokenizer, original=original)
    assert "remapped" in report.problems
    assert "id 1 was <|im_start|>, is <|im_end|>; id 2 was <|im_end|>, is <|im_start|>" in repr(report)
    # with the model alone it shows as well: generation stops on id 2, but answers now end with id 1
    assert check_template(tokenizer, model=tiny_model(len(tokenizer), eos=2)).problems == ("wrong_stop",)
    assert check_template(original, original=original).problems == ("wrong_stop",)


# A template is a program, and may be a bad one

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set it = namespace(x='xx') %}{% for i in range(99) %}{% set it.x = it.x ~ it.x %}{% endfor %}"
RECURSION = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
BAD_PROGRAMS = {
    "no end": (LOOPS, "no end after 1 s"),
    "no end for a server alone": ("{chatml}{% if datetime %}" + LOOPS + "{% endif %}", "no end after 1 s"),
    "a gigabyte": ("{{ 'x' * 10**9 }}", r"a power, `\*\*`"),
    "a gigabyte, counted out": ("{{ 'x' * 1000000000 }}", "MemoryError"),
    "ten gigabytes": ("{{ 'x'.ljust(10000000000) }}", "MemoryError"),
    "ten gigabytes of a filter": ("{{ 'x' | center(10000000000) }}", "MemoryError"),
    "twice as much, again and again": (DOUBLING, "MemoryError|no end"),
    "too much to be a text": ("{{ 'x' * 2000000 }}", "a text of 2,000,000 characters"),
    "a number for a day": ("{{ 9**9**9 }}", "a power"),
    "calls itself": (RECURSION, "RecursionError"),
    "nested too deep": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
    "no Jinja": ("{% for %}", "TemplateSyntaxError"),
    "an error of its own": ("{{ raise_exception('two\n\nlines') }}", "TemplateError: two lines"),
    "a wrong type": ("{{ 1 + 'a' }}", "TypeError: unsupported"),
    "too large a number": ("{{ 'x' * 99999999999999999999 }}", "OverflowError"),
    "out of the sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "an error in the opening of an answer": (
        "{chatml}{% if add_generation_prompt %}{{ 1 / 0 }}{% endif %}",
        "ZeroDivis",
    ),
}


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_a_template_that_is_a_bad_program_is_one_line(changed, monkeypatch, name):
    monkeypatch.setattr(turns, "RENDER_SECONDS", 1)
    tokenizer, (template, said) = changed("chatml"), BAD_PROGRAMS[name]
    tokenizer.chat_template = template.replace("{chatml}", tokenizer.chat_template)
    start = time.monotonic()
    report = check_template(tokenizer)
    assert report.problems[0] == "unreadable" and time.monotonic() - start < 10
    with pytest.raises(TemplateError, match=f"chat template: {said}") as error:
        report.raise_if_failed()
    assert "\n" not in str(error.value)


def test_a_prompt_is_not_waited_for_for_ever(changed, monkeypatch):
    monkeypatch.setattr(turns, "RENDER_SECONDS", 1)
    with pytest.raises(TurnsError, match="found no end after 1 s"):
        render_prompt(changed("chatml", chat_template=LOOPS), TALK[:1])
    with pytest.raises(RefusedError, match="found TemplateError: not so"):
        render_prompt(changed("chatml", chat_template="{{ raise_exception('not so') }}"), TALK[:1])


def test_stars_in_a_templates_text_are_no_power(changed):
    tokenizer = changed("chatml")
    tokenizer.chat_template = "**Be brief.** {{ '**' }}{# 2**3 #}\n" + tokenizer.chat_template
    assert check_template(tokenizer).ok


def test_a_timer_and_a_bound_that_were_there_are_there_again(changed, monkeypatch):
    monkeypatch.setattr(turns, "RENDER_SECONDS", 1)
    rang, own = [], lambda *_: rang.append(time.monotonic())
    bounds, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, own)
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 2)
        with pytest.raises(TurnsError):
            render_prompt(changed("chatml", chat_template=LOOPS), TALK[:1])
        render_prompt(changed("chatml"), TALK[:1])
        assert signal.getsignal(signal.SIGALRM) is own and resource.getrlimit(resource.RLIMIT_AS) == bounds
        signal.pause()
        assert 1.9 < rang[0] - start < 4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    bytearray(2 * turns.RENDER_BYTES)


def test_in_another_thread_a_template_is_rendered_without_bounds(shared_tokenizer):
    with ThreadPoolExecutor(4) as pool:
        tokenizer = shared_tokenizer("chatml")
        texts = set(pool.map(lambda _: render_prompt(tokenizer, TALK[:1]), range(200)))
    assert len(texts) == 1 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


# The text of training


@pytest.mark.parametrize("name", NAMES)
def test_one_bos_token_all_the_way_to_ids(shared_tokenizer, name):
    tokenizer, kind = shared_tokenizer(name), ALL_KINDS[name]
    ids = tokenizer(training_text(tokenizer, TALK)).input_ids
    assert ids.count(tokenizer.bos_token_id) == {"smollm2": 3, "llama-3.1": 1}.get(name, int(kind.adds_bos))
    if name != "zephyr":
        assert ids == tokenizer.apply_chat_template(TALK, return_dict=False)


def test_rendering_itself_doubles_the_bos_token(shared_tokenizer):
    """What `training_text` and chapter 03 guard against: nothing warns of it on the CPU."""
    tokenizer = shared_tokenizer("llama-3.1")
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer(text).input_ids[:2] == [128000, 128000]


@pytest.fixture(scope="module")
def chapter_text():
    """`chapter_text(tokenizer, messages)`: the text that chapter 03's own cell makes."""
    cells = (Path(__file__).resolve().parent.parent / "notebooks/src/03_data.py").read_text(encoding="utf-8")
    [source] = [cell for cell in cells.split("# %%") if "def to_text(row):" in cell]

    def text(tokenizer, messages):
        names = {"tokenizer": tokenizer}
        exec(source.partition("\ndataset = ")[0], names)
        return names["to_text"]({"conversations": messages})["text"]

    return text


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_chapters(shared_tokenizer, chapter_text, name):
    talk = [TALK[0], {"role": "assistant", "content": "\n  Hello!\n\n  Bye. \n"}]
    assert training_text(shared_tokenizer(name), talk) == chapter_text(shared_tokenizer(name), talk)


def test_white_space_around_messages_is_left_out(shared_tokenizer):
    talk = [TALK[0], {"role": "assistant", "content": "\n  Hello!\n\n  Bye. \n"}]
    text = training_text(shared_tokenizer("llama-3.1"), talk)
    assert text.endswith("<|end_header_id|>\n\nHello!\n\n  Bye.<|eot_id|>")
    assert talk[1]["content"].startswith("\n")  # the messages themselves stay as they are


# The date that a server hands to a template


@pytest.mark.parametrize(
    ("name", "template", "variable"),
    [
        ("llama-3.1", chat_template("llama-3.1"), "date_string"),
        ("chatml", "{{ datetime }}\n{chatml}", "datetime"),
        ("chatml", "{{ strftime_now('%d %b %Y') }}\n{chatml}", "strftime_now"),
        ("chatml", "{% if enable_thinking %}<think>\n{% endif %}{chatml}", "enable_thinking"),
    ],
)
def test_a_template_that_a_server_would_render_differently_is_refused(changed, name, template, variable):
    tokenizer = changed(name)
    tokenizer.chat_template = template.replace("{chatml}", tokenizer.chat_template)
    report = check_template(tokenizer)
    assert report.problems == ("server_variable",)
    assert f"changes with {variable}, which a server" in report.details[0].sentence


def test_the_pinned_template_renders_as_unsloths_own_and_for_a_server_alike(changed):
    tokenizer = changed("llama-3.1", chat_template=chat_template("llama-3.1"))
    before = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert "Today Date: 26 July 2024" in before
    tokenizer.chat_template = pinned(tokenizer.chat_template)
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == before
    assert tokenizer.apply_chat_template(TALK, tokenize=False, date_string="25 Nov 2026") == before
    assert check_template(tokenizer).ok


# After loading


def stops_on(tokenizer, token):
    return tiny_model(len(tokenizer), eos=tokenizer.convert_tokens_to_ids(token))


def test_the_template_of_training_passes(changed):
    tokenizer = changed("llama-3.1")
    model = stops_on(tokenizer, "<|eot_id|>")
    assert check_template(tokenizer, model=model, expected=fingerprint(tokenizer.chat_template)).ok


def test_another_template_than_in_training_is_refused(changed):
    tokenizer = changed("chatml")
    recorded = fingerprint(tokenizer.chat_template)
    tokenizer.chat_template = "{# other #}" + tokenizer.chat_template
    report = check_template(tokenizer, expected=recorded)
    assert report.problems == ("another_template",)
    with pytest.raises(TemplateError, match=f"the model was trained with the template {recorded}, and this is "):
        report.raise_if_failed()
    assert check_template(tokenizer).ok  # where none is expected


def test_no_template_is_another_one_than_in_training(changed):
    report = check_template(changed("chatml", chat_template=None), expected=fingerprint("{{ messages }}"))
    assert set(report.problems) == {"another_template", "unreadable"}


def test_the_template_of_training_is_checked_too(changed):
    tokenizer = changed("chatml", pad_token=None)
    assert check_template(tokenizer, expected=fingerprint(tokenizer.chat_template)).problems == ("no_pad",)
    llama = changed("llama-3.1")
    given = dict(expected=fingerprint(llama.chat_template), model=stops_on(llama, "<|end_of_text|>"))
    assert check_template(llama, **given).problems == ("wrong_stop",)


def test_the_templates_are_the_ones_that_unsloth_ships(shared_tokenizer):
    from unsloth.chat_templates import get_chat_template

    tokenizer = get_chat_template(copy.deepcopy(shared_tokenizer("llama-3.1")), "llama-3.1")
    assert tokenizer.chat_template == chat_template("llama-3.1")
    tokenizer.chat_template = pinned(tokenizer.chat_template)  # as chapter 03 goes on
    assert check_template(tokenizer, original=shared_tokenizer("llama-3.1")).ok
