"""The report of a real run of a small model: its data, its page, and the settings that were in force."""

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from test_training import PNG, small_model, small_rows, small_trainer

from helpers.handoff.run import HandoffError, open_run
from helpers.masking.check import Finding, MaskReport
from helpers.memory.stats import track_memory
from helpers.training.curves import live_plot
from helpers.training.evidence import check_evidence
from helpers.training.held_out import held_out_losses
from helpers.training.report import settings_in_force, write_report

READ_BY_OTHERS = "held_out_loss house_style right_help steps seconds peak_reserved_gib device data settings log".split()
SECTIONS = "settings environment data mask memory curves evidence replies".split()
HOSTILE = "<script>alert('x')</script> & <b>bold</b>"
FAULT = Finding("leaked", 3, "tokens", 1, (0,), "row 0", "'Hi'", "masked", "look at the markers")


def mask_report(*findings):
    return MaskReport(16, 250, 120, 16, (15, 23, 24), 6, (2,) * 8, 24, findings)


def other_questions(rows):
    """Rows that are not those, and have their answers: what was learned of these helps there."""
    return [{**row, "input_ids": [1, *row["input_ids"][1:]]} for row in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What chapter 04 has at its end, as keywords of `write_report`."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("run")
    plot = live_plot(folder=folder / "curves")
    trainer = small_trainer(folder, callbacks=[plot], max_steps=12, eval_strategy="steps", eval_steps=6)
    trainer.train_dataset, trainer.eval_dataset = Dataset.from_list(small_rows(16)), other_questions(small_rows(10))
    with track_memory("load") as load:
        before = held_out_losses(trainer.model, trainer.eval_dataset)
    with track_memory("training") as training:
        trainer.train()
    after = held_out_losses(trainer.model, trainer.eval_dataset)
    return dict(
        trainer=trainer,
        stages=[load, training],
        curves=plot.curves,
        mask_report=mask_report(),
        held_out=(before, after),
        evidence=check_evidence(trainer, before=before, after=after, learning_rate=1e-2),
        replies=[(HOSTILE, "a\nb", "Re: Solvi lamp\n— Mossbell")],
        counted={"house_style": {"before": 0.0, "after": 1.0}, "right_help": {"before": 0.05, "after": 0.8}},
    )


@pytest.fixture
def run(tmp_path):
    """A run folder with the data set that chapter 03 hands on."""
    return run_with(tmp_path / "run")


def run_with(folder, *, base_model="someone/Llama-3.2-3B-Instruct", dataset="conversations.jsonl"):
    run = open_run(folder, base_model=base_model)
    with run.write("dataset", dataset=dataset) as path:
        path.mkdir()
        (path / "rows").write_text("rows")
    return run


def report_of(run, made, **changes):
    given = made | changes
    return write_report(run, given.pop("trainer"), **given)


class Page(HTMLParser):
    """The page's tags, what they link to, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.words.append(data)


def page_of(run):
    return Page(run.artefact("report.html"))


def test_the_content_is_plain_json_with_the_keys_that_others_read(run, made):
    report = report_of(run, made)
    assert run.read_json("report.json") == report == json.loads(json.dumps(report, allow_nan=False))
    assert set(READ_BY_OTHERS) <= set(report) and set(SECTIONS) <= set(report)
    before, after = made["held_out"]
    assert (report["held_out_loss"]["before"], report["held_out_loss"]["after"]) == (before.loss, after.loss)
    assert report["perplexity"]["after"] == pytest.approx(math.exp(after.loss))
    assert report["steps"] == 12 and report["seconds"] == made["stages"][-1].seconds
    assert report["resumed_from_step"] == 0 and report["evidence"]["ok"]
    assert report["house_style"]["after"] == 1.0 and report["log"][-1]["step"] == 12
    assert report["data"]["dataset"] == "conversations.jsonl"  # as chapter 03 recorded it
    assert report["base_model"] == "Llama-3.2-3B-Instruct"
    assert [stage["stage"] for stage in report["memory"]] == ["load", "training"]


def test_the_settings_are_those_in_force(tmp_path, run, made):
    """Read from the model and the trainer: what was typed does not count."""
    settings = report_of(run, made)["settings"]
    expected = dict(r=4, target_modules=["down_proj", "q_proj"], use_rslora=False, learning_rate=1e-2, max_steps=12)
    expected |= dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=1, lr_scheduler_type="linear", bf16=False
    )
    assert expected.items() <= settings.items()
    other = small_trainer(tmp_path, model=small_model(), learning_rate=3e-4, warmup_steps=1)
    other.model.peft_config["default"].use_rslora = True
    changed = settings_in_force(other)
    assert (changed["learning_rate"], changed["warmup_steps"], changed["use_rslora"]) == (3e-4, 1, True)
    assert not {"padding_free", "max_length"} & set(changed)  # Transformers' own trainer has none


def test_the_time_of_a_resumed_run_is_that_of_all_sessions(run, made):
    rows = made["curves"].rows
    longer = replace(made["curves"], rows=(*rows[:-1], rows[-1] | {"seconds": 4000.0}))
    report = report_of(run, made, curves=longer, resumed_from=7)
    assert (report["seconds"], report["resumed_from_step"]) == (4000.0, 7)
    assert report["memory"][-1]["seconds"] == made["stages"][-1].seconds
    for words in ("1 h 6 min", "12 steps, resumed from step 7", "Training went on from step 7: these times"):
        assert words in page_of(run).text
    report_of(run, made)
    assert "resumed" not in page_of(run).text and "went on from" not in page_of(run).text


def test_a_run_without_curves_took_what_its_stage_took(run, made):
    assert report_of(run, made, curves=replace(made["curves"], rows=()))["seconds"] == made["stages"][-1].seconds


def test_what_was_not_judged_or_is_not_finite(run, made):
    report = report_of(run, made, counted=None, replies=())
    assert (report["house_style"], report["right_help"], report["replies"]) == ({}, {}, [])
    made["trainer"].state.log_history.append({"grad_norm": math.nan, "step": 12})
    assert report_of(run, made)["log"][-1]["grad_norm"] is None
    made["trainer"].state.log_history.pop()


def test_the_model_card_reads_it(run, made):
    from helpers.export.card import make_model_card

    report_of(run, made)
    with run.write("adapter") as adapter:
        adapter.mkdir()
        (adapter / "x").write_text("x")
    card = make_model_card(run, form="adapter", name="me/tuned", base_model="base")
    for words in ("held-out loss", "replies with the right help", "conversations.jsonl", "    learning_rate: 0.01\n"):
        assert words in card


def test_the_page_stands_alone_and_says_it_all(run, made):
    report = report_of(run, made)
    page = page_of(run)
    assert len(page.links) == 1 and page.links[0].startswith("data:image/png;base64,")
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in run.artefact("report.html").read_text(encoding="utf-8") and "@import" not in page.text
    for words in ("6 of 6 claims hold", "Llama-3.2-3B-Instruct", "conversations.jsonl", "down_proj, q_proj", "0.01"):
        assert words in page.text
    for words in ("0% → 100%", "5% → 80%", "12 steps", "training", "16, 16", "120 of 250", "transformers", "Mossbell"):
        assert words in page.text
    assert report["data"]["fingerprint of the training rows"] in page.text
    assert "Warning" not in page.text and "Do not use" not in page.text


def test_the_text_of_models_and_readers_is_escaped(tmp_path, made):
    run = run_with(tmp_path / "run", base_model="someone/<b>bold<b>", dataset=HOSTILE)
    report_of(run, made)
    page = page_of(run)
    assert "script" not in page.tags and page.text.count("alert('x')") == 3 and "<b>bold<b>" in page.text


def test_the_page_says_what_failed(run, made):
    """A run that learned nothing, overfitted, and was masked wrongly."""
    trainer, before = made["trainer"], made["held_out"][0]
    trainer.state.log_history.append({"eval_loss": 99.0, "step": 12})
    evidence = check_evidence(trainer, before=before, after=before, learning_rate=1e-2)
    trainer.state.log_history.pop()
    report = report_of(run, made, evidence=evidence, held_out=(before, before), mask_report=mask_report(FAULT))
    assert not report["evidence"]["ok"] and not report["mask"]["ok"]
    page = page_of(run)
    for words in ("5 of 6 claims hold", "Do not use", "✗ no", "it overfits", "Not fit to train on", "leaked: 3 tokens"):
        assert words in page.text


def test_a_report_belongs_to_a_run_with_its_data(tmp_path, made):
    with pytest.raises(HandoffError, match="03_data"):
        report_of(open_run(tmp_path / "run"), made)
    assert not list((tmp_path / "run").glob("report*"))


def test_a_page_that_cannot_be_made_leaves_the_old_one(run, made, monkeypatch):
    report_of(run, made)
    old = run.artefact("report.html").read_bytes()
    monkeypatch.setattr("helpers.training.report.draw_curves", lambda curves: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report_of(run, made, resumed_from=3)
    assert (run.path / "report.html").read_bytes() == old
    with pytest.raises(HandoffError, match="made from another report.json"):  # and it does not pass for the new one's
        run.artefact("report.html")


def test_the_picture_is_inside(run, made):
    report_of(run, made)
    assert base64.b64decode(page_of(run).links[0].partition(",")[2]).startswith(PNG)
