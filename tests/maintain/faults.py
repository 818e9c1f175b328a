"""Break the stack in realistic ways, one at a time, and show which chapter and which claim notices.

    python -m tests.maintain.faults                          every fault that is left: stopped, it goes on where it was
    python -m tests.maintain.faults no_lora four_bit_off     some, also where they were run before, and beside others
    python -m tests.maintain.faults --fresh                  every fault, and the good run anew

No notebook is changed: `tests/planted/sitecustomize.py`, put on the kernels' PYTHONPATH, replaces a function of a
library once Unsloth is imported. A small good run of the series comes first (72 steps, 12 held-out conversations; kept
in runs/faults for the next time, until code or a version changes). Then a fault runs from the first chapter that it can
touch, on what the good run's chapters before it handed on, until it is noticed: by a *claim* (a cell raises an error of
this project's own), by a *crash* (another error, or a dead kernel), by an *output* (a tagged cell shows something else
than in the good run), or by a *band* (a number leaves what `tests.maintain.regress.RULES` allows around the good run's,
which is as wide as around a recorded one).

Two controls go through the same and must not be noticed. How each ended is kept beside the good run, and once all have
run their table goes to tests/baselines, beside the bands.
"""

import argparse
import functools
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import helpers
from helpers.base import ROOT, InputError, markdown_table, text_table
from helpers.chapters import CHAPTER_NAMES, CHAPTERS
from helpers.handoff.run import fingerprint, library_versions
from tests.maintain.regress import BASELINES, Metrics, baseline_path, collect_metrics, judge, make_baseline
from tests.maintain.repeat import code_fingerprint, heading
from tests.maintain.series import as_toml, read_parameter_file
from tests.maintain.shown import compare_notebook
from tests.maintain.smollm2 import prepare_smollm2

WORK = ROOT / "runs" / "faults"
# A fault reaches these. Chapter 08 trains once more what chapter 04 does, and is tested by itself.
LINKED = {chapter.name for chapter in CHAPTERS if chapter.needs or chapter.writes} - {"08_scale_up"}
CONVERSATIONS = ROOT / "notebooks" / "data" / "support_conversations.jsonl"

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
    "collator_relabels": ("04_train", "the collator trains the questions, after the mask was checked"),
    "labels_of_another_row": ("04_train", "the collator gives rows each other's labels"),
    "ends_untrained_in_multi_turn": ("04_train", "conversations of several answers are trained without their ends"),
    "held_out_trained": ("04_train", "the held-out rows are trained on too"),
    "evaluated_on_training": ("04_train", "the held-out rows are rows that are trained"),
    "half_of_the_rows": ("04_train", "the sampler leaves half of the rows out"),
    "constant_schedule": ("04_train", "the learning rate stays where it is"),
    "adapter_of_half_the_steps": ("04_train", "the adapter that is saved is that of half of the steps"),
    "ids_swapped": ("04_train", "two words change their ids in the saved tokenizer"),
    "flat_answer_key": ("04_train", "the words of a right answer are one list, not one for each answer"),
    "another_base": ("05_infer", "the base model's weights are 3 % off, under the same name"),
    "layers_not_loaded": ("05_infer", "half of the adapter's layers are not loaded"),
    "half_scale": ("05_infer", "the adapter is loaded at half its scale"),
    "adapter_not_loaded": ("05_infer", "adapters load without their weights: the base model answers"),
    "merged_of_the_base": ("06_save", "the merged model is the base model"),
    "gguf_of_the_base": ("06_save", "the GGUF files hold the base model"),
}
# The same for what breaks nothing.
CONTROLS = {
    "none": ("02_load_and_lora", "nothing"),
    "resumed": ("04_train", "nothing: an interrupted run goes on from its checkpoint"),
}
STEPS, HELD_OUT = 72, 12  # fewer steps: what is half trained loses its style to rounding, and chapter 06 says so
PARAMETERS = "cpu.toml"  # a laptop's choices; the name of the file is the run's profile
OUTCOMES = "outcomes.json"  # in the work folder: {fault: how it ended}, of the code that `planted_fingerprint` names
NOT_CAUGHT, FALSE_ALARM = "NOT CAUGHT", "FALSE ALARM"
LANES, ONE_THREAD = 2, {"OMP_NUM_THREADS": "1"}  # two faults at once take less time than one after the other
MOST_CHARACTERS = 120  # of what noticed a fault, in the table

# What has to happen in a fault's first chapter before it can be planted there.
BEFORE = {"checkpoint_not_resumed": "interrupted", "resumed": "interrupted"}

KEEPING = threading.Lock()


class HarnessError(Exception):
    """Something other than the fault broke the run, so that its end says nothing about the fault."""


@dataclass(frozen=True)
class Caught:
    """How one fault ended: the chapter, the ways ("claim", "crash", "output", "band"), what noticed it; "": nothing."""

    fault: str
    chapter: str
    way: str
    what: str
    seconds: float


def good_fingerprint() -> str:
    """Names all that a good run comes from: chapters, helpers, model, conversations, choices, versions, its length."""
    files = [*sorted((ROOT / "helpers").rglob("*.py")), ROOT / "tests" / "maintain" / "smollm2.py"]
    files += [CONVERSATIONS, ROOT / "tests" / "profiles" / PARAMETERS]
    parts = [code_fingerprint(*CHAPTER_NAMES), json.dumps(library_versions()), f"{STEPS} {HELD_OUT}"]
    return fingerprint("\n".join([*parts, *(path.read_text(encoding="utf-8") for path in files)]))


def planted_fingerprint() -> str:
    """Names what breaks the stack."""
    files = sorted((ROOT / "tests" / "planted").glob("*.py"))
    return fingerprint("\n".join(path.read_text(encoding="utf-8") for path in files))


def kept_outcomes(work: Path) -> dict[str, Caught]:
    """How the faults ended that have run against the good run that is there now."""
    path = work / OUTCOMES
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        fault: Caught(**outcome)
        for fault, outcome in kept.get("outcomes", {}).items()
        if kept["planted"] == planted_fingerprint()
    }


def keep_outcomes(work: Path, outcomes: Mapping[str, Caught]) -> None:
    """Write them so that a run that is stopped now leaves the former file or this one."""
    content = {"planted": planted_fingerprint()}
    content |= {"outcomes": {fault: asdict(outcome) for fault, outcome in outcomes.items()}}
    partial = work / f"{OUTCOMES}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, work / OUTCOMES)


def is_whole(good: Path) -> bool:
    """Whether a good run is there that comes from what is here now."""
    whole = good / "whole"
    return whole.is_file() and whole.read_text(encoding="utf-8") == good_fingerprint()


def make_good(work: Path) -> Path:
    """The good run: made once, then reused. Its choices are in `PARAMETERS` beside it."""
    good = work / "good"
    if is_whole(good):
        return good
    made_of = good_fingerprint()
    shutil.rmtree(good, ignore_errors=True)
    (work / OUTCOMES).unlink(missing_ok=True)  # they were held against the good run that is gone
    good.mkdir(parents=True)
    rows = [json.loads(line) for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
    held_out = [row for row in rows if row["split"] == "held_out"][:HELD_OUT]
    few = [row for row in rows if row["split"] == "train"] + held_out
    data = work / "conversations.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in few), encoding="utf-8")
    given = {"MAX_STEPS": STEPS, "DATASET": str(data), "RUN_DIR": str(good)}
    parameters = write_choices(ROOT / "tests" / "profiles" / PARAMETERS, work, **given)
    chapters = [name for name in CHAPTER_NAMES if name in LINKED or name in {first for first, _ in FAULTS.values()}]
    command = [sys.executable, "-m", "tests.maintain.series", *chapters, "-f", str(parameters)]
    subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD, check=True)
    (good / "whole").write_text(made_of, encoding="utf-8")
    return good


def write_choices(parameters: Path, folder: Path, **given: Any) -> Path:
    """A parameter file of the same name in another folder, with other choices (-p takes only the chapter's own)."""
    choices = read_parameter_file(parameters) | given
    unlinked(folder / parameters.name).write_text(as_toml(choices), encoding="utf-8")
    return folder / parameters.name


def plant(fault: str, *, good: Path, work: Path, parameters: Path) -> Caught:
    """Run one fault through the chapters that it can touch, until something notices it.

    Args:
        fault: a name of `FAULTS` or `CONTROLS`.
        good: the run folder of a good run with the same parameters, whole.
        work: a folder for the broken run; the artefacts of the good one are linked, not copied.
        parameters: the TOML file of the good run's choices.

    Raises:
        HarnessError: the run before it was not interrupted, or another notebook than the good run's was executed.
    """
    run_dir, log = work / fault, unlinked(work / f"{fault}.log")
    shutil.rmtree(run_dir, ignore_errors=True)
    link_run(good, run_dir)
    first, _ = (FAULTS | CONTROLS)[fault]
    start = time.perf_counter()
    if fault in BEFORE:
        unlinked(run_dir / "executed" / f"{first}.ipynb")
        before = unlinked(work / f"{BEFORE[fault]}.log")
        run_chapter_with(BEFORE[fault], first, run_dir=run_dir, log=before, parameters=parameters)
        if not before.exists():
            raise HarnessError(f"{first} was not {BEFORE[fault]}")
    for chapter in CHAPTER_NAMES[CHAPTER_NAMES.index(first) :]:
        if chapter != first and chapter not in LINKED:
            continue
        unlinked(run_dir / "executed" / f"{chapter}.ipynb")
        unlinked(run_dir / "numbers" / f"{chapter}.json")
        run_chapter_with(fault, chapter, run_dir=run_dir, log=log, parameters=parameters)
        way, what = noticed(chapter, run_dir=run_dir, good=good)
        if way:
            break
    if not log.exists():
        way, what = "", f"NOT PLANTED: its code never ran ({what or 'nothing noticed'})"
    shutil.rmtree(run_dir)
    return Caught(fault, chapter, way, what, time.perf_counter() - start)


def link_run(good: Path, run_dir: Path) -> None:
    """A run folder with the files of another: linked, but for the measures, which chapters add to.

    It lacks the data sets' caches, because a result that was computed without the fault must not stand in for one with
    it; and the locks, each of which would be one for all runs that are linked to this one.
    """
    left_out = shutil.ignore_patterns("cache-*", "reports", ".*lock")
    shutil.copytree(good, run_dir, copy_function=os.link, ignore=left_out)
    shutil.copy2(good / "executed" / "measured.json", unlinked(run_dir / "executed" / "measured.json"))


def unlinked(path: Path) -> Path:
    """A path whose file is gone, so that writing to it leaves the good run's file, of which it was a link, alone."""
    path.unlink(missing_ok=True)
    return path


def run_chapter_with(fault: str, chapter: str, *, run_dir: Path, log: Path, parameters: Path) -> None:
    """Run one chapter with a fault planted in every process that it starts."""
    planted = {"PLANTED_FAULT": fault, "PLANTED_LOG": str(log), "HF_DATASETS_CACHE": str(run_dir / "datasets")}
    planted |= ONE_THREAD | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "planted"), os.environ.get("PYTHONPATH", "")])
    }
    given = {"RUN_DIR": str(run_dir)}
    if fault == "another_base":
        given["MODEL_NAME"] = str(model_of_other_weights(run_dir.parent / "another"))
        log.write_text(f"{fault}\n", encoding="utf-8")
    here = write_choices(parameters, run_dir, **given)
    command = [sys.executable, "-m", "tests.maintain.series", chapter, "-f", str(here)]
    subprocess.run(command, cwd=ROOT, env=os.environ | planted, capture_output=True, check=False)


def model_of_other_weights(folder: Path) -> Path:
    """A model of the prepared one's name whose weights are 3 % off; made once."""
    from safetensors.torch import load_file, save_file

    source = prepare_smollm2()
    model = folder / source.name
    if not model.is_dir():
        shutil.copytree(source, model)
        weights = {name: weight * 1.03 for name, weight in load_file(source / "model.safetensors").items()}
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def noticed(chapter: str, *, run_dir: Path, good: Path) -> tuple[str, str]:
    """(the ways in which a chapter's fault was noticed, what noticed it first); ("", "") where nothing did.

    Raises:
        HarnessError: the chapter was not executed, or another notebook was.
    """
    executed = f"executed/{chapter}.ipynb"
    shown = compare_notebook(run_dir / executed, good / executed)
    if shown.stopped:
        if way := how_it_stopped(run_dir / executed):
            return way, one_line(shown.stopped)
        raise HarnessError(f"{chapter}: {shown.stopped}")
    ways = [("output", cell) for cell, _ in shown.differences]
    metrics = collect_metrics(run_dir)
    bands = make_baseline(Metrics(metrics.of, collect_metrics(good).values))  # of a fault's steps and versions too
    for check in judge(metrics, bands).failed:
        if check.name.startswith(f"{chapter[:2]} "):  # not the memory sampled from outside: that also moves by itself
            ways.append(("band", str(check)))
    if not ways:
        return "", ""
    more = f", and {len(ways) - 1} more" if len(ways) > 1 else ""
    return " and ".join(dict.fromkeys(way for way, _ in ways)), one_line(ways[0][1]) + more


def how_it_stopped(executed: Path) -> str:
    """Why a notebook ended before its end: "claim", or "crash"; "" where it did not, or is not there.

    A claim is an error of this project's own, or one that the cell itself raises. All others are crashes, and so is a
    kernel that died, after which cells are left without a number.
    """
    import nbformat

    cells = nbformat.read(executed, as_version=4).cells if executed.is_file() else []
    cells = [cell for cell in cells if cell.cell_type == "code"]
    for cell in cells:
        for output in cell.outputs:
            if output.output_type == "error":
                own = output.ename in own_errors() or f"raise {output.ename}(" in cell.source
                return "claim" if own else "crash"
    return "crash" if any(cell.execution_count is None for cell in cells) else ""


@functools.cache
def own_errors() -> frozenset[str]:
    """The names of `InputError` and of all errors in `helpers` that derive from it."""
    for module in pkgutil.walk_packages(helpers.__path__, "helpers."):
        importlib.import_module(module.name)
    kinds = [InputError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return frozenset(kind.__name__ for kind in kinds)


def one_line(text: str) -> str:
    """Cut to what the table shows, without this machine's folders."""
    text = " ".join(text.split()).replace(f"{ROOT}/", "").replace(str(Path.home()), "~")
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def verdict(outcome: Caught) -> str:
    """What noticed a fault, or `NOT_CAUGHT`; and that nothing noticed a control, or `FALSE_ALARM`."""
    if outcome.fault not in CONTROLS:
        return outcome.way or NOT_CAUGHT
    return FALSE_ALARM if outcome.way or outcome.what else "nothing"


def plant_and_keep(fault: str, good: Path) -> Caught:
    """Run one fault, say how it ended, and keep that in the file, unless it did not run."""
    try:
        outcome = plant(fault, good=good, work=WORK, parameters=WORK / PARAMETERS)
        with KEEPING:
            keep_outcomes(WORK, kept_outcomes(WORK) | {fault: outcome})  # another may have added its own
    except HarnessError as error:  # the next time it is tried again
        outcome = Caught(fault, "", "", one_line(f"NOT RUN: {error}"), 0.0)
    print(f"{fault}: {outcome.chapter}, {verdict(outcome)}: {outcome.what}", flush=True)
    return outcome


def summary(outcomes: Sequence[Caught]) -> str:
    """How many faults were caught, and how many controls passed. Example: "23 of 23 faults were caught, …"."""
    parts = []
    for names, said, bad in ((FAULTS, "faults were caught", NOT_CAUGHT), (CONTROLS, "controls passed", FALSE_ALARM)):
        verdicts = [verdict(outcome) for outcome in outcomes if outcome.fault in names]
        parts.append(f"{len(verdicts) - verdicts.count(bad)} of {len(verdicts)} {said}")
    return ", ".join(parts)


def as_markdown(outcomes: Sequence[Caught], *, of: Mapping[str, Any]) -> str:
    """The table of all faults and controls; `of` is what `Metrics.of` says of the good run."""
    said = f"{summary(outcomes)}. Written by `tests/maintain/faults.py`, which says what the words mean."
    head = heading("Planted faults", said, of=of, dates=[time.strftime("%Y-%m-%d")])
    broken = FAULTS | CONTROLS
    rows = [[o.fault, broken[o.fault][1], o.chapter, verdict(o), o.what, round(o.seconds)] for o in outcomes]
    names = ["fault", "what is broken", "chapter", "noticed by", "what noticed", "seconds"]
    return "\n".join([*head, markdown_table(names, rows)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="default: all, and the controls")
    parser.add_argument("--fresh", action="store_true", help="make the good run anew")
    options = parser.parse_args(arguments)
    known = [*CONTROLS, *FAULTS]
    for fault in options.faults:
        if fault not in known:
            parser.error(f"no fault {fault}; there are {', '.join(known)}")
    if options.fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    good = make_good(WORK)
    kept = kept_outcomes(WORK)
    left = options.faults or [fault for fault in known if fault not in kept]
    with ThreadPoolExecutor(LANES) as lanes:
        try:
            for outcome in lanes.map(lambda fault: plant_and_keep(fault, good), left):
                kept[outcome.fault] = outcome
        except BaseException:
            lanes.shutdown(cancel_futures=True)
            raise
    outcomes = [kept[fault] for fault in options.faults or known]
    rows = [[o.fault, o.chapter, verdict(o), o.what, round(o.seconds)] for o in outcomes]
    table = text_table(["fault", "chapter", "noticed by", "what noticed", "seconds"], rows)
    print(f"\n{table}\n{summary(outcomes)}")
    if not options.faults:
        of = collect_metrics(good).of
        path = BASELINES / f"faults-{baseline_path(of).stem}.md"
        path.write_text(as_markdown(outcomes, of=of), encoding="utf-8")
        print(f"Written to {path.relative_to(ROOT)}")
    return 1 if {verdict(outcome) for outcome in outcomes} & {NOT_CAUGHT, FALSE_ALARM} else 0


if __name__ == "__main__":
    sys.exit(main())
