"""The verdict on a run as tests: one for each number, claim and chapter. pytest collects this file only by its name.

    python -m pytest tests/maintain/judge_run.py --run runs/cpu --junitxml junit.xml

`python -m tests.maintain.regress` calls it too, and has the table. What is not judged is skipped, and says what it is;
a run that no bands are for is a failure of its own.
"""

import pytest

from tests.maintain.regress import FAILED, OK, Check, check_run, last_run


def pytest_generate_tests(metafunc):
    verdict = check_run(metafunc.config.option.run or last_run())
    said = f"NOT JUDGED: {'; '.join(verdict.unlike)}"
    checks = [Check("bands for this run", FAILED if verdict.unlike else OK, said), *verdict.checks]
    metafunc.parametrize("check", checks, ids=[check.name for check in checks])


def test_run(check):
    if check.verdict == FAILED:
        pytest.fail(check.said, pytrace=False)
    if check.verdict != OK:
        pytest.skip(check.said)
