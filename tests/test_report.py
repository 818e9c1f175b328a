"""The report of a real run of a small model: its data, its page, and what it refuses."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from test_training import PNG, small_trainer

from helpers.chat.replies import Comparison
from helpers.masking.check import Finding, MaskReport
from helpers.memory.stats import MemoryStats, Stage, track_memory
from helpers.training.curves import live_plot
from helpers.training.evidence import check_evidence
from helpers.training.held_out import held_out_losses
from helpers.training.report import SECTIONS, ReportError, make_report, write_report
from helpers.training.weights import frozen_checksum

OLD_KEYS = "held_out_loss house_style right_help steps seconds peak_reserved_gib device log".split()
HOSTILE = "<script>alert('x')</script> & <b>bold</b>"
FAULT = Finding("leaked", 3, "tokens", 1, (0,), "row 0", "'Hi'", "masked", "look at the markers")


def mask_report(*findings):
    return MaskReport(16, 250, 120, 16, (15, 23, 24), 6, (2,) * 8, 24, findings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What chapter 04 has at its end, as keywords of `make_report`."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("run")
    plot = live_plot(folder=folder / "curves")
    trainer = small_trainer(folder, callbacks=[plot], max_steps=12, eval_strategy="steps", eval_steps=6)
    trainer.train_dataset = Dataset.from_list(trainer.train_dataset)
    with track_memory("load") as load:
        before, frozen = held_out_losses(trainer.model, trainer.eval_dataset), frozen_checksum(trainer.model)
    with track_memory("training") as training:
        trainer.train()
    after = held_out_losses(trainer.model, trainer.eval_dataset)
    log = trainer.state.log_history
    return dict(
        trainer=trainer,
        base_model="someone/Llama-3.2-3B-Instruct",
        dataset=str(folder / "conversations.jsonl"),
        settings={"r": 16, "target_modules": ["q_proj", "v_proj"], "learning_rate": 2e-4, "bf16": False, "none": None},
        stages=[load, training],
        curves=plot.curves,
        mask_report=mask_report(),
        held_out=(before, after),
        evidence=check_evidence(trainer.model, log=log, frozen_before=frozen, before=before, after=after),
        replies=Comparison(((HOSTILE, "a\nb", "Re: Solvi lamp\n— Mossbell"),), ("before", "after")),
        counted={"house_style": {"before": 0.0, "after": 1.0}, "right_help": {"before": 0.05, "after": 0.8}},
    )


def report_of(run, **changes):
    given = run | changes
    return make_report(given.pop("trainer"), **given)


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


def test_the_content_is_plain_json_with_the_keys_that_others_read(run):
    report = report_of(run)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(OLD_KEYS) <= set(report) and set(SECTIONS) <= set(report)
    before, after = run["held_out"]
    assert (report["held_out_loss"]["before"], report["held_out_loss"]["after"]) == (before.loss, after.loss)
    assert report["perplexity"]["after"] == pytest.approx(math.exp(after.loss))
    assert report["steps"] == 12 and report["seconds"] == run["stages"][-1].seconds
    assert report["resumed_from_step"] == 0
    assert report["house_style"]["after"] == 1.0 and report["log"][-1]["step"] == 12
    assert report["data"]["dataset"] == "conversations.jsonl"  # no path of ours
    assert report["base_model"] == "someone/Llama-3.2-3B-Instruct"


def test_the_time_of_a_resumed_run_is_that_of_all_sessions(run, tmp_path):
    rows = run["curves"].rows
    longer = replace(run["curves"], rows=(*rows[:-1], rows[-1] | {"seconds": 4000.0}))
    report = report_of(run, curves=longer, resumed_from=7)
    assert (report["seconds"], report["resumed_from_step"]) == (4000.0, 7)
    assert report["memory"][-1]["seconds"] == run["stages"][-1].seconds
    page = Page(write_report(report, tmp_path / "report.html"))
    for words in ("1 h 6 min", "12 steps, resumed from step 7", "Training went on from step 7: these times"):
        assert words in page.text
    del report["resumed_from_step"]  # as in a report.json of before
    assert "resumed" not in Page(write_report(report, tmp_path / "old.html")).text
    assert "went on from" not in Page(write_report(report_of(run), tmp_path / "whole.html")).text


def test_a_run_without_curves_took_what_its_stage_took(run):
    assert report_of(run, curves=replace(run["curves"], rows=()))["seconds"] == run["stages"][-1].seconds


def test_the_stages_are_drawn(monkeypatch):
    from matplotlib.text import Text

    from helpers.figures import draw_stages

    monkeypatch.setattr("helpers.figures.as_image", lambda figure: figure)  # to read the figure, not its pixels
    figures = dict(device="Tesla T4", is_gpu=True, total_gib=14.7)
    load = MemoryStats(**figures, allocated_gib=2.0, reserved_gib=2.5, peak_reserved_gib=3.0)
    training = MemoryStats(**figures, allocated_gib=4.0, reserved_gib=6.0, peak_reserved_gib=7.0)
    stages = [Stage("load", 1.0, load, load), Stage("training", 9.0, load, training)]
    figure = draw_stages(stages)
    axes = figure.axes[0]
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[3.0, 7.0], [2.0, 4.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["load", "training"]
    assert axes.yaxis_inverted()  # the first stage on top
    assert list(axes.lines[0].get_xdata()) == [14.7] * 2 and axes.get_xlim()[1] > 14.7
    text = "\n".join(each.get_text() for each in figure.findobj(Text))
    for words in ("at the peak", "in use at the end", "Tesla T4: 14.7 GiB"):
        assert words in text
    monkeypatch.undo()
    assert draw_stages(stages).data.startswith(PNG)


def test_what_was_not_judged_or_is_not_finite(run):
    report = report_of(run, counted=None, replies=None)
    assert (report["house_style"], report["right_help"], report["replies"]) == ({}, {}, [])
    run["trainer"].state.log_history.append({"grad_norm": math.nan, "step": 12})
    assert report_of(run)["log"][-1]["grad_norm"] is None
    run["trainer"].state.log_history.pop()


def test_the_model_card_reads_it(run, tmp_path):
    from helpers.export.card import make_model_card
    from helpers.handoff.run import open_run

    folder = open_run(tmp_path)
    folder.write_json("lora.json", {"lora": {"r": 16}}, base_model="base")
    with folder.write("adapter", base_model="base") as adapter:
        adapter.mkdir()
        (adapter / "x").write_text("x")
    folder.write_json("report.json", report_of(run), base_model="base")
    card = make_model_card(folder, form="adapter", name="me/tuned", base_model="base")
    assert "held-out loss" in card and "replies with the right help" in card


def test_the_page_stands_alone_and_says_it_all(run, tmp_path):
    report = report_of(run)
    page = Page(write_report(report, tmp_path / "report.html"))
    assert len(page.links) == 1 and page.links[0].startswith("data:image/png;base64,")
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in (tmp_path / "report.html").read_text() and "@import" not in page.text
    for words in ("4 of 4 claims hold", "Llama-3.2-3B-Instruct", "conversations.jsonl", "q_proj, v_proj", "0.0002"):
        assert words in page.text
    for words in ("0% → 100%", "5% → 80%", "12 steps", "training", "16, 16", "120 of 250", "transformers", "Mossbell"):
        assert words in page.text
    assert report["data"]["fingerprint of the training rows"] in page.text
    assert "Warning" not in page.text and "Do not use" not in page.text
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_text_of_models_and_readers_is_escaped(run, tmp_path):
    page = Page(write_report(report_of(run, base_model=HOSTILE, settings={HOSTILE: HOSTILE}), tmp_path / "r.html"))
    assert "script" not in page.tags and "b" in page.tags and page.text.count("alert('x')") >= 4


def test_the_page_says_what_failed(run, tmp_path):
    """A run that learned nothing, overfitted, and was masked wrongly."""
    trainer, before = run["trainer"], run["held_out"][0]
    log = [*trainer.state.log_history, {"eval_loss": 99.0, "step": 12}]
    frozen = frozen_checksum(trainer.model)
    evidence = check_evidence(trainer.model, log=log, frozen_before=frozen, before=before, after=before)
    changes = dict(evidence=evidence, held_out=(before, before), mask_report=mask_report(FAULT))
    page = Page(write_report(report_of(run, **changes), tmp_path / "report.html"))
    for words in ("3 of 4 claims hold", "Do not use", "✗ no", "it overfits", "Not fit to train on", "leaked: 3 tokens"):
        assert words in page.text


@pytest.mark.parametrize("section", ["held_out_loss", *SECTIONS])
def test_content_that_is_no_report_is_refused(run, tmp_path, section):
    report = report_of(run)
    del report[section]
    with pytest.raises(ReportError, match=f"found no {section}"):
        write_report(report, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_report_needs_a_stage(run):
    with pytest.raises(ReportError, match="track_memory"):
        report_of(run, stages=[])


def test_a_page_that_cannot_be_written_leaves_the_old_one(run, tmp_path):
    with pytest.raises(ReportError, match="missing/report.html"):
        write_report(report_of(run), tmp_path / "missing" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ReportError, match="report.html"):
        write_report(report_of(run), tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_picture_is_inside(run, tmp_path):
    import base64

    page = Page(write_report(report_of(run), tmp_path / "report.html"))
    assert base64.b64decode(page.links[0].partition(",")[2]).startswith(PNG)
