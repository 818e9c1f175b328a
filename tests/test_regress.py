"""The regression's verdict: what it compares, measures and judges, each shown something that it must reject."""

import copy
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree

import nbformat
import pytest
from nbval.plugin import get_sanitize_patterns

from helpers.base import text_table
from helpers.chapters import CHAPTER_NAMES
from tests.maintain import regress
from tests.maintain.regress import (
    NOTEBOOKS,
    SANITIZER,
    Metrics,
    RegressError,
    band,
    baseline_path,
    belongs_to,
    check_run,
    collect_metrics,
    compare_shown,
    judge,
    last_run,
    main,
    make_baseline,
    read_junit,
    read_table,
    record,
    run_nbval,
    write_reports,
)

OF = {
    "profile": "cpu",
    "device": "AVX512 CPU",
    "model": "SmolLM2-135M-Instruct",
    "steps": 8,
    "versions": {"torch": "2.13.0"},
}
LOSSES = [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path):
    """A run whose executed notebooks are the committed ones, as papermill leaves them, and eight steps of training."""
    folder = tmp_path / "run"
    (folder / "executed").mkdir(parents=True)
    for chapter in CHAPTER_NAMES:
        notebook = nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4)
        given = nbformat.v4.new_code_cell("PROFILE = 'cpu'", metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(4, given)
        nbformat.write(notebook, folder / "executed" / f"{chapter}.ipynb")
    log = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3 / step}
        # The second is TRL's, as of a run that was resumed after step 4.
        | {"num_input_tokens_seen": 500.0 * step, "num_tokens": 500.0 * (step - 4 if step > 4 else step)}
        for step, loss in enumerate(LOSSES, 1)
    ]
    held_out = {"before": 4.5, "after": 0.5, "fall_interval": [3.9, 4.1]}
    report = {"held_out_loss": held_out, "house_style": {"before": 0.0, "after": 1.0}, "steps": 8}
    write_json(folder / "report.json", report | {"seconds": 16.0, "peak_reserved_gib": 2.0, "log": log})
    entry = {"base_model": "SmolLM2-135M-Instruct", "versions": OF["versions"]}
    write_json(folder / "handoff.json", {"schema": 1, "artefacts": {"report.json": entry}})
    measured = {"profile": "cpu", "kind": "AVX512 CPU", "chapters": {"03_data": {"peak_gib": 0.6}}}
    write_json(folder / "executed" / "measured.json", measured | {"seconds": {"03_data": 9.0}})
    return folder


def edit(run_dir, chapter, change):
    """Change an executed notebook."""
    path = run_dir / "executed" / f"{chapter}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def tagged(notebook):
    return [cell for cell in notebook.cells if "nbval-check-output" in cell.metadata.get("tags", [])]


def compared(run_dir, tmp_path):
    [shown] = compare_shown(run_dir, against=NOTEBOOKS, reports=tmp_path, chapters=("03_data",))
    return shown


def test_equal_notebooks_pass_with_what_recording_leaves_out(run_dir, tmp_path):
    def warn(notebook):
        warning = nbformat.v4.new_output("stream", name="stderr", text="a warning, 3 s\n")
        widget = nbformat.v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}})
        tagged(notebook)[0].outputs[:0] = [warning, widget]

    edit(run_dir, "03_data", warn)
    shown = compared(run_dir, tmp_path)
    expected = len(tagged(nbformat.read(NOTEBOOKS / "03_data.ipynb", as_version=4)))
    assert (shown.compared, shown.problems) == (expected, ())
    assert expected > 4


REJECTED = {
    "another text": (lambda n: tagged(n)[0].outputs[0].update(text="another template"), "Cell", "Cell outputs differ"),
    "no output": (lambda n: tagged(n)[1].update(outputs=[]), "Cell", "Missing output fields"),
    "never executed": (lambda n: tagged(n)[1].update(execution_count=None), "Cell", "was not executed"),
    "an error": (
        lambda n: n.cells[-3].outputs.append(nbformat.v4.new_output("error", ename="KeyError", evalue="'x'")),
        "code",
        "KeyError: 'x'",
    ),
    "other code": (lambda n: tagged(n)[0].update(source="print('other')"), "code", "another notebook was executed"),
    "a missing cell": (lambda n: n.cells.remove(tagged(n)[0]), "code", "another notebook was executed"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_the_comparison_rejects(name, run_dir, tmp_path):
    change, where, said = REJECTED[name]
    edit(run_dir, "03_data", change)
    problems = compared(run_dir, tmp_path).problems
    assert any(cell.startswith(where) and said in how for cell, how in problems), problems


def test_a_notebook_that_was_not_executed(run_dir, tmp_path):
    (run_dir / "executed" / "03_data.ipynb").unlink()
    problems = compared(run_dir, tmp_path).problems
    assert "not executed" in dict(problems)["code"]


def test_a_committed_cell_without_a_recording_is_refused(run_dir, tmp_path):
    recorded = nbformat.read(NOTEBOOKS / "03_data.ipynb", as_version=4)
    tagged(recorded)[0].update(outputs=[], execution_count=None)
    (tmp_path / "recorded").mkdir()
    nbformat.write(recorded, tmp_path / "recorded" / "03_data.ipynb")
    [shown] = compare_shown(run_dir, against=tmp_path / "recorded", reports=tmp_path, chapters=("03_data",))
    assert "nothing recorded" in shown.problems[0][1]


def sanitized(text):
    for pattern, replacement in get_sanitize_patterns(SANITIZER.read_text(encoding="utf-8")):
        text = re.sub(pattern, replacement, text)
    return text


# What each rule is for, in the order of the file.
CLEANED = (
    "\x1b[1;31mred\x1b[0m",
    "Map: 50%|████ | 5/10 [00:01<00:01, 5.00 examples/s]",
    "building ━━━━━╸ wheels",
    "2026-11-24T07:21:44Z",
    "07:21:44",
    "88.5 tokens/s",
    "2 min",
    "2.48 GiB",
    "0x7f3a2b4c5d6e",
    "in /mnt/disk/series",
    "in D:\\series\\runs",
)


def test_nbval_reads_every_rule_and_each_changes_what_it_is_for():
    text = SANITIZER.read_text(encoding="utf-8")
    rules = get_sanitize_patterns(text)
    assert len(rules) == len(re.findall("^regex:", text, re.MULTILINE))
    for (pattern, replacement), example in zip(rules, CLEANED, strict=True):
        assert re.sub(pattern, replacement, example) != example, pattern
    assert sanitized(CLEANED[0]) == "red"


def test_nbval_passes_over_a_rule_without_a_replacement():
    """Why the rule for colours has one: an editor strips the blank that would be left."""
    assert get_sanitize_patterns("regex: a\nreplace:\nregex: b\nreplace: c\n") == [("b", "c")]


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ("took 3.2 s", "took 11 s"),
        ("84 seconds, 2 min", "9 seconds, 1.5 min"),
        ("1,204 tokens/s", "88.5 tokens/s"),
        ("2.48 GiB and 105 MiB", "3.1 GiB and 99 MiB"),
        ("on 2026-11-24 at 07:21:44", "on 2027-01-02 at 23:00:01"),
        ("in /home/me/series/runs/cpu", "in /home/other/runs/cpu"),
        ("<Thing at 0x7f3a2b4c5d6e>", "<Thing at 0x55aa55aa55aa>"),
        (
            "Map:  50%|█████     | 5/10 [00:01<00:01,  5.00 examples/s]",
            "Map: 100%|██████████| 10/10 [00:00<00:00,  9.1it/s]",
        ),
    ],
)
def test_what_may_differ(one, another):
    assert sanitized(one) == sanitized(another)


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ("loss 0.222", "loss 0.322"),
        ("4,884,480 trainable parameters", "4,884,481 trainable parameters"),
        ("held-out loss fell: True", "held-out loss fell: False"),
        ("288 of 288 rows", "287 of 288 rows"),
        ("<|im_start|>user", "<|im_start|>model"),
        ("30 % of the model", "3 % of the model"),
        ("Llama-3.2-1B", "Llama-3.2-3B"),
        ("5 problems", "6 problems"),
        ("</td><td>3</td>", "</td><td>4</td>"),
    ],
)
def test_what_may_not_differ(one, another):
    assert sanitized(one) != sanitized(another)


def test_metrics_of_a_run(run_dir):
    metrics = collect_metrics(run_dir)
    assert metrics.of == OF
    values = metrics.values
    assert (values["04 loss, step 3"], values["04 tokens, step 3"]) == (3.0, 1500.0)
    assert values["04 loss, steps 7 to 8"] == 0.75
    assert (values["04 held-out loss, before"], values["04 house style, after"]) == (4.5, 1.0)
    assert (values["04 tokens trained"], values["04 tokens per second"]) == (4000.0, 250.0)
    assert values["04 held-out loss fell by more than its uncertainty"] is True
    assert values["seconds, 03_data"] == 9.0
    assert values["02 weights, MiB"] > 50
    assert values["06 perplexity, in memory"] > 1
    assert abs(values["06 perplexity change, GGUF q8_0"]) < 0.02


def test_a_run_that_stopped_early_has_fewer_metrics(run_dir):
    for name in ("report.json", "executed/04_train.ipynb", "executed/05_infer.ipynb", "executed/06_save.ipynb"):
        (run_dir / name).unlink()
    values = collect_metrics(run_dir).values
    assert "02 weights, MiB" in values
    assert not [name for name in values if name.startswith(("04", "05", "06"))]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(RegressError, match="no run of the series"):
        collect_metrics(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "make run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["report.json", "executed/measured.json", "executed/04_train.ipynb"])
def test_a_half_written_file_is_refused(run_dir, name, capsys):
    whole = (run_dir / name).read_text(encoding="utf-8")
    (run_dir / name).write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(RegressError, match=f"{name}: found no JSON, or half of it"):
        collect_metrics(run_dir)
    assert main([str(run_dir)]) == 2


def test_a_junit_file_is_read_by_notebook(tmp_path):
    cases = (
        '<testcase classname="notebooks.03_data.ipynb" name="Cell 1"><failure message="m">differs</failure></testcase>'
        '<testcase classname="notebooks.03_data.ipynb" name="code"/><testcase classname="" name="04_train.ipynb::code">'
        '<error message="no notebook"/></testcase>'
    )
    (tmp_path / "junit.xml").write_text(f"<testsuite>{cases}</testsuite>", encoding="utf-8")
    data, train = read_junit(tmp_path / "junit.xml")
    assert (data.chapter, data.compared, data.problems) == ("03_data", 1, (("Cell 1", "differs"),))
    assert train.chapter == "04_train" and train.problems == (("04_train.ipynb::code", "no notebook"),)


def test_a_table_is_read_back():
    headers, rows = ["form", "replies", "verdict"], [["in memory", "", ""], ["GGUF q8_0", "8 of 8", "ok"]]
    text = text_table(headers, rows) + "\nMISSED, merged: a sentence that is no row"
    assert read_table(text) == [dict(zip(headers, row, strict=True)) for row in rows]
    assert read_table("no table") == []


def changed(metrics, **values):
    return Metrics(metrics.of, {**metrics.values, **values})


def verdict_of(report, name):
    return next(row[4] for row in report.rows if row[0] == name)


def test_bands(run_dir):
    good = collect_metrics(run_dir)
    baseline = json.loads(json.dumps(make_baseline(good)))
    report = judge(good, baseline)
    assert report.ok and not report.outside
    slower = judge(changed(good, **{"seconds, 03_data": 900.0, "04 tokens per second": 1.0}), baseline)
    assert slower.ok and verdict_of(slower, "seconds, 03_data") == "not judged"
    for name, value in {
        "04 peak GiB": 4.0,
        "peak GiB, 03_data": 1.2,
        "04 loss, step 1": 4.5,
        "04 tokens, step 2": 1001.0,
        "04 learning rate, step 2": 5e-2,
        "04 held-out loss, after": 0.4,
        "04 house style, after": math.nan,
        "04 held-out loss fell by more than its uncertainty": False,
        "06 perplexity change, GGUF q8_0": 0.2,
        "06 verdict, merged": False,
    }.items():
        report = judge(changed(good, **{name: value}), baseline)
        assert not report.ok and [row[0] for row in report.outside] == [name]
    less = Metrics(OF, {name: value for name, value in good.values.items() if name != "04 loss, step 1"})
    assert verdict_of(judge(less, baseline), "04 loss, step 1") == "MISSING"


@pytest.mark.parametrize(
    "change", [{"device": "AVX2 CPU"}, {"versions": {"torch": "2.14.0+cpu"}}, {"steps": 9}, {"model": "n"}]
)
def test_another_machine_or_version_is_reported_and_not_judged(run_dir, change):
    good = collect_metrics(run_dir)
    other = Metrics({**OF, **change}, {**good.values, "04 loss, step 1": 9.0})
    report = judge(other, make_baseline(good))
    assert report.ok and report.unlike
    assert verdict_of(report, "04 loss, step 1") == "OUTSIDE"
    assert "not judged" in repr(report) and "was" in repr(report)
    assert judge(other, {}).ok and "no baseline" in repr(judge(other, {}))


def test_the_build_label_of_a_version_does_not_count(run_dir):
    good = collect_metrics(run_dir)
    other = Metrics({**OF, "versions": {"torch": "2.13.0+cpu"}}, {**good.values, "04 loss, step 1": 9.0})
    for now, then in ((other, good), (good, other)):
        report = judge(now, make_baseline(then))
        assert not report.unlike and not report.ok


@pytest.mark.parametrize(
    ("profile", "device", "model", "name"),
    [
        ("cpu", "AVX2 CPU", "SmolLM2-135M-Instruct", "cpu-avx2-cpu.json"),
        ("t4", "Tesla T4", "unsloth/Llama-3.2-3B-Instruct", "t4-tesla-t4.json"),
        ("t4", "Tesla T4", "SmolLM2-135M-Instruct", "t4-tesla-t4-smollm2-135m-instruct.json"),
    ],
)
def test_another_model_has_a_baseline_of_its_own(profile, device, model, name):
    assert baseline_path({"profile": profile, "device": device, "model": model}).name == name


def test_a_band_is_missing_for_speed_alone(run_dir):
    unbanded = {name for name, value in collect_metrics(run_dir).values.items() if band(name, value) is None}
    assert unbanded == {"04 tokens per second", "04 seconds of training", "seconds, 03_data"}


@pytest.mark.parametrize("path", sorted(regress.BASELINES.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_baseline_has_the_bands_of_the_rules(path):
    values = json.loads(path.read_text(encoding="utf-8"))["values"]
    of_the_rules = json.loads(json.dumps({name: band(name, entry["was"]) for name, entry in values.items()}))
    assert {name: entry["allowed"] for name, entry in values.items()} == of_the_rules


@pytest.mark.parametrize(
    ("metric", "chapter"), [("04 peak GiB", "04_train"), ("peak GiB, 04_train", "04_train"), ("steps", None)]
)
def test_a_metric_belongs_to_its_chapter(metric, chapter):
    assert [name for name in CHAPTER_NAMES if belongs_to(metric, name)] == ([chapter] if chapter else [])


def test_recording_keeps_a_good_run_alone(run_dir, tmp_path):
    path = record(run_dir, baselines=tmp_path)
    assert path.name == "cpu-avx512-cpu.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["of"] == OF
    assert kept["values"]["04 loss, step 1"] == {"was": 4.0, "allowed": list(band("04 loss, step 1", 4.0))}
    path.unlink()

    def claim_fails(notebook):
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "held-out loss fell by more than its uncertainty: True" in data.get("text/plain", ""):
                    data["text/plain"] = data["text/plain"].replace("uncertainty: True", "uncertainty: False")

    edit(run_dir, "04_train", claim_fails)
    with pytest.raises(RegressError, match="held-out loss fell by more than its uncertainty: found False"):
        record(run_dir, baselines=tmp_path)
    (run_dir / "executed" / "06_save.ipynb").unlink()
    with pytest.raises(RegressError, match="06_save: found not executed"):
        record(run_dir, baselines=tmp_path)
    assert not path.exists()


def test_the_verdict_and_its_reports(run_dir, tmp_path, monkeypatch):
    record(run_dir, baselines=tmp_path / "baselines")
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    report["log"][0]["loss"] = 6.0
    write_json(run_dir / "report.json", report)
    edit(run_dir, "03_data", REJECTED["another text"][0])
    reports = run_dir / "reports"
    write_json(reports / "03_data.html", "of an earlier run")
    verdict = check_run(run_dir, baselines=tmp_path / "baselines")
    assert not verdict.ok and not (reports / "03_data.html").exists()
    assert re.search(r"Compared in \d+\.\d s\.$", repr(verdict))
    write_reports(verdict, run_dir)
    summary = (reports / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("## Regression FAILED: 1 outputs differ")
    assert "| 04 loss, step 1 | 4 | 6 | 3.88 … 4.12 | OUTSIDE |" in summary
    assert "another template" in summary
    verdicts = {row[0]: row[3] for row in verdict.chapters}
    assert (verdicts["03_data"], verdicts["04_train"], verdicts["05_infer"]) == ("FAILED", "FAILED", "ok")
    failures = {
        file: [case.get("name") for case in ElementTree.parse(reports / file).iter("testcase") if len(case)]
        for file in ("shown.xml", "bands.xml")
    }
    assert len(failures["shown.xml"]) == 1
    assert "04 loss, step 1" in failures["bands.xml"] and "04 loss, step 2" not in failures["bands.xml"]
    assert counts(reports / "bands.xml") == (len(verdict.bands.outside), 3)  # the seconds and the speed are not judged
    index = (reports / "index.html").read_text(encoding="utf-8")
    assert "Regression FAILED" in index
    for chapter in CHAPTER_NAMES:
        assert f'href="{chapter}.html"' in index
        assert "<html" in (reports / f"{chapter}.html").read_text(encoding="utf-8")
    assert json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))["values"]["04 loss, step 1"] == 6.0


def counts(junit):
    """(failures, skipped) as a JUnit file states them, which must be what it holds."""
    suite = ElementTree.parse(junit).getroot()
    stated = int(suite.get("failures")), int(suite.get("skipped"))
    assert stated == (len(list(suite.iter("failure"))), len(list(suite.iter("skipped"))))
    return stated


def test_on_another_device_bands_are_skipped_and_counted_so(run_dir, tmp_path):
    good = collect_metrics(run_dir)
    other = make_baseline(Metrics(OF | {"device": "another"}, {**good.values, "04 loss, step 1": 9.0}))
    write_json(tmp_path / "cpu-avx512-cpu.json", other)
    verdict = check_run(run_dir, baselines=tmp_path)
    assert verdict.ok and verdict.bands.outside
    write_reports(verdict, run_dir)
    assert counts(run_dir / "reports" / "bands.xml") == (0, len(verdict.bands.rows))


@pytest.mark.parametrize("cell", ["Cell 5", None])
def test_what_nbval_finds_itself_is_in_every_report_and_in_the_exit_status(run_dir, monkeypatch, capsys, cell):
    """nbval's run is replaced by what it would return: its own test is below."""
    found = regress.Shown("03_data", 7, ((cell, "Cell outputs differ"),) if cell else ())
    monkeypatch.setattr(regress, "run_nbval", lambda chapter, reports: found)
    assert main([str(run_dir), "--nbval", "03_data"]) == (1 if cell else 0)
    summary, index = ((run_dir / "reports" / name).read_text(encoding="utf-8") for name in ("summary.md", "index.html"))
    verdict = "FAILED" if cell else "ok"
    assert f"| 03_data, by nbval |  | 7 | {verdict} | executed by nbval |" in summary
    for text in (summary, index, capsys.readouterr().out):
        assert f"Regression {verdict}" in text and "03_data, by nbval" in text
        assert ("03_data, by nbval, Cell 5" in text) == ("1 outputs differ" in text) == bool(cell)


def test_without_a_folder_the_run_that_was_written_last_is_judged(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(regress, "RUNS", tmp_path / "runs")
    with pytest.raises(RegressError, match="no executed notebook.*make run"):
        last_run()
    for seconds, profile in enumerate(("cpu", "t4", "test"), 1):
        path = tmp_path / "runs" / profile / "executed" / "03_data.ipynb"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    assert last_run() == tmp_path / "runs" / "t4"  # `test` is no profile's
    os.utime(tmp_path / "runs" / "cpu" / "executed" / "03_data.ipynb", (9, 9))
    assert last_run() == tmp_path / "runs" / "cpu"


def test_of_another_profile_the_code_and_its_claims_are_compared(run_dir, tmp_path):
    measured = json.loads((run_dir / "executed" / "measured.json").read_text(encoding="utf-8"))
    write_json(run_dir / "executed" / "measured.json", measured | {"profile": "t4"})
    edit(run_dir, "03_data", REJECTED["another text"][0])
    verdict = check_run(run_dir, baselines=tmp_path)
    assert verdict.ok and "no baseline" in repr(verdict)
    assert {shown.compared for shown in verdict.shown} == {0}
    edit(run_dir, "03_data", REJECTED["an error"][0])
    (run_dir / "executed" / "06_save.ipynb").unlink()
    failed = {row[0] for row in check_run(run_dir, baselines=tmp_path).chapters if row[3] == "FAILED"}
    assert failed == {"03_data", "06_save"}


@pytest.mark.slow
def test_nbval_executes_a_chapter_and_notices_another_output(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOKS / "03_data.ipynb", as_version=4)
    broken = copy.deepcopy(notebook)
    tagged(broken)[0].outputs[0].text = "another template"
    nbformat.write(broken, tmp_path / "03_data.ipynb")
    monkeypatch.setattr(regress, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "empty"))  # as on a new machine, where progress is shown
    shown = run_nbval("03_data", reports=tmp_path)
    assert [cell for cell, _ in shown.problems] == [f"Cell {broken_cell(broken)}"], shown.problems


def broken_cell(notebook):
    """nbval's number of the first tagged cell, one later for the parameters that are put in."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return cells.index(tagged(notebook)[0]) + 1
