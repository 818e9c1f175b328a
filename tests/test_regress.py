"""The regression's verdict: what it compares, measures and judges, each shown something that it must reject."""

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import nbformat
import pytest
from markdown_it import MarkdownIt
from nbval.plugin import get_sanitize_patterns

from helpers.base import ROOT, InputError
from helpers.chapters import CHAPTER_NAMES
from tests.maintain import regress
from tests.maintain.regress import MOVED, NOT_JUDGED, Metrics, band, collect_metrics, judge, main, make_baseline
from tests.maintain.series import of_chapter, read_parameter_file, resolved
from tests.maintain.shown import SANITIZER, compare_notebook

OF = {"profile": "cpu", "device": "AVX512 CPU", "model": "SmolLM2-135M-Instruct", "steps": 8}
OF |= {"versions": {"torch": "2.13.0"}}
NUMBERS = {
    "02_load_and_lora": {"weights_mib": 159, "trainable_parameters": 4_884_480},
    "03_data": {"train_rows": 288, "eval_rows": 48, "longest_tokens": 142},
    "04_train": {"held_out_loss_before": 4.5, "held_out_loss_after": 0.5, "house_style_before": 0.0}
    | {"house_style_after": 1.0, "steps": 8, "tokens_trained": 4000, "peak_gib": 2.0, "seconds": 16.0},
    "05_infer": {"replies": 8, "differing_replies": 8, "tokens_per_second": 9.5},
    "06_save": {"forms": 5, "forms_within_limits": 5, "perplexity_in_memory": 1.25}
    | {"perplexity_change": {"merged": 0.001, "GGUF q8_0": 0.003}, "same_replies": {"merged": 8}},
    "07_when_it_goes_wrong": {"general_loss": {"works": 3.3, "10 % general": 0.8}}
    | {"held_out_loss": {"works": 0.9, "rate too low": 4.9, "by heart": 2.5, "best kept": 1.9}},
}
LOSSES = [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def change_json(path, **values):
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


def change_07(run, measure, name, value):
    chapter = "07_when_it_goes_wrong"
    change_json(run / f"numbers/{chapter}.json", **{measure: NUMBERS[chapter][measure] | {name: value}})


def cell(number, source, *outputs, tags=()):
    v4 = nbformat.v4
    given = dict(id=f"cell-{number}", execution_count=number, metadata={"tags": list(tags)})
    return v4.new_code_cell(source, outputs=list(outputs), **given)


def text(shown):
    return nbformat.v4.new_output("stream", name="stdout", text=shown)


def value(plain, html):
    data = {"text/plain": plain, "text/html": html}
    return nbformat.v4.new_output("execute_result", data=data, execution_count=3)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run of eight steps, and the committed notebooks, which showed the same; both in a folder of their own."""
    tagged = dict(tags=["nbval-check-output"])
    cells = [cell(1, "setup()", text("in 3 s")), cell(2, "x = 1\nprint(x)", text("one"), **tagged)]
    cells += [cell(3, "table", value("2 rows", "<b>2 rows in 9 s</b>"), **tagged), cell(4, "print(result)")]
    cells[-1].outputs = [text("Result: all of it")]
    folder = tmp_path / "runs" / "cpu"
    monkeypatch.setattr(regress, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(regress, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(regress, "BASELINES", tmp_path / "baselines")
    for path in (tmp_path / "notebooks", tmp_path / "baselines", folder / "executed"):
        path.mkdir(parents=True)
    for chapter in CHAPTER_NAMES:
        notebook = nbformat.v4.new_notebook(cells=[*cells])
        nbformat.write(notebook, tmp_path / "notebooks" / f"{chapter}.ipynb")
        notebook.cells.insert(1, cell(9, "STEPS = 8", tags=["injected-parameters"]))
        nbformat.write(notebook, folder / "executed" / f"{chapter}.ipynb")
    for chapter, numbers in NUMBERS.items():
        write_json(folder / "numbers" / f"{chapter}.json", numbers)
    log = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3 / step}
        # The second is TRL's, as of a run that was resumed after step 4.
        | {"num_input_tokens_seen": 500 * step, "num_tokens": 500.0 * (step - 4 if step > 4 else step)}
        for step, loss in enumerate(LOSSES, 1)
    ]
    report = {"base_model": OF["model"], "steps": 8, "environment": {"device": "CPU", "torch": "2.13.0"}, "log": log}
    write_json(folder / "report.json", report | {"evidence": {"rows": [["the base is untouched", "checksum", True]]}})
    measured = {"profile": "cpu", "kind": "AVX512 CPU", "chapters": {"03_data": {"minutes": 0.2, "peak_gib": 0.6}}}
    write_json(folder / "executed" / "measured.json", measured | {"seconds": {"03_data": 9.0}})
    return folder


def edit(run_dir, change, chapter="03_data"):
    """Change an executed notebook."""
    path = run_dir / "executed" / f"{chapter}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook.cells)
    nbformat.write(notebook, path)


def compared(run_dir, **options):
    return compare_notebook(run_dir / "executed/03_data.ipynb", regress.NOTEBOOKS / "03_data.ipynb", **options)


def test_equal_notebooks_pass_with_what_recording_leaves_out(run_dir):
    def warn(cells):
        warning = nbformat.v4.new_output("stream", name="stderr", text="a warning, 3 s\n")
        widget = nbformat.v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}})
        cells[2].outputs[:0] = [warning, widget]
        cells[3].outputs[0].data["text/html"] = "<b>2 rows in 8 GiB</b>"  # the plain text is compared
        cells[1].outputs = [text("no tag, so never compared")]

    edit(run_dir, warn)
    shown = compared(run_dir)
    assert (shown.compared, shown.stopped, shown.differences) == (2, "", ())


ERROR = nbformat.v4.new_output("error", ename="KeyError", evalue="'x'")
DIFFERENCES = {
    "another text": (lambda cells: cells[2].outputs[0].update(text="two"), "code cell 2, `print(x)`", "+two"),
    "another value": (lambda cells: cells[3].outputs[0].data.update({"text/plain": "3 rows"}), "code cell 3", "3 rows"),
    "no output": (lambda cells: cells[2].update(outputs=[]), "code cell 2", "Missing output fields"),
    "one more": (lambda cells: cells[2].outputs.append(value("1", "1")), "code cell 2", "Unexpected output"),
}
STOPS = {
    "never executed": (lambda cells: cells[3].update(execution_count=None), "code cell 3: not executed"),
    "an error": (lambda cells: cells[4].outputs.append(ERROR), "code cell 4: KeyError: 'x'"),
    "other code": (lambda cells: cells[2].update(source="print('other')"), "first difference:\nx = 1\nprint(x)"),
    "a missing cell": (lambda cells: cells.pop(2), "another notebook was executed"),
    "a cell too many": (lambda cells: cells.append(cell(8, "more()")), "another notebook was executed"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_another_output_is_a_difference(name, run_dir):
    change, where, said = DIFFERENCES[name]
    edit(run_dir, change)
    [(place, how)] = compared(run_dir).differences
    assert place.startswith(where) and said in how
    assert compared(run_dir, code_only=True).differences == ()


@pytest.mark.parametrize("name", STOPS)
def test_a_run_of_other_code_or_of_half_of_it_is_none(name, run_dir):
    change, said = STOPS[name]
    edit(run_dir, change)
    for code_only in (False, True):
        shown = compared(run_dir, code_only=code_only)
        assert said in shown.stopped and not shown.differences


def test_a_notebook_that_was_not_executed_or_a_cell_that_was_not_recorded_is_refused(run_dir):
    recorded = regress.NOTEBOOKS / "03_data.ipynb"
    notebook = nbformat.read(recorded, as_version=4)
    notebook.cells[1].update(outputs=[], execution_count=None)
    nbformat.write(notebook, recorded)
    assert "nothing is recorded" in compared(run_dir).differences[0][1]
    (run_dir / "executed" / "03_data.ipynb").unlink()
    assert "not executed" in compared(run_dir).stopped


def sanitized(text):
    for pattern, replacement in get_sanitize_patterns(SANITIZER.read_text(encoding="utf-8")):
        text = re.sub(pattern, replacement, text)
    return text


# At least one for each rule of the file.
MAY_DIFFER = [
    ("\x1b[1;31mred\x1b[0m", "red"),
    (
        "Map:  50%|█████     | 5/10 [00:01<00:01,  5.00 examples/s]",
        "Map: 100%|██████████| 10/10 [00:00<00:00,  9.1it/s]",
    ),
    ("building ━━━━━╸ wheels", "building ━━━━━━━━━━ more wheels"),
    ("on 2026-11-24 at 07:21:44", "on 2027-01-02 at 23:00:01"),
    ("1,204 tokens/s", "88.5 tokens/s"),
    ("took 3.2 s", "took 11 s"),
    ("84 seconds, 2 min", "9 seconds, 1.5 min"),
    ("2.48 GiB and 105 MiB", "3.1 GiB and 99 MiB"),
    ("<Thing at 0x7f3a2b4c5d6e>", "<Thing at 0x55aa55aa55aa>"),
    ("in /home/me/series/runs/cpu", "in /mnt/disk/runs/cpu"),
    ("in D:\\series\\runs", "in C:\\runs"),
]


@pytest.mark.parametrize(("one", "another"), MAY_DIFFER)
def test_what_may_differ(one, another):
    assert sanitized(one) == sanitized(another)


def test_nbval_reads_every_rule_and_none_is_dead():
    rules = SANITIZER.read_text(encoding="utf-8")
    patterns = [pattern for pattern, _ in get_sanitize_patterns(rules)]
    assert len(patterns) == len(re.findall("^regex:", rules, re.MULTILINE))
    assert [pattern for pattern in patterns if not any(re.search(pattern, one) for one, _ in MAY_DIFFER)] == []
    # Why the rule for colours has a replacement: an editor strips the blank that would be left, and nbval the rule.
    assert get_sanitize_patterns("regex: a\nreplace:\nregex: b\nreplace: c\n") == [("b", "c")]


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


def test_metrics_are_named_after_their_place_in_the_json(run_dir):
    metrics = collect_metrics(run_dir)
    assert metrics.of == OF
    expected = {"02 weights_mib": 159, "04 loss, step 3": 3.0, "04 loss, steps 7 to 8": 0.75}
    expected |= {"04 num_input_tokens_seen, step 8": 4000, "04 evidence, the base is untouched": True}
    expected |= {"06 perplexity_change, GGUF q8_0": 0.003, "peak_gib, 03_data": 0.6, "seconds, 03_data": 9.0}
    assert metrics.values.items() >= expected.items()


def test_a_run_that_stopped_early_has_fewer_metrics(run_dir):
    for name in ("report.json", "numbers/04_train.json", "numbers/06_save.json"):
        (run_dir / name).unlink()
    names = collect_metrics(run_dir).values
    assert "02 weights_mib" in names and not [name for name in names if name.startswith(("04", "06"))]


@pytest.mark.parametrize("found", ["0.2", [0.2], {"merged": "ok"}])
def test_what_is_no_number_is_refused(run_dir, found):
    change_json(run_dir / "numbers" / "06_save.json", forms=found)
    with pytest.raises(InputError, match="06_save.json, 06 forms.*expected a number"):
        collect_metrics(run_dir)


@pytest.mark.parametrize(
    "name", ["report.json", "numbers/04_train.json", "executed/measured.json", "executed/04_train.ipynb"]
)
@pytest.mark.parametrize("content", ['{"half": ', "[]"])
def test_a_half_written_file_is_refused(run_dir, name, content, capsys):
    (run_dir / name).write_text(content, encoding="utf-8")
    assert main([str(run_dir)]) == 2
    assert f"{name}: found no JSON, or half of it" in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused_and_left_as_it_is(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "make run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def with_values(metrics, **values):
    return Metrics(metrics.of, {**metrics.values, **values})


def failed(verdict):
    return [check.name for check in verdict.failed]


OUTSIDE = {
    "04 peak_gib": 4.0,
    "peak_gib, 03_data": 1.2,
    "02 trainable_parameters": 4_884_481,
    "04 loss, step 1": 4.5,
    "04 loss, steps 7 to 8": 0.7,
    "04 num_input_tokens_seen, step 2": 1001,
    "04 learning_rate, step 2": 5e-2,
    "04 held_out_loss_after": 0.6,
    "04 house_style_after": 0.8,
    "04 evidence, the base is untouched": False,
    "05 tokens_per_second": math.nan,
    "06 perplexity_change, GGUF q8_0": 0.2,
    "06 same_replies, merged": 5,
}


def test_each_number_is_held_against_its_band(run_dir):
    good = collect_metrics(run_dir)
    baseline = json.loads(json.dumps(make_baseline(good)))
    assert judge(good, baseline).status == 0
    slower = judge(with_values(good, **{"seconds, 03_data": 900.0, "05 tokens_per_second": 1.0}), baseline)
    assert slower.status == 0 and NOT_JUDGED in {check.verdict for check in slower.checks}
    for name, number in OUTSIDE.items():
        verdict = judge(with_values(good, **{name: number}), baseline)
        assert (verdict.status, failed(verdict)) == (1, [name])
    less = Metrics(OF, {name: number for name, number in good.values.items() if name != "04 loss, step 1"})
    [missing] = judge(less, baseline).failed
    assert str(missing) == "04 loss, step 1 is missing, was 4, allowed 3.88 … 4.12"


def test_a_band_is_missing_for_times_and_speed_alone(run_dir):
    unbanded = {name for name, was in collect_metrics(run_dir).values.items() if band(name, was) is None}
    assert unbanded == {"04 seconds", "05 tokens_per_second", "seconds, 03_data"}


@pytest.mark.parametrize("path", sorted(regress.BASELINES.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_baseline_has_the_bands_of_the_rules(path):
    values = json.loads(path.read_text(encoding="utf-8"))["values"]
    of_the_rules = json.loads(json.dumps({name: band(name, entry["was"]) for name, entry in values.items()}))
    assert {name: entry["allowed"] for name, entry in values.items()} == of_the_rules


UNLIKE = [{"device": "AVX2 CPU"}, {"versions": {"torch": "2.14.0+cpu"}}, {"steps": 9}, {"model": "n"}, None]
BAD_ANYWHERE = {
    "04 held_out_loss_after < 04 held_out_loss_before": {"04 held_out_loss_after": 4.5},
    "04 house_style_after >= 04 house_style_before": {"04 house_style_before": 0.5, "04 house_style_after": 0.4},
    "06 forms_within_limits == 06 forms": {"06 forms_within_limits": 4},
    "04 evidence, the base is untouched": {"04 evidence, the base is untouched": False},
    "04 loss, step 8": {"04 loss, step 8": math.nan},
}


@pytest.mark.parametrize("change", UNLIKE)
def test_another_device_or_version_is_not_judged_and_never_ok(run_dir, change):
    good = collect_metrics(run_dir)
    baseline = make_baseline(Metrics(OF | change, good.values)) if change else {}
    verdict = judge(with_values(good, **{"04 loss, step 1": 9.0}), baseline)
    assert verdict.status == 3 and verdict.headline.startswith("NOT JUDGED")
    moved = [check.name for check in verdict.checks if check.verdict == MOVED]
    assert moved == (["04 loss, step 1"] if change else [])
    for name, values in BAD_ANYWHERE.items():
        verdict = judge(with_values(good, **values), baseline)
        assert (verdict.status, failed(verdict)) == (1, [name])


def test_what_must_hold_anywhere_has_to_be_there_but_for_the_house_style_of_other_data(run_dir):
    good = collect_metrics(run_dir)
    plain = Metrics(OF, {name: number for name, number in good.values.items() if "house_style" not in name})
    assert judge(plain, {}).status == 3
    assert len(failed(judge(Metrics(OF, {"02 weights_mib": 159}), {}))) == 2  # the losses, and the forms


def test_the_build_label_of_a_version_does_not_count(run_dir):
    good = collect_metrics(run_dir)
    labelled = Metrics(OF | {"versions": {"torch": "2.13.0+cpu"}}, good.values)
    assert judge(good, make_baseline(labelled)).status == judge(labelled, make_baseline(good)).status == 0


def test_recording_takes_a_good_run_as_the_baseline(run_dir, capsys):
    assert main([str(run_dir)]) == 3
    assert f"{run_dir} --record" in capsys.readouterr().out
    edit(run_dir, DIFFERENCES["another text"][0])  # outputs are recorded after this
    assert main([str(run_dir), "--record"]) == 0
    kept = json.loads((regress.BASELINES / "cpu-avx512-cpu.json").read_text(encoding="utf-8"))
    assert kept["of"] == OF and kept["values"]["04 loss, step 1"] == {"was": 4.0, "allowed": [3.88, 4.12]}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: change_json(run / "numbers/06_save.json", forms_within_limits=4), "within_limits == 06 forms"),
        (lambda run: change_json(run / "numbers/04_train.json", held_out_loss_after=None), "after: found is nan"),
        (lambda run: change_07(run, "held_out_loss", "rate too low", 0.8), "works < 07 held_out_loss, rate too low"),
        (lambda run: change_07(run, "held_out_loss", "best kept", 2.5), "best kept < 07 held_out_loss, by heart"),
        (lambda run: change_07(run, "general_loss", "10 % general", 3.4), "general < 07 general_loss, works"),
        (lambda run: edit(run, STOPS["an error"][0]), "shown, 03_data: found code cell 4: KeyError"),
        (lambda run: (run / "executed/03_data.ipynb").unlink(), "shown, 03_data: found not executed"),
    ],
)
def test_recording_refuses_a_run_that_is_not_whole_and_good(run_dir, spoil, said, capsys):
    spoil(run_dir)
    assert main([str(run_dir), "--record"]) == 2
    assert said in capsys.readouterr().err and not list(regress.BASELINES.iterdir())


def junit(run_dir):
    """{what happened: names of the test cases} of the JUnit file."""
    cases = ElementTree.parse(run_dir / "reports" / "junit.xml").iter("testcase")
    found = {}
    for case in cases:
        found.setdefault(case[0].tag if len(case) else "passed", []).append(case.get("name")[len("test_run[") : -1])
    return found


def test_the_verdict_is_printed_and_written_for_a_job_page_and_as_junit(run_dir, capsys):
    regress.record(run_dir)
    assert main([str(run_dir)]) == 0
    assert "Regression ok" in capsys.readouterr().out and "failure" not in junit(run_dir)
    change_json(run_dir / "numbers" / "04_train.json", held_out_loss_after=0.6)
    edit(run_dir, lambda cells: cells[2].outputs[0].update(text="<script>\n```\n# two"))
    assert main([str(run_dir)]) == 1
    said = capsys.readouterr().out
    assert re.search(r"03_data +FAILED .* all of it\n04_train +FAILED .*\n05_infer +ok ", said)
    assert "FAILED: 04 held_out_loss_after is 0.6, was 0.5, allowed 0.475 … 0.525" in said
    assert said.rstrip().splitlines()[-1].startswith("Regression FAILED: ")
    heading, *lines = (run_dir / "reports" / "summary.md").read_text(encoding="utf-8").splitlines()
    assert heading.startswith("## Regression FAILED: ") and {line[:4] for line in lines} == {"", "    "}
    cases = junit(run_dir)
    assert cases["failure"] == ["shown, 03_data", "04 held_out_loss_after"]
    assert sorted(cases["skipped"]) == ["04 seconds", "05 tokens_per_second", "seconds, 03_data"]
    assert "04 loss, step 1" in cases["passed"]


@pytest.mark.parametrize(
    "said",
    [
        "<script>",
        "```\n# two",
        "~~~",
        "\n\n# two",
        "\u00a0\n<script>",
        "\u2003\n\n<b>",
        "\r# two",
        "\v\n<b>\f\x85- x",
        "\t\n\tx",
    ],
)
def test_nothing_that_a_notebook_showed_leaves_the_summarys_code(run_dir, said):
    verdict = regress.Verdict((regress.Check("shown, 03_data", regress.FAILED, said),))
    regress.write_reports(verdict, f"chapter\n\n{said}\n{said}", run_dir / "reports")
    summary = (run_dir / "reports" / "summary.md").read_bytes().decode()
    tokens = MarkdownIt("commonmark").parse(summary)
    assert [token.type for token in tokens] == ["heading_open", "inline", "heading_close", "code_block"]
    assert len(re.findall("^## ", summary, re.MULTILINE)) == 1


def test_junit_says_that_a_run_was_not_judged(run_dir):
    assert main([str(run_dir)]) == 3
    cases = junit(run_dir)
    assert cases["failure"] == ["bands for this run"] and "04 loss, step 1" in cases["skipped"]
    assert (run_dir / "reports" / "summary.md").read_text(encoding="utf-8").startswith("## NOT JUDGED")


def test_without_a_folder_the_run_that_ended_last_is_judged(run_dir, tmp_path, capsys):
    regress.record(run_dir)
    os.utime(run_dir / "executed" / "measured.json", (2, 2))
    earlier = tmp_path / "runs" / "earlier" / "executed" / "measured.json"
    write_json(earlier, {})
    os.utime(earlier, (1, 1))
    assert main([]) == 0
    os.utime(earlier, (3, 3))
    assert main([]) == 2 and "earlier" in capsys.readouterr().err


def test_of_another_profile_the_code_alone_is_compared(run_dir):
    change_json(run_dir / "executed" / "measured.json", profile="t4")
    edit(run_dir, DIFFERENCES["another text"][0])
    regress.record(run_dir)
    assert (regress.BASELINES / "t4-avx512-cpu.json").exists()
    assert main([str(run_dir)]) == 0
    edit(run_dir, STOPS["an error"][0])
    assert main([str(run_dir)]) == 1


@pytest.mark.slow
def test_nbval_itself_executes_a_chapter_and_notices_another_output(tmp_path):
    """Plain `pytest --nbval-lax`: it takes no parameters, so that it gets a copy with a laptop's choices put in."""
    from papermill.iorw import load_notebook_node, write_ipynb
    from papermill.parameterize import parameterize_notebook

    choices = read_parameter_file(ROOT / "tests/profiles/cpu.toml") | {"RUN_DIR": str(tmp_path / "run")}
    notebook = load_notebook_node(str(ROOT / "notebooks" / "03_data.ipynb"))
    notebook = parameterize_notebook(notebook, of_chapter("03_data", resolved(choices)))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    spoilt = next(number for number, cell in enumerate(code) if "nbval-check-output" in cell.metadata.tags)
    code[spoilt].outputs = [text("another template")]
    folder = ROOT / "runs" / "nbval"  # below the series' root, where the setup cell looks for it
    folder.mkdir(parents=True, exist_ok=True)
    write_ipynb(notebook, str(folder / "03_data.ipynb"))
    options = ["--nbval-lax", "--nbval-kernel-name=python3", f"--nbval-sanitize-with={SANITIZER}", "-rf"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "empty"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "pytest", *options, str(folder / "03_data.ipynb")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    # A remark on stderr is none of what is recorded, and nbval calls it unexpected.
    _, *parts = re.split(r"^_+ .*::(Cell \d+) _+$", done.stdout, flags=re.MULTILINE)
    said = dict(zip(parts[::2], parts[1::2], strict=True))
    differing = [cell for cell, text in said.items() if "fields from running code: {'stderr'}" not in text]
    assert differing == [f"Cell {spoilt}"], done.stdout
