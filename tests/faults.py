"""Break the stack in realistic ways, one at a time, and show which chapter and which claim notices.

    python tests/faults.py                          every fault; about half an hour on one core
    python tests/faults.py no_lora four_bit_off     some

No notebook is changed: `tests/planted/sitecustomize.py`, put on the kernels' PYTHONPATH, replaces a function of a
library once Unsloth is imported. A small good run of the series comes first (24 steps, 12 held-out conversations; kept
in runs/faults for the next time). Then a fault runs from the first chapter that it can touch, on what the good run's
chapters before it handed on, until it is noticed: by a *claim* (a cell raises), by an *output* (a tagged cell shows
something else than in the good run), or by a *band* (a number leaves what `helpers.regress.RULES` allows around the
good run's, which is as wide as around a recorded one).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "faults"
CONVERSATIONS = ROOT / "notebooks" / "data" / "support_conversations.jsonl"
sys.path.insert(0, str(ROOT))

from helpers.regress import collect_metrics, compare_shown, judge, make_baseline  # noqa: E402
from helpers.series import CHAPTERS  # noqa: E402
from helpers.tables import text_table  # noqa: E402

# fault: (the first chapter that it can touch, what is broken)
FAULTS = {
    "no_lora": ("02_load_and_lora", "LoRA is added to no module"),
    "fewer_modules": ("02_load_and_lora", "LoRA leaves the feed-forward modules out"),
    "lora_seed_ignored": ("02_load_and_lora", "LoRA's seed is ignored"),
    "four_bit_off": ("02_load_and_lora", "load_in_4bit is ignored"),
    "template_swapped": ("03_data", "tokenizers load with another family's chat template"),
    "pad_is_eos": ("03_data", "the padding token is the end token"),
    "template_not_saved": ("03_data", "tokenizers are saved without their chat template"),
    "wrong_marker": ("04_train", "train_on_responses_only looks for a marker without its line break"),
    "question_trained": ("04_train", "train_on_responses_only masks nothing"),
    "end_not_trained": ("04_train", "train_on_responses_only masks the token that ends an answer"),
    "truncation_64": ("04_train", "rows are cut off after 64 tokens"),
    "labels_shifted": ("04_train", "labels reach the model one place off"),
    "learning_rate_x100": ("04_train", "the learning rate is a hundred times what was set"),
    "learning_rate_x0.01": ("04_train", "the learning rate is a hundredth of what was set"),
    "data_order": ("04_train", "rows come in the order of the file"),
    "seed_ignored": ("04_train", "the trainer's seed is ignored"),
    "a_frozen": ("04_train", "the LoRA matrices A are frozen"),
    "half_frozen": ("04_train", "half of the LoRA matrices are frozen"),
    "embedding_trained": ("04_train", "the embedding is trained too"),
    "checkpoint_not_resumed": ("04_train", "an interrupted run starts again at step 0"),
    "adapter_not_loaded": ("05_infer", "adapters load without their weights: the base model answers"),
    "merged_of_the_base": ("06_save", "the merged model is the base model"),
    "gguf_of_the_base": ("06_save", "the GGUF files hold the base model"),
}
STEPS, HELD_OUT = 24, 12

# What has to happen in a fault's first chapter before it can be planted there.
BEFORE = {"checkpoint_not_resumed": "interrupted"}


@dataclass(frozen=True)
class Caught:
    """How one fault ended: the chapter, the ways ("claim", "output", "band", or "" where nothing noticed), and what."""

    fault: str
    chapter: str
    way: str
    what: str
    seconds: float


def make_good(work: Path) -> Path:
    """The good run: made once, then reused. Its parameters are in `parameters.yaml` beside it."""
    good = work / "good"
    if (good / "whole").exists():
        return good
    shutil.rmtree(good, ignore_errors=True)
    good.mkdir(parents=True)
    rows = [json.loads(line) for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
    held_out = [row for row in rows if row["split"] == "held_out"][:HELD_OUT]
    few = [row for row in rows if row["split"] == "train"] + held_out
    data, parameters = work / "conversations.jsonl", work / "parameters.yaml"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in few), encoding="utf-8")
    parameters.write_text(f"PROFILE: cpu\nMAX_STEPS: {STEPS}\nDATASET: {data}\n", encoding="utf-8")
    command = [sys.executable, "-m", "helpers.series", "-f", str(parameters), "-p", "RUN_DIR", str(good)]
    subprocess.run(command, cwd=ROOT, check=True)
    (good / "whole").touch()
    return good


def plant(fault: str, *, good: Path, work: Path, parameters: Path) -> Caught:
    """Run one fault through the chapters that it can touch, until something notices it.

    Args:
        fault: a name of `FAULTS`.
        good: the run folder of a good run with the same parameters, whole.
        work: a folder for the broken run; the artefacts of the good one are linked, not copied.
        parameters: the YAML file of the good run's parameters.
    """
    run_dir, log = work / fault, work / f"{fault}.log"
    shutil.rmtree(run_dir, ignore_errors=True)
    log.unlink(missing_ok=True)
    # Without the data sets' caches: a result that was computed without the fault must not stand in for one with it.
    shutil.copytree(good, run_dir, copy_function=os.link, ignore=shutil.ignore_patterns("cache-*", "reports"))
    shutil.copy2(good / "executed" / "measured.json", unlinked(run_dir / "executed" / "measured.json"))
    first, _ = FAULTS[fault]
    start = time.perf_counter()
    if fault in BEFORE:
        unlinked(run_dir / "executed" / f"{first}.ipynb")
        before = work / f"{BEFORE[fault]}.log"
        run_chapter_with(BEFORE[fault], first, run_dir=run_dir, log=before, parameters=parameters)
    for chapter in CHAPTERS[CHAPTERS.index(first) :]:
        unlinked(run_dir / "executed" / f"{chapter}.ipynb")
        run_chapter_with(fault, chapter, run_dir=run_dir, log=log, parameters=parameters)
        way, what = noticed(chapter, run_dir=run_dir, good=good)
        if way:
            break
    if not log.exists():
        way, what = "", f"NOT PLANTED: its code never ran ({what or 'nothing noticed'})"
    shutil.rmtree(run_dir)
    return Caught(fault, chapter, way, what, time.perf_counter() - start)


def unlinked(path: Path) -> Path:
    """A path whose file is gone, so that writing to it leaves the good run's file, of which it was a link, alone."""
    path.unlink(missing_ok=True)
    return path


def run_chapter_with(fault: str, chapter: str, *, run_dir: Path, log: Path, parameters: Path) -> None:
    """Run one chapter with a fault planted in every process that it starts."""
    planted = {"PLANTED_FAULT": fault, "PLANTED_LOG": str(log), "HF_DATASETS_CACHE": str(run_dir / "datasets")}
    planted |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "planted"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "helpers.series", chapter, "-f", str(parameters), "-p", "RUN_DIR", str(run_dir)]
    subprocess.run(command, cwd=ROOT, env=os.environ | planted, capture_output=True, check=False)


def noticed(chapter: str, *, run_dir: Path, good: Path) -> tuple[str, str]:
    """(the ways in which a chapter's fault was noticed, what noticed it first); ("", "") where nothing did."""
    reports = run_dir / "reports"
    reports.mkdir(exist_ok=True)
    [shown] = compare_shown(run_dir, against=good / "executed", reports=reports, chapters=(chapter,))
    problems = dict(shown.problems)
    if "code" in problems:
        return "claim", problems["code"].partition(".ipynb, ")[2] or problems["code"]
    ways = [("output", differing_cell(how)) for how in problems.values()]
    for name, _, found, allowed, _ in judge(collect_metrics(run_dir), make_baseline(collect_metrics(good))).outside:
        if name.startswith(chapter[:2] + " "):
            ways.append(("band", f"{name}: {found or 'missing'}, allowed {allowed}"))
    if not ways:
        return "", ""
    more = f", and {len(ways) - 1} more" if len(ways) > 1 else ""
    return " and ".join(dict.fromkeys(way for way, _ in ways)), ways[0][1] + more


def differing_cell(how: str) -> str:
    """Which cell differs: its number and its last line, which is what it shows."""
    head, _, rest = how.partition("\n\n")
    source = rest.partition("\n\n\x1b")[0].split("\n\n mismatch")[0].strip().splitlines()
    return f"{head.partition('.ipynb, ')[2].partition(':')[0]}, `{source[-1] if source else ''}`"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="default: all")
    parser.add_argument("--fresh", action="store_true", help="make the good run anew")
    options = parser.parse_args(arguments)
    for fault in options.faults:
        if fault not in FAULTS:
            parser.error(f"no fault {fault}; there are {', '.join(FAULTS)}")
    if options.fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    good = make_good(WORK)
    outcomes = []
    for fault in options.faults or FAULTS:
        outcome = plant(fault, good=good, work=WORK, parameters=WORK / "parameters.yaml")
        outcomes.append(outcome)
        print(f"{fault}: {outcome.chapter}, {outcome.way or 'NOT CAUGHT'}: {outcome.what}", flush=True)
    rows = [[o.fault, o.chapter, o.way or "NOT CAUGHT", o.what[:100], round(o.seconds)] for o in outcomes]
    caught = sum(bool(outcome.way) for outcome in outcomes)
    table = text_table(["fault", "chapter", "noticed by", "what noticed", "seconds"], rows)
    verdict = f"{caught} of {len(outcomes)} faults were caught"
    (WORK / "faults.txt").write_text(f"{table}\n{verdict}\n", encoding="utf-8")
    print(f"\n{table}\n{verdict}")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
