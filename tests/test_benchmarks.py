"""What the benchmarks refuse to call a result."""

import site
import sys
from importlib.machinery import PathFinder

import pytest

from helpers.base import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from training import make_rows, mark_unequal  # noqa: E402

SAME = dict(shape="3B", dtype="float16", lengths="conversations", steps=60)


@pytest.mark.parametrize(("loss", "refused"), [(12.31, False), (12.36, False), (12.4, True), (float("nan"), True)])
def test_a_run_whose_loss_is_another_is_no_result(loss, refused):
    rows = [SAME | {"held_out_loss": each} for each in (12.31, 12.312, loss)]
    rows += [SAME | {"lengths": "short", "held_out_loss": 3.0}, dict(SAME)]  # of other rows, and one without a loss
    mark_unequal(rows)
    assert [bool(row.get("failed")) for row in rows] == [False, False, refused, False, False]


@pytest.mark.parametrize(("lengths", "mean", "most"), [("conversations", 489, 1722), ("long", 983, 2000)])
def test_rows_are_as_long_as_the_results_say(lengths, mean, most):
    tokens = [len(row["input_ids"]) for row in make_rows(480, lengths=lengths, seed=1)]
    assert round(sum(tokens) / 480) == mean and max(tokens) <= most


def shadowed(names):
    """The modules among these names that Python or an installed package has too."""
    packages = site.getsitepackages()
    return {name for name in names if name in sys.stdlib_module_names or PathFinder.find_spec(name, packages)}


@pytest.mark.parametrize("folder", ["tests", "tests/benchmarks", "notebooks"])
def test_no_module_hides_an_installed_one(folder):
    """These folders stand on the path before the packages: one `gguf.py` there, and transformers reads no GGUF."""
    assert not shadowed(path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")


def test_a_module_that_hides_another_is_seen():
    assert shadowed(["gguf", "json", "llama_shapes"]) == {"gguf", "json"}
