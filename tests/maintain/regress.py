"""One verdict on a run of the series: what its notebooks showed, and what it measured, against what is committed.

python -m tests.maintain.regress                      judge the run that ended last
python -m tests.maintain.regress runs/cpu             judge that run; its reports/ gets summary.md and junit.xml
python -m tests.maintain.regress runs/cpu --record    keep what it measured as the baseline of its device

The exit status is 0 for ok, 1 for FAILED, 2 where there is no run to read, and 3 for NOT JUDGED.

*Shown*: the outputs of tagged cells must be those of the committed notebooks (`tests/maintain/shown.py`). *Measured*:
every number that the run handed on as JSON must lie in its band of `tests/baselines/PROFILE-DEVICE.json`, whose README
says where the widths of `RULES` come from. A band holds for the versions, device, model and number of steps that its
file names. Another run is NOT JUDGED, and still held to what must hold anywhere: numbers are finite, claims are true,
the held-out loss falls, house style does not, and exported forms keep their limits.
"""

import argparse
import contextlib
import io
import json
import math
import re
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.base import ROOT, InputError, short_path, text_table
from helpers.chapters import CHAPTER_NAMES
from helpers.environment.requirements import public
from helpers.handoff.run import RECORDED_PACKAGES
from tests.maintain.series import NOTEBOOKS, read_result
from tests.maintain.shown import compare_notebook, half_written, read_code_cells

RUNS = ROOT / "runs"
BASELINES = ROOT / "tests" / "baselines"
JUDGE = ROOT / "tests" / "maintain" / "judge_run.py"
MEASURED = "executed/measured.json"
RECORDED_PROFILE = "cpu"  # the one whose outputs the committed notebooks hold
FIXED_STEPS = (1, 2, 3, 5, 8, 12)
LOGGED = ("loss", "learning_rate", "grad_norm", "num_input_tokens_seen")  # not num_tokens, which a resumed run restarts
OK, FAILED, NOT_JUDGED, MOVED = "ok", "FAILED", "not judged", "not judged, moved"

# (metric, relative width, absolute width): a band reaches the larger of the two to either side. The first that matches
# counts; a metric without a rule is reported and never judged. See tests/baselines/README.md.
RULES = (
    (r"02 trainable_parameters|03 .*|04 steps|04 tokens_trained", 0, 0),
    (r"02 weights_mib", 0.005, 0),
    (r"04 (num_input_tokens_seen|learning_rate), .*", 1e-6, 0),
    (r"04 loss, step .*", 0.03, 0),
    (r"04 loss, steps .*", 0.05, 0),
    (r"04 grad_norm, step 12", 0.15, 0),
    (r"04 grad_norm, step .*", 0.05, 0),
    (r"04 held_out_loss_before", 0.005, 0),
    (r"04 held_out_loss_after", 0.05, 0),
    (r"04 (house_style|right_help)_before", 0, 0.05),
    (r"04 house_style_after", 0, 0.15),
    (r"04 right_help_after", 0, 0.20),
    (r"04 peak_gib", 0.5, 0),
    (r"05 replies|05 differing_replies|06 forms|06 forms_within_limits", 0, 0),
    (r"06 perplexity_in_memory", 0.10, 0),
    (r"06 perplexity_change, .*", 0, 0.02),
    (r"06 house_style, .*|06 same_replies, (adapter|merged)", 0, 2),
    (r"07 held_out_loss, .*|07 general_loss, .*", 0.30, 0),
    (r"07 general_known, .*", 0, 3),
    (r"peak_gib, .*", 0.75, 0),
)
# What must hold on any device: (metric, how it must be, than which other one, whether it may be missing).
CLAIMS = (
    ("04 held_out_loss_after", "<", "04 held_out_loss_before", False),
    ("04 house_style_after", ">=", "04 house_style_before", True),  # other data have no house style
    ("06 forms_within_limits", "==", "06 forms", False),
    ("07 held_out_loss, works", "<", "07 held_out_loss, rate too low", True),  # a run may be of other chapters
    ("07 held_out_loss, best kept", "<", "07 held_out_loss, by heart", True),
    ("07 general_loss, 10 % general", "<", "07 general_loss, works", True),
)


@dataclass(frozen=True)
class Metrics:
    """What one run measured."""

    of: dict[str, Any]  # what the numbers belong to: profile, device, model, steps, and the libraries' versions
    values: dict[str, float | bool]  # {name: number or claim}; what was not finite is NaN


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: str  # OK, FAILED, NOT_JUDGED, or MOVED: it would lie outside the band of another device or version
    said: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.said}"

    def is_of(self, chapter: str) -> bool:
        """Example: "04 peak_gib" and "peak_gib, 04_train" are checks of "04_train"."""
        return self.name.startswith(f"{chapter[:2]} ") or self.name.endswith(f", {chapter}")


@dataclass(frozen=True)
class Verdict:
    """All checks of a run."""

    checks: tuple[Check, ...]
    unlike: tuple[str, ...] = ()  # in what it is not the run that the bands are for; then they do not count

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict == FAILED)

    @property
    def status(self) -> int:
        """The exit status of the command."""
        return 1 if self.failed else 3 if self.unlike else 0

    @property
    def headline(self) -> str:
        held = sum(check.verdict == OK for check in self.checks)
        word = {0: "Regression ok", 1: "Regression FAILED", 3: "NOT JUDGED"}[self.status]
        return f"{word}: {held} of {held + len(self.failed)} checks passed."


def last_run() -> Path:
    """The folder of the run that ended last; InputError where none is there."""
    ended = list(RUNS.glob(f"*/{MEASURED}"))
    if not ended:
        raise InputError(str(RUNS), found=f"no {MEASURED}", expected="a run", fix="run `make run` first")
    return max(ended, key=lambda path: path.stat().st_mtime).parent.parent


def collect_metrics(run_dir: str | Path) -> Metrics:
    """Read what a run measured: numbers/*.json of its chapters, chapter 04's report, and the runner's measures.

    Chapters that did not run leave out what is theirs. Times and speed are among the metrics, but no rule is for them:
    how fast a machine is, is nothing that a test can know. InputError where the folder holds no run, or half-written
    files.
    """
    run_dir = Path(run_dir)
    measured = _read_json(run_dir / MEASURED, "profile", "kind", "chapters", "seconds")
    report = _read_json(run_dir / "report.json", "base_model", "steps", "environment", "evidence", "log")
    if not measured:
        found, expected = f"no {MEASURED}", "a run folder of the series"
        raise InputError(str(run_dir), found=found, expected=expected, fix="run `make run` first")
    of = {"profile": measured["profile"], "device": measured["kind"]}
    of |= {"model": report.get("base_model"), "steps": report.get("steps")}
    versions = report.get("environment", {})
    of |= {"versions": {name: versions[name] for name in RECORDED_PACKAGES if name in versions}}
    values: dict[str, float | bool] = {}
    for path in sorted(run_dir.glob("numbers/*.json")):
        values |= flatten(_read_json(path), f"{path.stem[:2]} ", where=path)
    if report:
        evidence = {claim: holds for claim, _, holds in report["evidence"]["rows"]}
        values |= flatten({"evidence": evidence, **training_log(report)}, "04 ", where=run_dir / "report.json")
    peaks = {chapter: each["peak_gib"] for chapter, each in measured["chapters"].items()}
    values |= flatten({"seconds": measured["seconds"], "peak_gib": peaks}, where=run_dir / MEASURED)
    return Metrics(of, values)


def flatten(numbers: Mapping[str, Any], prefix: str = "", *, where: Path) -> dict[str, float | bool]:
    """Name each number after its place, the only rule for names: what is inside follows a comma.

    Example: {"perplexity_change": {"merged": 0.001}} with the prefix "06 " -> {"06 perplexity_change, merged": 0.001}
    """
    flat: dict[str, float | bool] = {}
    for key, value in numbers.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}, ", where=where)
        elif value is None or isinstance(value, bool | int | float):
            flat[f"{prefix}{key}"] = math.nan if value is None else value  # JSON has no word for what is not finite
        else:
            expected, fix = "a number, a boolean, or an object of these", "record it as a number"
            raise InputError(f"{where}, {prefix}{key}", found=repr(value), expected=expected, fix=fix)
    return flat


def training_log(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What chapter 04 logged at fixed steps, and its mean loss over quarters of the run."""
    logged = {entry["step"]: entry for entry in report["log"] if "loss" in entry}
    steps = [step for step in FIXED_STEPS if step in logged]
    log = {key: {f"step {step}": logged[step][key] for step in steps if key in logged[step]} for key in LOGGED}
    quarter = report["steps"] // 4
    for first in range(1, 4 * quarter, quarter) if quarter > 1 else ():
        losses = [logged[step]["loss"] for step in range(first, first + quarter) if step in logged]
        mean = None if None in losses else sum(losses) / quarter
        log["loss"] |= {f"steps {first} to {first + quarter - 1}": mean} if len(losses) == quarter else {}
    return log


def _read_json(path: Path, *needs: str) -> dict[str, Any]:
    """The object in a file, {} where there is no file; InputError where it is none, or one without what it needs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict) or (content and not content.keys() >= set(needs)):
        raise half_written(path)
    return content


def band(name: str, was: float | bool) -> tuple[float, float] | None:
    """The lowest and the highest value that a metric may have, by `RULES`; None where it is not judged.

    Example: band("04 held_out_loss_after", 0.2) -> (0.19, 0.21)
    """
    if isinstance(was, bool):
        return (was, was)
    rule = next((widths for pattern, *widths in RULES if re.fullmatch(pattern, name)), None)
    width = max(rule[0] * abs(was), rule[1]) if rule else 0
    return (was - width, was + width) if rule else None


def judge(metrics: Metrics, baseline: Mapping[str, Any]) -> Verdict:
    """Hold every metric against its band in what `make_baseline` made ({}: none), and against what holds anywhere."""
    none = [f"none is recorded for {metrics.of['profile']} on {metrics.of['device']}"]
    unlike = _differences(baseline["of"], metrics.of) if baseline else none
    recorded, values = baseline.get("values", {}), metrics.values
    checks = []
    for name in dict.fromkeys([*recorded, *values]):
        value, entry = values.get(name), recorded.get(name, {})
        said = f"is {_digits(value)}" + (f", was {_digits(entry['was'])}" if entry else "")
        if allowed := entry.get("allowed"):
            said += f", allowed {' … '.join(dict.fromkeys(map(_digits, allowed)))}"
        checks.append(Check(name, _verdict(value, allowed, like=not unlike), said))
    for name, how, other, optional in CLAIMS:
        one, two = values.get(name), values.get(other)
        if not (optional and one is two is None):
            holds = None not in (one, two) and {"<": one < two, ">=": one >= two, "==": one == two}[how]
            said = f"with {_digits(one)} and {_digits(two)}"
            checks.append(Check(f"{name} {how} {other}", OK if holds else FAILED, said))
    return Verdict(tuple(checks), tuple(unlike))


def _verdict(value: float | bool | None, allowed: Sequence[float] | None, *, like: bool) -> str:
    if value is False or (value is not None and not math.isfinite(value)):
        return FAILED  # on any device
    if value is True:
        return OK
    if allowed is None:
        return NOT_JUDGED
    within = value is not None and allowed[0] <= value <= allowed[1]
    return (OK if within else FAILED) if like else (NOT_JUDGED if within else MOVED)


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
        return "missing"
    return str(value) if isinstance(value, bool) else f"{value:.5g}" if abs(value) < 1e5 else f"{value:.0f}"


def baseline_path(of: Mapping[str, Any]) -> Path:
    """Where the bands of a profile and a device are: `tests/baselines/cpu-avx512-cpu.json`."""
    return BASELINES / (re.sub("[^a-z0-9]+", "-", f"{of['profile']} {of['device']}".lower()) + ".json")


def make_baseline(metrics: Metrics) -> dict[str, Any]:
    """A baseline: what the numbers belong to, and each with the band that `RULES` gives it."""
    values = {name: {"was": was, "allowed": band(name, was)} for name, was in metrics.values.items()}
    return {"of": metrics.of, "recorded": time.strftime("%Y-%m-%d"), "values": values}


def check_shown(run_dir: Path, *, code_only: bool) -> tuple[Check, ...]:
    """One check a chapter: it ran to its end, and showed what is recorded."""
    checks = []
    for chapter in CHAPTER_NAMES:
        file = f"{chapter}.ipynb"
        shown = compare_notebook(run_dir / "executed" / file, NOTEBOOKS / file, code_only=code_only)
        said = shown.stopped or "\n".join(f"{cell}: {how}" for cell, how in shown.differences)
        checks.append(Check(f"shown, {chapter}", FAILED if said else OK, said or f"in {shown.compared} cells"))
    return tuple(checks)


def check_run(run_dir: str | Path) -> Verdict:
    """Compare and judge a run; InputError where the folder holds none, or half-written files."""
    metrics = collect_metrics(run_dir)
    other = metrics.of["profile"] != RECORDED_PROFILE  # another model or other data, whose outputs nobody recorded
    judged = judge(metrics, _read_json(baseline_path(metrics.of), "of", "values"))
    return Verdict((*check_shown(Path(run_dir), code_only=other), *judged.checks), judged.unlike)


def record(run_dir: str | Path) -> Path:
    """Keep what a run measured as its device's baseline; InputError where it is not whole, or a check of it fails."""
    metrics = collect_metrics(run_dir)
    checks = (*check_shown(Path(run_dir), code_only=True), *judge(metrics, {}).checks)
    if failed := Verdict(checks).failed:
        where, found, fix = failed[0].name, failed[0].said, "record a whole, good run"
        raise InputError(where, found=found, expected="a check that passes", fix=fix)
    path = baseline_path(metrics.of)
    path.write_text(json.dumps(make_baseline(metrics), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def describe(verdict: Verdict, run_dir: Path) -> str:
    """One table of the chapters, then what failed or moved, and how an unjudged run becomes a baseline."""
    rows, good = [], NOT_JUDGED if verdict.unlike else OK  # of a chapter without a failed check
    for chapter in CHAPTER_NAMES:
        executed = run_dir / "executed" / f"{chapter}.ipynb"
        verdicts = [check.verdict for check in verdict.checks if check.is_of(chapter)]
        held, bad = verdicts.count(OK), verdicts.count(FAILED)
        figure = read_result(executed) if executed.is_file() else ""
        rows.append([chapter, FAILED if bad else good, f"{held} of {held + bad}", figure])
    table = text_table(["chapter", "verdict", "checks passed", "key figure"], rows)
    told = [f"{check.verdict}: {check}" for check in verdict.checks if check.verdict in (FAILED, MOVED)]
    parts = [table, "\n".join(told)]
    if verdict.unlike:
        command = f"python -m tests.maintain.regress {short_path(run_dir)} --record"
        parts.append(f"No bands are for this run: {'; '.join(verdict.unlike)}. A good run gives them: {command}")
    return "\n\n".join(filter(None, parts))


def write_reports(verdict: Verdict, text: str, reports: Path) -> None:
    """Write summary.md for a job's page, and junit.xml by pytest: one test case a check."""
    import pytest

    reports.mkdir(exist_ok=True)
    # Indented, the text is code in Markdown, whatever a notebook put into it: every line, for one that only looks empty
    # (a space that is none of ASCII's) would end the code.
    summary = f"## {verdict.headline}\n\n{textwrap.indent(text, '    ', lambda line: True)}\n"
    (reports / "summary.md").write_text(summary, encoding="utf-8")
    options = ["-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", "--run", reports.parent]
    arguments = [JUDGE, *options, "--junitxml", reports / "junit.xml"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main([str(argument) for argument in arguments])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise InputError("pytest", found=said.getvalue()[-2000:], expected="tests that ran", fix="see above")


def cell_texts(executed: Path) -> list[tuple[str, str]]:
    """(id, what it showed as text) of each code cell, for `tests/maintain/rehearsal.py`."""
    cells = read_code_cells(executed)
    texts = [(o.get("text") or o.get("data", {}).get("text/plain", "") for o in c.outputs) for c in cells]
    return [(c.id, "\n".join(text)) for c, text in zip(cells, texts, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="RUN_DIR", help="default: the one that ended last")
    parser.add_argument("--record", action="store_true", help="keep this run's numbers as its device's baseline")
    options = parser.parse_args(arguments)
    try:
        run_dir = (options.run_dir or last_run()).resolve()
        if options.record:
            print(f"Recorded {short_path(record(run_dir))}")
            return 0
        verdict = check_run(run_dir)
        text = describe(verdict, run_dir)
        write_reports(verdict, text, run_dir / "reports")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{text}\n\n{verdict.headline}")
    return verdict.status


if __name__ == "__main__":
    sys.exit(main())
