"""Train chapter 04 again and again, and show how much of its bands good runs use.

    python -m tests.maintain.repeat                   twenty runs, on what runs/cpu has of the chapters before it
    python -m tests.maintain.repeat --runs 5          fewer
    python -m tests.maintain.repeat --fresh           forget the runs that are kept

Each run is a new process in a new folder. What it measured is kept in runs/repeat when it is done, so that a command
that was cut off goes on where it was. The table goes to tests/baselines, beside the bands.

On a CPU a training gives the same bits each time. So that the runs differ at all, every fifth is computed as on another
CPU: oneDNN is held to AVX-512 without its bfloat16 instructions, and rounds every product elsewhere (and takes longer).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.base import ROOT, InputError, replace_file
from helpers.chapters import CHAPTERS
from helpers.handoff.run import MANIFEST, Run, fingerprint
from tests.maintain.regress import BASELINES, Metrics, baseline_path, collect_metrics, judge
from tests.maintain.series import NOTEBOOKS

CHAPTER = "04_train"
NEEDS = next(chapter.needs for chapter in CHAPTERS if chapter.name == CHAPTER)
ANOTHER_CPU = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}


def repeat(source: Path, *, runs: int, work: Path, baselines: Path = BASELINES) -> tuple[Path, bool]:
    """Run the chapter until so many runs are kept, and write the table; returns its path, and whether all runs passed.

    Args:
        source: the run folder of a whole run that the bands are for.
        runs: how many in all, with those that are kept already.
        work: where they are kept.
        baselines: the folder of the bands and of the table.

    Raises:
        InputError: there are no bands for such a run, or what is kept is of another chapter.
        HandoffError: `source` lacks what the chapters before it hand on.
    """
    whole = collect_metrics(source)
    path = baselines / baseline_path(whole.of).name
    baseline = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if unlike := judge(whole, baseline).unlike:
        found, expected = "; ".join(unlike), "a run that the bands are for"
        raise InputError(str(source), found=found, expected=expected, fix="`make record`, then this again")
    work.mkdir(parents=True, exist_ok=True)
    chapter, results = code_fingerprint(CHAPTER), []
    for number in range(1, runs + 1):
        kept = work / f"{number:02}.json"
        if not kept.exists():
            another = number % 5 == 2 and whole.of["device"].endswith("CPU")
            given = {"log": work / f"{number:02}.txt", "another_cpu": another}
            replace_file(kept, json.dumps({"chapter": chapter} | run_once(source, work / "run", **given)).encode())
        result = json.loads(kept.read_text(encoding="utf-8"))
        if result["chapter"] != chapter:
            fix = "run this with --fresh"
            raise InputError(str(kept), found="a run of another chapter 04", expected="the chapter as it is", fix=fix)
        results.append(result)
        print(f"run {number} of {runs}: {'; '.join(problems(result, baseline)) or 'all in their bands'}", flush=True)
    table = path.with_name(f"repeatability-{path.stem}.md")
    table.write_text(as_markdown(results, baseline), encoding="utf-8")
    return table, not any(problems(result, baseline) for result in results)


def code_fingerprint(*chapters: str) -> str:
    """Names the code of chapters: runs of two versions of it are not one series."""
    import nbformat

    cells = [cell for name in chapters for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells]
    return fingerprint("\n".join(cell.source for cell in cells if cell.cell_type == "code"))


def run_once(source: Path, folder: Path, *, log: Path, another_cpu: bool) -> dict[str, Any]:
    """Train once in a new folder; returns what is kept: `Metrics` as a mapping, date, failed, another_cpu."""
    shutil.rmtree(folder, ignore_errors=True)
    copy_needs(source, folder)
    parameters = ROOT / "tests" / "profiles" / f"{collect_metrics(source).of['profile']}.toml"
    command = [sys.executable, "-m", "tests.maintain.series", CHAPTER, "-f", str(parameters)]
    command += ["-p", "RUN_DIR", str(folder)]
    environment = os.environ | (ANOTHER_CPU if another_cpu else {})
    with open(log, "w", encoding="utf-8") as output:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    how = {"date": time.strftime("%Y-%m-%d"), "failed": done.returncode != 0, "another_cpu": another_cpu}
    return vars(collect_metrics(folder)) | how


def copy_needs(source: Path, folder: Path) -> None:
    """Copy what the chapters before it hand on, without the caches: nothing that an earlier run computed is used."""
    for name in NEEDS:
        shutil.copytree(Run(source).artefact(name), folder / name, ignore=shutil.ignore_patterns("cache-*"))
    content = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    content["artefacts"] = {name: content["artefacts"][name] for name in NEEDS}
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")


def problems(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """What of a run's chapter 04 misses its band, one line each; empty where the run passes."""
    if result["failed"]:
        return ["the chapter did not run to its end"]
    verdict = judge(Metrics(result["of"], result["values"]), baseline)
    return [*verdict.unlike, *(str(check) for check in verdict.failed if check.name.startswith(f"{CHAPTER[:2]} "))]


def as_markdown(results: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any]) -> str:
    """The table: for each metric of chapter 04 that has a band its lowest and highest value in all runs.

    The last column says how much of the band's half-width the run that is farthest from the recorded one uses.
    """
    passed = sum(not problems(result, baseline) for result in results)
    dates = sorted({result["date"] for result in results})
    others = sum(result["another_cpu"] for result in results)
    another = f" Computed as on another CPU: {others} (`{'='.join(*ANOTHER_CPU.items())}`)." if others else ""
    verdict = f"{passed} of {len(results)} runs lie in all bands.{another} Written by `tests/maintain/repeat.py`."
    lines = [
        *heading("Repeatability of chapter 04", verdict, of=baseline["of"], dates=(dates[0], dates[-1])),
        "| metric | lowest | highest | allowed | of the band used |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, entry in baseline["values"].items():
        if name.startswith(CHAPTER[:2] + " ") and entry["allowed"] is not None:
            values = [result["values"][name] for result in results if name in result["values"]]
            lines.append(f"| {name} | {spread(values, was=entry['was'], allowed=entry['allowed'])} |")
    bad = [f"- run {number}: {line}" for number, each in enumerate(results, 1) for line in problems(each, baseline)]
    return "\n".join(lines + (["", "Outside:", "", *bad] if bad else [])) + "\n"


def heading(title: str, verdict: str, *, of: Mapping[str, Any], dates: Sequence[str]) -> list[str]:
    """The lines above a table: what it says, and the device, the versions and the days that it says it of."""
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    return [
        f"# {title}",
        "",
        verdict,
        "",
        f"- device: {of['device']}, profile {of['profile']}, model {of['model']}, {of['steps']} steps",
        f"- versions: {versions}",
        f"- date: {' to '.join(dict.fromkeys(dates))}",
        "",
    ]


def spread(values: Sequence[float | bool], *, was: float | bool, allowed: Sequence[float | bool]) -> str:
    """The cells of one metric. Example: [1.9, 2.1], was 2, allowed [1.8, 2.2] -> "1.9 | 2.1 | 1.8 … 2.2 | 50 %"."""
    low, high = allowed
    limits = " … ".join(
        dict.fromkeys(f"{limit:.6g}" if not isinstance(limit, bool) else str(limit) for limit in allowed)
    )
    if not values:
        return f"missing | missing | {limits} | "
    if isinstance(was, bool):
        return f"{min(values)} | {max(values)} | {limits} | "
    used = max(abs(value - was) for value in values) / (high - was) if high > was else None
    share = "exact" if used is None else f"{used:.0%}".replace("%", " %")
    return f"{min(values):.6g} | {max(values):.6g} | {limits} | {share}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="how many in all (20)")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "cpu", help="a whole run (runs/cpu)")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are kept")
    options = parser.parse_args(arguments)
    work = ROOT / "runs" / "repeat" / options.run_dir.name
    if options.fresh:
        shutil.rmtree(work, ignore_errors=True)
    try:
        table, ok = repeat(options.run_dir, runs=options.runs, work=work)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(table.read_text(encoding="utf-8"))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
