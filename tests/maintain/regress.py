"""One verdict on a run of the series: what its notebooks showed, and what it measured, against what is committed.

python -m tests.maintain.regress                          compare, judge, write reports into the last run's folder
python -m tests.maintain.regress runs/cpu                 that run, into runs/cpu/reports
python -m tests.maintain.regress runs/cpu --nbval 03_data and execute one cheap chapter by plain `pytest --nbval-lax`
python -m tests.maintain.regress runs/cpu --record            keep what this run measured as the baseline of its device

Nothing is executed twice: the run's executed notebooks are read. *Shown*: the outputs of cells that are tagged
`nbval-check-output` must be those of the committed notebooks (`tests/nbval_executed.py`). *Measured*: losses, tokens,
counts and times go into `metrics.json`, and each must lie in its band of `tests/baselines/PROFILE-DEVICE.json`. A band
holds for the versions, device, model and number of steps that its file names; another run is reported, not judged.
Seconds and speed are reported alone: how fast a machine is, is nothing that a test can know.

How wide a band is, `RULES` says; `tests/baselines/README.md` says where the widths come from.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers.base import ROOT, InputError, html_table, markdown_table, text_table
from helpers.chapters import CHAPTER_NAMES
from helpers.environment.requirements import public
from helpers.profiles import PROFILES
from helpers.series import NOTEBOOKS, read_result

RUNS = ROOT / "runs"
TESTS = ROOT / "tests"
BASELINES = TESTS / "baselines"
SANITIZER = TESTS / "nbval_sanitize.cfg"
RECORDED_PROFILE = "cpu"  # the one whose outputs the committed notebooks hold
FIXED_STEPS = (1, 2, 3, 5, 8, 12)

# (metric, relative width, absolute width): a band reaches the larger of the two to either side. The first that matches
# counts; a metric without a rule is reported and never judged. See tests/baselines/README.md.
RULES: tuple[tuple[str, float, float], ...] = (
    (r"04 (tokens|learning rate), step \d+", 1e-6, 0),
    (r"04 tokens trained|04 steps", 0, 0),
    (r"04 loss, step .*", 0.03, 0),
    (r"04 loss, steps .*", 0.05, 0),
    (r"04 gradient norm, step 12", 0.15, 0),
    (r"04 gradient norm, step .*", 0.05, 0),
    (r"04 held-out loss, before", 0.005, 0),
    (r"04 held-out loss, after", 0.05, 0),
    (r"04 house style, before|04 right help, before", 0, 0.05),
    (r"04 house style, after", 0, 0.15),
    (r"04 right help, after", 0, 0.20),
    (r"02 weights, MiB", 0.005, 0),
    (r"05 replies that differ from the base", 0, 0),
    (r"06 perplexity, in memory", 0.10, 0),
    (r"06 perplexity change, .*", 0, 0.02),
    (r"06 house style, .*", 0, 2),
    (r"04 peak GiB", 0.5, 0),
    (r"peak GiB, .*", 0.75, 0),
)


class RegressError(InputError):
    """There is no run to judge, or none that can be recorded."""


@dataclass(frozen=True)
class Metrics:
    """What one run measured.

    Attributes:
        of: what the numbers belong to: profile, device, model, steps, and the libraries' versions.
        values: {name: number or claim}; times in seconds, memory in GiB, losses in nats a token.
    """

    of: dict[str, Any]
    values: dict[str, float | bool]


def last_run() -> Path:
    """The folder of the run that wrote a notebook last: `make run` alone goes where its machine's profile says.

    Raises:
        RegressError: no run is there.
    """
    written = [path for profile in PROFILES for path in RUNS.glob(f"{profile}/executed/*.ipynb")]
    if not written:
        where, expected = str(RUNS), f"a run in {' or '.join(PROFILES)}"
        raise RegressError(where, found="no executed notebook", expected=expected, fix="run `make run` first")
    return max(written, key=lambda path: path.stat().st_mtime).parent.parent


def collect_metrics(run_dir: str | Path) -> Metrics:
    """Read what a run measured from its report, its executed notebooks, and the runner's own measures.

    Chapters that did not run leave out what is theirs.

    Raises:
        RegressError: the folder holds no run of `helpers.series`, or a file of it is half-written.
    """
    run_dir = Path(run_dir)
    measured = _read_json(run_dir / "executed" / "measured.json")
    if "profile" not in measured:
        where, expected = str(run_dir), "a run folder with executed/measured.json"
        raise RegressError(where, found="no run of the series", expected=expected, fix="run `make run` first")
    artefacts = _read_json(run_dir / "handoff.json").get("artefacts", {})
    last = list(artefacts.values())[-1] if artefacts else {}
    report = _read_json(run_dir / "report.json")
    of = {"profile": measured["profile"], "device": measured["kind"], "model": last.get("base_model", "")}
    of |= {"steps": report.get("steps"), "versions": last.get("versions", {})}
    texts = {chapter: cell_texts(run_dir / "executed" / f"{chapter}.ipynb") for chapter in CHAPTER_NAMES}
    values: dict[str, float | bool] = {}
    if weights := _search(r"^(\d+) MiB of weights", texts["02_load_and_lora"]):
        values["02 weights, MiB"] = int(weights[1])
    values |= _training_metrics(report)
    for tagged, text in texts["04_train"]:
        if tagged:
            values |= {
                f"04 {claim}": holds == "True" for claim, holds in re.findall(r"^(.+): (True|False)$", text, re.M)
            }
    if replies := _search(r"^Result: (\d+) of \d+ held-out replies differ", texts["05_infer"]):
        values["05 replies that differ from the base"] = int(replies[1])
    values |= _export_metrics(next((text for _, text in texts["06_save"] if text.startswith("form  ")), ""))
    for chapter, seconds in measured["seconds"].items():
        values[f"seconds, {chapter}"] = seconds
        values[f"peak GiB, {chapter}"] = measured["chapters"][chapter]["peak_gib"]
    return Metrics(of, values)


def _training_metrics(report: Mapping[str, Any]) -> dict[str, float | bool]:
    """Chapter 04's numbers: at fixed steps, over quarters of the run, and before and after it."""
    if not report:
        return {}
    values: dict[str, float | bool] = {"04 steps": report["steps"]}
    logged = {entry["step"]: entry for entry in report["log"] if "loss" in entry}
    # Transformers counts on where a run was resumed; TRL's own `num_tokens` begins again at 0.
    shown = {"tokens": "num_input_tokens_seen", "learning rate": "learning_rate", "gradient norm": "grad_norm"}
    shown |= {"loss": "loss"}
    for name, key in shown.items():
        steps = [step for step in FIXED_STEPS if key in logged.get(step, {})]
        values |= {f"04 {name}, step {step}": logged[step][key] for step in steps}
    quarter = report["steps"] // 4
    for first in range(1, 4 * quarter, quarter) if quarter > 1 else ():
        losses = [logged[step]["loss"] for step in range(first, first + quarter) if step in logged]
        if len(losses) == quarter:
            values[f"04 loss, steps {first} to {first + quarter - 1}"] = sum(losses) / quarter
    for name in ("held_out_loss", "house_style", "right_help"):
        said = report.get(name, {})  # intervals too, which are not judged
        values |= {f"04 {_words(name)}, {when}": said[when] for when in ("before", "after") if when in said}
    tokens = max((entry.get(shown["tokens"], 0) for entry in logged.values()), default=0)
    if tokens:
        values |= {"04 tokens trained": tokens, "04 tokens per second": tokens / report["seconds"]}
    return values | {"04 seconds of training": report["seconds"], "04 peak GiB": report["peak_reserved_gib"]}


def _words(name: str) -> str:
    return {"held_out_loss": "held-out loss"}.get(name, name.replace("_", " "))


def _export_metrics(table: str) -> dict[str, float | bool]:
    """Chapter 06's table: perplexity of each form, how many replies keep the house style, and its verdict."""
    values: dict[str, float | bool] = {}
    for row in read_table(table):
        form = row["form"]
        if not row["change"]:
            values[f"06 perplexity, {form}"] = float(row["perplexity"])
        else:
            values[f"06 perplexity change, {form}"] = float(row["change"].rstrip("%")) / 100
            if not form.startswith("GGUF ") and not form.endswith("4-bit base"):
                values[f"06 verdict, {form}"] = row["verdict"] == "ok"
        if row.get("house style"):
            values[f"06 house style, {form}"] = int(row["house style"])
    return values


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of a table that `text_table` wrote, as {heading: cell}; what follows the table is left out.

    Example:
        >>> read_table(text_table(["form", "change"], [["merged", "+0.1%"]]))
        [{'form': 'merged', 'change': '+0.1%'}]
    """
    lines = text.splitlines()
    if len(lines) < 2 or not re.fullmatch(r"-+(  -+)*", lines[1]):
        return []
    spans = [match.span() for match in re.finditer("-+", lines[1])]
    names, *rows = (
        [line[start:end].strip() for start, end in spans]
        for line in [lines[0], *lines[2:]]
        if line.strip() and all(line[end : end + 2].strip() == "" for _, end in spans[:-1])
    )
    return [dict(zip(names, row, strict=True)) for row in rows]


def cell_texts(executed: Path) -> list[tuple[bool, str]]:
    """(whether it is compared, what it showed as text) for each code cell of an executed notebook; [] without one.

    Raises:
        RegressError: it is no notebook, or half of one.
    """
    import nbformat

    if not executed.is_file():
        return []
    try:
        cells = nbformat.read(executed, as_version=4).cells
    except ValueError:
        raise _half_written(executed) from None
    return [
        (
            "nbval-check-output" in cell.metadata.get("tags", []),
            "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs),
        )
        for cell in cells
        if cell.cell_type == "code"
    ]


def _search(pattern: str, texts: list[tuple[bool, str]]) -> re.Match[str] | None:
    return next((found for _, text in texts if (found := re.search(pattern, text, re.MULTILINE))), None)


def _half_written(path: Path) -> RegressError:
    fix = "run the series again"
    return RegressError(str(path), found="no JSON, or half of it", expected="what a whole run wrote", fix=fix)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise _half_written(path) from None


def band(name: str, was: float | bool) -> tuple[float, float] | None:
    """The lowest and the highest value that a metric may have, by `RULES`; None where it is not judged.

    Example: band("04 held-out loss, after", 0.2) -> (0.19, 0.21)
    """
    if isinstance(was, bool):
        return (was, was)
    for pattern, relative, absolute in RULES:
        if re.fullmatch(pattern, name):
            width = max(relative * abs(was), absolute)
            return (was - width, was + width)
    return None


@dataclass(frozen=True)
class BandReport:
    """Each metric against its band.

    Attributes:
        rows: (metric, was, is, allowed, verdict); the verdicts are "ok", "OUTSIDE", "MISSING", "not judged".
        unlike: in what this run is not the one that the bands are for; then nothing is judged.
    """

    rows: tuple[tuple[str, str, str, str, str], ...]
    unlike: tuple[str, ...]

    _headers = ("metric", "was", "is", "allowed", "verdict")

    @property
    def outside(self) -> tuple[tuple[str, str, str, str, str], ...]:
        """The rows that miss their band."""
        return tuple(row for row in self.rows if row[4] in ("OUTSIDE", "MISSING"))

    @property
    def ok(self) -> bool:
        """Whether nothing that is judged misses its band."""
        return bool(self.unlike) or not self.outside

    def _summary(self) -> str:
        if self.unlike:
            return f"Reported, not judged: {'; '.join(self.unlike)}."
        judged = sum(row[4] != "not judged" for row in self.rows)
        return f"{judged - len(self.outside)} of {judged} metrics lie in their bands."

    def __repr__(self) -> str:
        return text_table(self._headers, self.rows) + "\n" + self._summary()

    def _repr_html_(self) -> str:
        return html_table(self._headers, self.rows) + f"<p>{self._summary()}</p>"


def judge(metrics: Metrics, baseline: Mapping[str, Any]) -> BandReport:
    """Hold every metric against its band.

    Args:
        baseline: what `make_baseline` made, or {} where none is recorded for this profile and device.
    """
    unlike = _differences(baseline["of"], metrics.of) if baseline else ["no baseline for this profile and device"]
    recorded = baseline.get("values", {})
    rows = []
    for name in dict.fromkeys([*recorded, *metrics.values]):
        entry, value = recorded.get(name, {}), metrics.values.get(name)
        allowed = entry.get("allowed")
        if value is None:
            verdict = "MISSING"
        elif allowed is None:
            verdict = "not judged"
        else:
            verdict = "ok" if allowed[0] <= value <= allowed[1] else "OUTSIDE"  # NaN is outside
        limits = "" if allowed is None else " … ".join(dict.fromkeys(map(_digits, allowed)))
        rows.append((name, _digits(entry.get("was")), _digits(value), limits, verdict))
    return BandReport(tuple(rows), tuple(unlike))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What the baseline belongs to and this run does not, such as "torch is 2.13.0, was 2.11.0".

    A version's build label does not count: `2.13.0+cpu` and `2.13.0`, from two indexes, are the same code.
    """
    flat = [{**run, **{name: public(text) for name, text in run.get("versions", {}).items()}} for run in (then, now)]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if name != "versions"]
    pairs = [(name, flat[0].get(name), flat[1].get(name)) for name in names]
    return [f"{name} is {is_now}, was {was}" for name, was, is_now in pairs if was != is_now]


def _digits(value: float | bool | None) -> str:
    """A number as it is shown: five significant digits."""
    if value is None:
        return ""
    return str(value) if isinstance(value, bool) else f"{value:.5g}" if abs(value) < 1e5 else f"{value:.0f}"


def baseline_path(of: Mapping[str, Any]) -> Path:
    """Where the bands of a profile and a device are: `tests/baselines/cpu-avx512-cpu.json`.

    A model that is not the profile's own is named too: `t4-tesla-t4-smollm2-135m-instruct.json`.
    """
    own = PROFILES.get(of["profile"], {}).get("model_name")
    parts = [of["profile"], of["device"], *([of["model"]] if of.get("model") not in (None, "", own) else [])]
    return BASELINES / (re.sub("[^a-z0-9]+", "-", " ".join(parts).lower()) + ".json")


def make_baseline(metrics: Metrics) -> dict[str, Any]:
    """A baseline: what the numbers belong to, and each with the band that `RULES` gives it."""
    values = {name: {"was": was, "allowed": band(name, was)} for name, was in metrics.values.items()}
    return {"of": metrics.of, "recorded": time.strftime("%Y-%m-%d"), "values": values}


@dataclass(frozen=True)
class Shown:
    """The outcome of comparing one executed notebook: its tagged cells, and what differs, [(cell, how)]."""

    chapter: str
    compared: int
    problems: tuple[tuple[str, str], ...]


def compare_shown(
    run_dir: Path,
    *,
    against: Path,
    reports: Path,
    chapters: Sequence[str] = CHAPTER_NAMES,
    code_only: bool = False,
) -> list[Shown]:
    """Compare the executed notebooks with recorded ones through nbval, in a pytest of its own; no kernel starts.

    Args:
        run_dir: the run folder; `executed` in it holds the notebooks.
        against: the folder with the recorded notebooks.
        reports: where pytest's JUnit file goes.
        chapters: which ones.
        code_only: look at no output, only whether the code was executed to its end.

    A problem with the cell "code" means that the notebook was not executed, stopped at an error, or is another one.
    """
    files = [str(against / f"{chapter}.ipynb") for chapter in chapters]
    options = ["--executed-in", str(run_dir / "executed"), *(["-k", "code"] if code_only else [])]
    run_pytest([*files, *options], junit=reports / "shown.xml")
    return read_junit(reports / "shown.xml")


def run_pytest(arguments: list[str], *, junit: Path) -> None:
    """pytest with nbval and `tests/nbval_executed.py` alone, in the series' root; its outcome is in the JUnit file."""
    junit.unlink(missing_ok=True)
    options = ["-p", "no:cacheprovider", "--color=no", f"--nbval-sanitize-with={SANITIZER}", f"--junit-xml={junit}"]
    loaded = ["-p", "nbval_executed", "-p", "nbval.plugin"]  # in this order, for the import that the first one saves
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    command = [sys.executable, "-m", "pytest", *loaded, *options, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment | {"CATCH_UP": "0"}, capture_output=True, text=True)
    if not junit.is_file():
        raise RegressError(
            "pytest", found=done.stderr[-2000:] or done.stdout[-2000:], expected="a run", fix="see above"
        )


def read_junit(path: Path) -> list[Shown]:
    """What pytest wrote about notebooks, a `Shown` for each; a test's name is its cell."""
    found: dict[str, tuple[list[str], list[tuple[str, str]]]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        cell, notebook = case.get("name", ""), case.get("classname", "")
        named = re.search(r"\d\d_\w+", f"{notebook}.{cell}")
        cells, problems = found.setdefault(named[0] if named else notebook, ([], []))
        cells.append(cell)
        problems += [(cell, bad.text or bad.get("message", "")) for bad in case if bad.tag in ("failure", "error")]
    return [
        Shown(chapter, sum(cell != "code" for cell in cells), tuple(problems))
        for chapter, (cells, problems) in found.items()
    ]


def run_nbval(chapter: str, *, reports: Path) -> Shown:
    """Execute and compare one chapter by nbval itself: `pytest --nbval-lax`, in a folder of its own.

    nbval takes no parameters and works in the notebook's folder, so it gets a copy with the parameters put in, below
    the series' root, where the setup cell finds it.
    """
    from papermill.iorw import load_notebook_node, write_ipynb
    from papermill.parameterize import parameterize_notebook

    folder = ROOT / "runs" / "nbval"
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {"PROFILE": RECORDED_PROFILE, "RUN_DIR": str(folder)}
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOKS / f"{chapter}.ipynb")), parameters)
    write_ipynb(notebook, str(folder / f"{chapter}.ipynb"))
    options = ["--nbval-lax", "--nbval-kernel-name=python3", str(folder / f"{chapter}.ipynb")]
    run_pytest(options, junit=reports / "nbval.xml")
    return read_junit(reports / "nbval.xml")[0]


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a run: (chapter, seconds, cells compared, verdict, key figure) each, and its bands.

    `seconds` is what comparing and judging took; what nbval executed itself does not count.
    """

    shown: tuple[Shown, ...]
    bands: BandReport
    chapters: tuple[tuple[str, str, str, str, str], ...]
    seconds: float

    _headers = ("chapter", "seconds", "cells compared", "verdict", "key figure")

    @property
    def ok(self) -> bool:
        return self.bands.ok and not any(shown.problems for shown in self.shown)

    def _headline(self) -> str:
        differing = sum(len(shown.problems) for shown in self.shown)
        what = f"{differing} outputs differ or are missing; " if differing else ""
        verdict = "ok" if self.ok else "FAILED"
        return f"Regression {verdict}: {what}{self.bands._summary()} Compared in {self.seconds:.1f} s."

    def _problems(self) -> list[tuple[str, str]]:
        return [(f"{shown.chapter}, {cell}", how.strip()) for shown in self.shown for cell, how in shown.problems]

    def __repr__(self) -> str:
        parts = [text_table(self._headers, self.chapters)]
        parts += [f"{where}:\n{how}" for where, how in self._problems()]
        if self.bands.outside or self.bands.unlike:
            parts.append(text_table(self.bands._headers, self.bands.outside or self.bands.rows))
        return "\n\n".join([*parts, self._headline()])

    def markdown(self) -> str:
        """The same for a job page: verdict, chapters, what differs, what is outside, and all metrics folded away."""
        parts = [f"## {self._headline()}", markdown_table(self._headers, self.chapters)]
        parts += [f"### {where}\n\n```\n{how[:3000]}\n```" for where, how in self._problems()]
        if self.bands.outside:
            parts += ["### Outside their bands", markdown_table(self.bands._headers, self.bands.outside)]
        table = markdown_table(self.bands._headers, self.bands.rows)
        parts.append(f"<details><summary>All metrics</summary>\n\n{table}\n\n</details>")
        return "\n\n".join(parts) + "\n"


def belongs_to(metric: str, chapter: str) -> bool:
    """Whether a metric is a chapter's. Example: "04 peak GiB" and "peak GiB, 04_train" are those of "04_train"."""
    return metric.startswith(f"{chapter[:2]} ") or metric.endswith(f", {chapter}")


def check_run(run_dir: str | Path, *, baselines: Path = BASELINES, nbval: str = "") -> Verdict:
    """Compare and judge a run; writes `metrics.json` and `reports/` into its folder.

    Args:
        run_dir: the run folder.
        baselines: the folder of the bands.
        nbval: a chapter that nbval shall execute too; what it finds is part of the verdict.

    Raises:
        RegressError: the folder holds no run, or half-written files; or pytest did not run.
    """
    run_dir = Path(run_dir).resolve()
    metrics = collect_metrics(run_dir)
    reports = run_dir / "reports"
    shutil.rmtree(reports, ignore_errors=True)  # an earlier verdict must not stand beside a run that cannot be judged
    reports.mkdir()
    _write_json(run_dir / "metrics.json", {"of": metrics.of, "values": metrics.values})
    alone = [replace(run_nbval(nbval, reports=reports), chapter=f"{nbval}, by nbval")] if nbval else []
    start = time.perf_counter()
    other = metrics.of["profile"] != RECORDED_PROFILE  # another model and other data, whose outputs nobody recorded
    shown = compare_shown(run_dir, against=NOTEBOOKS, reports=reports, code_only=other)
    bands = judge(metrics, _read_json(baselines / baseline_path(metrics.of).name))
    seconds = time.perf_counter() - start
    by_chapter = {each.chapter: each for each in shown}
    chapters = []
    for chapter in CHAPTER_NAMES:
        executed = run_dir / "executed" / f"{chapter}.ipynb"
        each = by_chapter.get(chapter, Shown(chapter, 0, ()))
        off = [row for row in bands.outside if belongs_to(row[0], chapter) and not bands.unlike]
        verdict = "FAILED" if each.problems or off else "ok" if executed.is_file() else "not executed"
        figure = read_result(executed) if executed.is_file() else ""
        took = _digits(metrics.values.get(f"seconds, {chapter}"))
        chapters.append((chapter, took, str(each.compared), verdict, figure))
    chapters += [
        (each.chapter, "", str(each.compared), "FAILED" if each.problems else "ok", "executed by nbval")
        for each in alone
    ]
    return Verdict((*shown, *alone), bands, tuple(chapters), seconds)


def write_reports(verdict: Verdict, run_dir: str | Path) -> None:
    """Write `reports/`: `bands.xml` (JUnit, beside pytest's `shown.xml`), `summary.md`, and the gallery."""
    run_dir = Path(run_dir)
    reports = run_dir / "reports"
    rows = verdict.bands.rows
    suite = ElementTree.Element("testsuite", name="bands", tests=str(len(rows)))
    for name, was, found, allowed, outcome in rows:
        case = ElementTree.SubElement(suite, "testcase", classname="bands", name=name)
        if verdict.bands.unlike or outcome == "not judged":
            ElementTree.SubElement(case, "skipped", message=f"is {found}, was {was}")
        elif outcome != "ok":
            ElementTree.SubElement(case, "failure", message=f"is {found}, was {was}, allowed {allowed}")
    for count, kind in (("failures", "failure"), ("skipped", "skipped")):
        suite.set(count, str(len(suite.findall(f"testcase/{kind}"))))
    ElementTree.ElementTree(suite).write(reports / "bands.xml", encoding="utf-8", xml_declaration=True)
    (reports / "summary.md").write_text(verdict.markdown(), encoding="utf-8")
    write_gallery(verdict, run_dir)


def write_gallery(verdict: Verdict, run_dir: Path) -> None:
    """The executed notebooks as HTML pages, and an index of them with the verdict: `reports/index.html`."""
    import html

    from nbconvert import HTMLExporter

    pages = []
    for chapter in CHAPTER_NAMES:
        executed = run_dir / "executed" / f"{chapter}.ipynb"
        if executed.is_file():
            page, _ = HTMLExporter().from_filename(str(executed))
            (run_dir / "reports" / f"{chapter}.html").write_text(page, encoding="utf-8")
            pages.append(f'<li><a href="{chapter}.html">{chapter}</a></li>')
    problems = "".join(f"<h2>{html.escape(a)}</h2><pre>{html.escape(b)}</pre>" for a, b in verdict._problems())
    body = f"<h1>{html.escape(verdict._headline())}</h1><ul>{''.join(pages)}</ul>"
    body += html_table(verdict._headers, verdict.chapters) + problems + verdict.bands._repr_html_()
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Regression</title><body>{body}</body></html>\n'
    (run_dir / "reports" / "index.html").write_text(page, encoding="utf-8")


def record(run_dir: str | Path, *, baselines: Path = BASELINES) -> Path:
    """Keep what a whole, good run measured as its device's baseline; returns the file.

    Raises:
        RegressError: a chapter did not run or failed, or a claim of chapter 04 or 06 does not hold.
    """
    metrics = collect_metrics(run_dir)
    executed = Path(run_dir) / "executed"
    for chapter in CHAPTER_NAMES:
        state = "" if (executed / f"{chapter}.ipynb").is_file() else "not executed"
        if state or not read_result(executed / f"{chapter}.ipynb"):
            found, fix = state or "no result, it failed", "run the series to its end first: `make run`"
            raise RegressError(chapter, found=found, expected="a chapter that ran to its end", fix=fix)
    if false := [name for name, value in metrics.values.items() if value is False]:
        raise RegressError(false[0], found="False", expected="a run whose claims all hold", fix="record a good run")
    path = baselines / baseline_path(metrics.of).name
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, make_baseline(metrics))
    return path


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = "a run folder, such as runs/cpu; default: that of runs/cpu and runs/t4 which was written last"
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="RUN_DIR", help=where)
    parser.add_argument("--nbval", metavar="CHAPTER", choices=CHAPTER_NAMES, default="", help="nbval executes it too")
    parser.add_argument("--record", action="store_true", help="keep this run's numbers as its device's baseline")
    options = parser.parse_args(arguments)
    try:
        run_dir = options.run_dir or last_run()
        if options.record:
            print(f"Recorded {record(run_dir).relative_to(ROOT)}")
            return 0
        verdict = check_run(run_dir, nbval=options.nbval)
        write_reports(verdict, run_dir)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(verdict)
    print(f"Reports: {run_dir / 'reports'}")
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
