"""The whole series with a laptop's choices, as a test: `make test` runs it beside the others, `make unit` does not.

The solutions to the exercises run too, and what their texts claim is looked for in what they print.
"""

import json
import re
import subprocess
import sys

import pytest

from helpers.base import ROOT
from tests.maintain.series import printed_in

EXECUTED = ROOT / "runs/test/executed"
SIZES = re.compile(r"q(\d).*: (.+) bits")  # of chapter 06: "q8_0: 8.6 bits a weight"


def numbers(text):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def losses(page):
    """The held-out losses before and after training, of chapter 04's result."""
    return numbers(re.search(r"^Result: held-out loss (.+? → \S+)", page, re.MULTILINE)[1])


def begins_with_the_first(said, page):
    return re.search(rf"^{re.escape(re.findall(chr(39) + '(.*)' + chr(39), said)[0])}", page, re.MULTILINE)


# What the text behind each solution says, of what the solution and the page above it print.
CLAIMS = {
    "01_install": [begins_with_the_first, lambda said, page: len(set(said.split("—" * 60)[:2])) == 2],
    "02_load_and_lora": [
        lambda said, page: "feed-forward: 62%" in said,
        lambda said, page: said.endswith("difference: 0.0\n"),
    ],
    "03_data": [
        lambda said, page: "79 of 528" in said,
        lambda said, page: "1 kept:" in said and "Yes, to all of Europe." in said,
    ],
    "04_train": [
        lambda said, page: numbers(said)[0] > 100 and numbers(said)[1] < 1.6,
        lambda said, page: losses(page)[0] > numbers(said)[0] > losses(page)[1],
    ],
    "05_infer": [lambda said, page: re.findall(r"^\d\.\d: (\d)", said, re.MULTILINE)[::2] == ["4", "0"]],
    "06_save": [
        lambda said, page: all(int(bits) < float(real) < int(bits) + 3 for bits, real in SIZES.findall(said)),
        lambda said, page: numbers(said)[0] > 4 * numbers(said)[1],
    ],
    "07_when_it_goes_wrong": [lambda said, page: said.endswith("Largest gap: by heart\n")],
    "08_scale_up": [lambda said, page: "2 GPUs: 20 MB, 0.16 s" in said and "8 GPUs: 20 MB, 0.27 s" in said],
}


def test_every_chapter_runs_to_its_end():
    command = [sys.executable, "-m", "tests.maintain.series", "--fresh", "--solutions", "-f", "tests/profiles/cpu.toml"]
    elsewhere = ["-p", "RUN_DIR", "runs/test", "-p", "OUTPUT_DIR", "runs/test/quickstart"]
    elsewhere += ["-p", "SCALED_DIR", "runs/test/scaled"]
    done = subprocess.run([*command, *elsewhere], cwd=ROOT)
    assert done.returncode == 0


@pytest.mark.parametrize("chapter", CLAIMS)
def test_the_solutions_show_what_their_texts_say(chapter):
    said = json.loads((EXECUTED / f"{chapter}.solutions.json").read_text(encoding="utf-8"))
    page = printed_in(EXECUTED / f"{chapter}.ipynb")
    assert len(said) == len(CLAIMS[chapter])
    assert [text for text, holds in zip(said, CLAIMS[chapter], strict=True) if not holds(text, page)] == []
