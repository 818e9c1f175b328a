"""The option of `judge_run.py`, the only test here."""

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--run", type=Path, metavar="FOLDER", help="the run folder that judge_run.py judges (the last)")
