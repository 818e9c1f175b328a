"""The workflows pass their linters, each linter refuses a broken one, and their shell steps do what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_browser import SCREENSHOTS

from tests.maintain.lock import IMAGE

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PINNED = re.compile(r"uses: ([\w.-]+/[\w./-]+)@([0-9a-f]{40}) # v(\d+\.\d+\.\d+)$")


def lint(folder):
    """`make workflows` on the `.github` of a folder."""
    shutil.copy(ROOT / "Makefile", folder)
    if not (folder / ".git").exists():
        subprocess.run(["git", "init", "--quiet", folder], check=True)
    done = subprocess.run(["make", "--silent", "workflows"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "tests" / "colab-image").mkdir(parents=True)
    for path in (
        *ROOT.glob("requirements-*.txt"),
        *ROOT.glob("tests/requirements-*.txt"),
        ROOT / "tests" / "colab-image" / "wanted.in",
    ):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))  # workflows name them, and the lint looks for them
    return tmp_path


def test_the_workflows_pass(project):
    code, output = lint(project)
    assert code == 0, output


# What each linter must find, in the order in which `make workflows` calls them: file, what is replaced, by what, and
# the rule that must say so. One linter's faults are planted together: a run takes seconds, and the first that finds
# something is the last one that runs.
FAULTS = {
    "check-jsonschema": {
        "a misspelt key": ("t4.yml", "runs-on: ubuntu-24.04", "run-on: ubuntu-24.04", "run-on"),
    },
    "check-jsonschema, yaml that is none": {
        "yaml that is none": ("t4.yml", "jobs:", "jobs: [", "t4.yml"),
    },
    "check-jsonschema, Dependabot": {
        "an interval that it does not know": ("dependabot.yml", "interval: weekly", "interval: hourly", "hourly"),
    },
    "zizmor": {
        "an action by its tag": ("t4.yml", r"checkout@\w{40} # v6.0.2", "checkout@v6", "unpinned-uses"),
        "the token stays on disk": ("t4.yml", r"        with:\n +persist-credentials: false\n", "", "artipacked"),
        "a token that can write everything": (
            "t4.yml",
            r"permissions: \{\}",
            "permissions: write-all",
            "excessive-permissions",
        ),
        "a pull request with the token of the repository": (
            "pull-request.yml",
            "  pull_request:",
            "  pull_request_target:",
            "dangerous-triggers",
        ),
        "a title that is run as a script": (
            "pull-request.yml",
            "run: make lint",
            "run: echo '${{ github.event.pull_request.title }}'",
            "template-injection",
        ),
        "runs that pile up": ("image-drift.yml", r"concurrency:\n.*\n.*\n", "", "concurrency-limits"),
        "versions an hour old": (
            "dependabot.yml",
            r"    cooldown:\n      default-days: 7\n",
            "",
            "dependabot-cooldown",
        ),
    },
    "jactionlint": {
        "a job without a time limit": ("pull-request.yml", "    timeout-minutes: 80\n", "", "missing-timeout"),
        "an input that the action does not have": ("t4.yml", "python-version:", "python:", "action-input"),
        "a job that is not there": ("t4.yml", "needs: t4", "needs: t5", '"t5"'),
        "a step that is not there": ("image-drift.yml", r"steps\.check\.", "steps.chek.", '"chek"'),
        "a time that does not exist": ("t4.yml", "23 2 \\* \\* \\*", "23 25 * * *", "cron"),
        "a variable without quotes": ("t4.yml", r'\[the run\]\(\$RUN\), .*" > body.md', 'x" $RUN > body.md', "SC2086"),
    },
    "shellcheck": {"a script with a fault": ("open-issue.sh", r'"\$2"', "$2", "SC2086")},
}


@pytest.mark.parametrize("linter", FAULTS)
def test_the_lint_refuses(linter, project):
    for name, before, after, _ in FAULTS[linter].values():
        path = next((project / ".github").rglob(name))
        text = path.read_text(encoding="utf-8")
        assert re.search(before, text)
        path.write_text(re.sub(before, after, text), encoding="utf-8")
    code, output = lint(project)
    passed_over = {fault: said for fault, (*_, said) in FAULTS[linter].items() if said not in output}
    assert code != 0 and not passed_over, output


def test_each_action_is_pinned_to_one_commit_with_its_version():
    lines = [line.strip() for path in WORKFLOWS for line in path.read_text(encoding="utf-8").splitlines()]
    used = [line.removeprefix("- ") for line in lines if "uses:" in line]
    pins = {PINNED.match(line).groups() for line in used}
    assert len(pins) == len({action for action, *_ in pins}), "one action at two commits"


def test_no_workflow_reads_a_secret():
    for path in WORKFLOWS:
        assert not re.search(r"\bsecrets\b", re.sub(r"#.*", "", path.read_text(encoding="utf-8"))), path.name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_make_target_of_a_workflow_exists(path):
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [command for step in steps(path) for command in re.findall(r"^\s*make (.*)", step.get("run", ""), re.M)]
    called = {
        word for command in commands for word in command.split("|")[0].split() if re.fullmatch(r"[a-z][a-z0-9-]*", word)
    }
    assert called and called <= targets, f"not in the Makefile: {called - targets}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_cache_depends_on_files_that_are_there(path):
    """GitHub passes over a name that is not there, and the cache would never be made anew."""
    for names in re.findall(r"hashFiles\((.*?)\)", path.read_text(encoding="utf-8")):
        assert all(list(ROOT.glob(name)) for name in re.findall(r"'(.*?)'", names)), names


def steps(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def read_workflow(name):
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "job"), [("pull-request.yml", "cpu"), ("t4.yml", "t4")])
def test_a_run_is_kept_with_what_recording_it_needs(name, job):
    uploads = [step["with"] for step in read_workflow(name)["jobs"][job]["steps"] if "upload" in step.get("uses", "")]
    [paths] = [upload["path"].split() for upload in uploads if upload["name"] == job]
    assert {f"runs/{job}/{what}" for what in ("*.json", "executed/", "numbers/", "reports/")} == set(paths)


@pytest.mark.parametrize(("name", "job"), [("pull-request.yml", "cpu"), ("t4.yml", "t4")])
@pytest.mark.parametrize("verdict", ["NOT JUDGED", "Regression ok"])
def test_the_page_has_the_verdict_and_says_that_a_run_was_not_judged(name, job, verdict, tmp_path):
    reports = tmp_path / "runs" / job / "reports"
    reports.mkdir(parents=True)
    (reports / "summary.md").write_text(f"## {verdict}: 9 of 9 checks passed.\n")
    page = tmp_path / "page"
    done = run_step(name, "Show the verdict on the job's page", cwd=tmp_path, GITHUB_STEP_SUMMARY=str(page))
    assert done.returncode == 0 and page.read_text() == (reports / "summary.md").read_text()
    assert ("::warning::NOT JUDGED" in done.stdout) == (f"regress {job} --record" in done.stdout)
    assert ("::warning::" in done.stdout) == (verdict == "NOT JUDGED")


def test_a_hang_on_the_t4_is_reported():
    """The step's limit leaves time for those after it; beyond the job's, the next job still opens an issue."""
    jobs = read_workflow("t4.yml")["jobs"]
    [chapters] = [step for step in jobs["t4"]["steps"] if step.get("id") == "chapters"]
    assert chapters["timeout-minutes"] <= jobs["t4"]["timeout-minutes"] - 30
    condition = jobs["issue"]["if"]
    assert "always()" in condition  # else GitHub passes over it where the job before was cancelled
    for result in ("failure", "cancelled"):
        assert f"needs.t4.result == '{result}'" in condition


def test_on_a_pull_request_a_browser_opens_the_chapters():
    named = [(step.get("run", ""), step.get("with", {})) for step in steps(ROOT / ".github/workflows/pull-request.yml")]
    runs = [run for run, _ in named]
    assert runs.index("make proof-tools browser") < runs.index("make unit")
    [kept] = [given for _, given in named if given.get("name") == "browser"]
    assert ROOT / kept["path"] == SCREENSHOTS and kept["if-no-files-found"] == "error"


def test_the_site_is_built_before_it_is_deployed_and_only_then_may_a_job_write():
    jobs = read_workflow("site.yml")["jobs"]
    writing = [name for name, job in jobs.items() if "write" in job["permissions"].values()]
    assert writing == ["deploy"] and jobs["deploy"]["needs"] == "build"
    build = [step.get("run") for step in jobs["build"]["steps"]]
    assert "make site" in build and "make setup" not in build
    [kept] = [step["with"]["path"] for step in jobs["build"]["steps"] if "upload-pages" in step.get("uses", "")]
    assert kept == "runs/site/html/"
    assert jobs["deploy"]["if"] == "${{ github.ref == 'refs/heads/main' }}"  # by hand on a branch it only builds


def run_step(workflow, name, *, cwd=ROOT, **environment):
    """Run a step's script as the runner does."""
    script = next(step["run"] for step in steps(ROOT / ".github/workflows" / workflow) if step["name"] == name)
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


GH = """#!/bin/sh
if [ "$2" = list ]; then echo "$OPEN"; exit; fi
echo "$@" >> "$CALLS"
for last; do :; done
cat "$last" >> "$CALLS"
"""


@pytest.fixture
def gh(tmp_path):
    """A stand-in for GitHub's command, which is not here: it writes down how it was called. `gh(OPEN="7")`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gh").write_text(GH)
    (tmp_path / "bin/gh").chmod(0o755)
    calls = tmp_path / "calls"
    return lambda **more: {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "OPEN": "", **more}


# The three verdicts of image-drift.yml: the lock holds; it does not and a new one resolves; it does not and none does.

CHECK, RESOLVE, ISSUE = "Check the lock against it", "Resolve a new lock", "Open an issue, or comment on the open one"


@pytest.fixture
def drift(gh, tmp_path, monkeypatch):
    """`drift(step, **environment)` runs a step of image-drift.yml on the image in `tmp_path / "image"`."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # the step calls `python`
    environment = {"RUNNER_TEMP": str(tmp_path), "GITHUB_WORKSPACE": str(ROOT), "RUN": "https://example.org/run/1"}
    environment |= {"GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    shutil.copytree(IMAGE, tmp_path / "image")
    subprocess.run(["git", "init", "--quiet", tmp_path / "image"], check=True)
    commit = ["git", "-C", tmp_path / "image", "-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet"]
    subprocess.run([*commit, "--allow-empty", "--message=x"], check=True)
    return lambda step, **more: run_step("image-drift.yml", step, **{**environment, **gh(), **more})


def change_image(folder, before, after):
    freeze = folder / "image/pip-freeze.gpu.txt"
    text = freeze.read_text()
    assert re.search(before, text, re.MULTILINE)
    freeze.write_text(re.sub(before, after, text, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("before", "after", "said", "fits"),
    [
        ("^google-colab @ .*", "google-colab @ https://x.org/a==1.zip", "has not moved", "true"),
        ("^absl-py==.*", "absl-py==1.5.0", "has moved", "true"),
        ("^absl-py==.*\n", "", "has moved", "true"),
        (r"^torch==.*", "torch==2.3.1+cu121", "has moved", "false"),
    ],
)
def test_an_image_that_moved_is_told_from_one_on_which_the_lock_does_not_hold(
    drift, tmp_path, before, after, said, fits
):
    change_image(tmp_path, before, after)
    done = drift(CHECK)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output").read_text() == f"fits={fits}\n"
    holds = "the lock holds" if fits == "true" else "the lock does not hold"
    assert (tmp_path / "summary").read_text() == f"Colab's image {said} since {IMAGE.name}: {holds}.\n"


def test_drift_is_told_from_a_crash(drift, tmp_path):
    shutil.rmtree(tmp_path / "image")
    done = drift(CHECK)
    assert done.returncode != 0 and not (tmp_path / "output").exists() and not (tmp_path / "summary").exists()


# The real command, which asks the package index, for one wish: the series' own take a minute, and a whole image three.
@pytest.mark.slow
@pytest.mark.parametrize(("packaging", "resolves"), [("26.3", "true"), ("20.8", "false")])
def test_a_new_lock_is_resolved_or_uv_says_why_not(drift, tmp_path, packaging, resolves):
    shutil.copytree(ROOT / "helpers", tmp_path / "helpers")
    shutil.copytree(ROOT / "tests/maintain", tmp_path / "tests/maintain")
    (tmp_path / "tests/__init__.py").touch()
    (tmp_path / "tests" / "colab-image").mkdir()
    (tmp_path / "tests/colab-image/wanted.in").write_text("bitsandbytes==0.50.2  # asks for packaging>=20.9\n")
    (tmp_path / "image/pip-freeze.gpu.txt").write_text(f"packaging=={packaging}\ntorch==2.11.0+cu128\n")
    done = drift(RESOLVE, cwd=tmp_path)
    if re.search("^pip: |Failed to fetch|error sending request", done.stdout, re.MULTILINE):
        pytest.skip(done.stdout[-300:])
    assert (tmp_path / "output").read_text() == f"resolves={resolves}\n", done.stdout
    lock, why = tmp_path / "requirements-colab.txt", (tmp_path / "why.txt").read_text()
    if resolves == "true":
        assert "torch 2.11.0+cu128" in lock.read_text() and "\nbitsandbytes==0.50.2 " in lock.read_text() and not why
        assert (tmp_path / "summary").read_text() == "A new lock resolves.\n"
    else:
        assert not lock.exists() and re.search(r"bitsandbytes\S+ depends\s+on\s+packaging>=20\.9", why)
        assert (tmp_path / "summary").read_text() == "No new lock resolves.\n"


UNSATISFIABLE = "uv pip compile: found error: No solution found when resolving dependencies"


@pytest.fixture
def python(tmp_path):
    """`python(code)` is a stand-in for the command `python`, in the folder of the one for `gh`."""

    def write(code):
        (tmp_path / "bin/python").write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / "bin/python").chmod(0o755)

    return write


@pytest.mark.parametrize(
    ("code", "resolves", "status"),
    [
        ('echo "tqdm==4.67.3" > "$6"', "true", 0),
        (f"echo '{UNSATISFIABLE}' >&2; exit 1", "false", 0),
        ("echo 'package index: found ERROR: no answer' >&2; exit 1", "unknown", 1),
        ("echo 'ModuleNotFoundError: tabulate' >&2; exit 1", "unknown", 1),
    ],
)
def test_what_cannot_be_resolved_is_told_from_an_index_that_does_not_answer(
    drift, python, tmp_path, code, resolves, status
):
    python(code)
    done = drift(RESOLVE)
    assert done.returncode == status and (tmp_path / "output").read_text() == f"resolves={resolves}\n"
    assert (tmp_path / "requirements-colab.txt").exists() == (resolves == "true")
    assert status == 0 or "found ERROR" in done.stdout or "ModuleNotFoundError" in done.stdout


@pytest.mark.parametrize(
    ("resolves", "has", "has_not"),
    [
        ("true", "<summary>The new lock</summary>\n\n```\ntqdm==4.67.3\n```\n</details>", "No solution"),
        ("false", f"```\n{UNSATISFIABLE}\n```", "<details>"),
        ("unknown", f"```\n{UNSATISFIABLE}\n```", "<details>"),
    ],
)
def test_the_issue_has_the_table_and_the_new_lock_or_uvs_message(drift, tmp_path, resolves, has, has_not):
    change_image(tmp_path, "^torch==.*", "torch==2.3.1+cu121")
    drift(CHECK)
    (tmp_path / "requirements-colab.txt").write_text("tqdm==4.67.3\n")
    (tmp_path / "why.txt").write_text(UNSATISFIABLE + "\n")
    done = drift(ISSUE, RESOLVES=resolves)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.startswith("issue create --title The lock does not fit Colab's image any more")
    assert "the lock does not hold" in calls and re.search(r"commit [0-9a-f]{7,} of googlecolab", calls)
    [table] = re.findall(r"^```\n(what +package (?:.*\n)+?)```$", calls, re.MULTILINE)
    assert re.search("CONFLICT +unsloth .*torch", table) and "the lock does not install cleanly" in table
    assert calls.index(table) < calls.index(has) and has_not not in calls


def test_a_lock_that_is_too_long_for_an_issue_leaves_the_table_in_it(drift, tmp_path):
    (tmp_path / "said.md").write_text("It moved.\n")
    (tmp_path / "table.txt").write_text("CONFLICT\n")
    (tmp_path / "requirements-colab.txt").write_text("x" * 70_000)
    assert drift(ISSUE, RESOLVES="true").returncode == 0
    calls = (tmp_path / "calls").read_text()
    assert "```\nCONFLICT\n```\nThe new lock is too long" in calls and "xxx" not in calls


def test_a_long_message_of_uvs_is_cut_and_the_table_is_not(drift, tmp_path):
    (tmp_path / "said.md").write_text("It moved.\n")
    (tmp_path / "table.txt").write_text("CONFLICT\n")
    (tmp_path / "why.txt").write_text("x" * 70_000)
    assert drift(ISSUE, RESOLVES="false").returncode == 0
    calls = (tmp_path / "calls").read_text()
    assert "```\nCONFLICT\n```\n" in calls and 50_000 < calls.count("x") < 60_000


def test_the_image_is_watched_daily_and_each_verdict_has_its_steps():
    workflow = read_workflow("image-drift.yml")
    [when] = workflow[True]["schedule"]  # yaml reads `on` as True
    assert when["cron"].endswith(" * * *")
    named = {step["name"]: step for step in workflow["jobs"]["drift"]["steps"]}
    assert named[RESOLVE]["if"] == "${{ steps.check.outputs.fits == 'false' }}"
    assert named[ISSUE]["if"] == "${{ !cancelled() && steps.check.outputs.fits == 'false' }}"
    kept = named["Keep the table and the new lock"]
    assert kept["if"] == "${{ steps.lock.outputs.resolves == 'true' }}"
    assert re.findall(r"/(\S+)", kept["with"]["path"]) == ["table.txt", "requirements-colab.txt"]


HASHED = (
    "# a comment\nuv==1 \\\n    --hash=sha256:a \\\n    --hash=sha256:b\nuvloop==2 \\\n    --hash=sha256:c\n"
    "packaging==3 \\\n    --hash=sha256:d\ntorch==5\ntorchao==4 \\\n    --hash=sha256:e\n"
)


def test_the_tools_of_the_drift_check_are_the_pinned_ones(run_alone, tmp_path):
    (tmp_path / "tests/requirements-local.txt").write_text(HASHED)
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\necho "$@"; cat\n')
    options, *rows = run_alone("make", "drift-tools").stdout.splitlines()
    assert options == "-m pip install --quiet --no-deps --require-hashes -r /dev/stdin"
    assert (
        "\n".join(rows) == "uv==1 \\\n    --hash=sha256:a \\\n    --hash=sha256:b\npackaging==3 \\\n    --hash=sha256:d"
    )


@pytest.mark.parametrize("reached", [True, False], ids=["uv", "pip where uv does not get through"])
@pytest.mark.parametrize("mirror", ["", "the-mirror"])
def test_make_setup_installs_all_with_hashes_but_torch_which_comes_last(run_alone, tmp_path, reached, mirror):
    (tmp_path / "tests/requirements-local.txt").write_text(HASHED)
    calls = tmp_path / "calls"
    said = f"""case "$*" in *"config get"*) echo {mirror}; exit;; esac; echo "called: ${{0##*/}} $*" >>{calls}"""
    read = f"""case "$*" in *stdin | *" -") cat >>{calls} ;; esac"""
    for name, end in (("python", ""), ("uv", "" if reached else "exit 2")):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{said}\n{read}\n{end}\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    (tmp_path / ".venv/.ready").unlink()
    done = run_alone("make", "setup")
    assert done.stdout.splitlines()[-1].startswith(".venv is ready"), done.stderr
    rest = HASHED.replace("torch==5\n", "")
    uv = "uv==1 \\\n    --hash=sha256:a \\\n    --hash=sha256:b\n"
    hashed = "--no-deps --require-hashes -r /dev/stdin\n"
    first, second, *others = calls.read_text().split("called: ")[1:]
    assert first.startswith("python -m pip install") and first.endswith(hashed + uv)
    index = f" --default-index {mirror}" if mirror else ""
    assert second == f"uv pip install -q --python .venv/bin/python{index} --no-deps --require-hashes -r -\n{rest}"
    assert calls.read_text().count(rest) == (1 if reached else 2)
    assert others[-1].startswith("python -m pip install") and others[-1].endswith(" torch==5\n")


def test_every_local_package_but_torch_has_hashes():
    text = (ROOT / "tests/requirements-local.txt").read_text(encoding="utf-8")
    blocks = re.findall(r"^[^#\s].*\n(?:    .*\n)*", text, re.MULTILINE)
    assert "".join(blocks) == re.sub("^#.*\n", "", text, flags=re.MULTILINE)
    hashed = [block for block in blocks if re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", block)]
    assert len(hashed) > 150
    assert [block.partition("==")[0] for block in blocks if block not in hashed] == ["torch"]


@pytest.mark.parametrize(
    ("number", "said"), [("", "issue create --title The series fails on a T4"), ("7", "issue comment 7")]
)
@pytest.mark.parametrize("report", ["## Regression FAILED", None])
def test_a_failed_night_opens_an_issue_or_comments_on_the_open_one(number, said, report, gh, tmp_path):
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    if report:
        (tmp_path / "t4/reports").mkdir(parents=True)
        (tmp_path / "t4/reports/summary.md").write_text(report)
    ended = "failure" if report else "cancelled"
    environment = gh(OPEN=number, RUN="https://example.org/run/1", GITHUB_SHA="abc123", ENDED=ended)
    done = run_step("t4.yml", "Open an issue, or comment on the open one", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.startswith(said) and "abc123: [the run](https://example.org/run/1)" in calls
    assert (report or "It ended before there was a report.") in calls
    assert ("It took too long, or somebody cancelled it." in calls) == (ended == "cancelled")


def test_a_night_that_was_not_judged_has_an_issue_of_its_own(gh, tmp_path):
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    (tmp_path / "t4/reports").mkdir(parents=True)
    (tmp_path / "t4/reports/summary.md").write_text("## NOT JUDGED: 9 of 9 checks passed.")
    environment = gh(RUN="https://example.org/run/1", GITHUB_SHA="abc123", ENDED="failure")
    run_step("t4.yml", "Open an issue, or comment on the open one", cwd=tmp_path, **environment)
    assert (tmp_path / "calls").read_text().startswith("issue create --title The series on a T4 has no baseline")


def test_a_long_report_is_cut_to_what_github_takes(gh, tmp_path):
    (tmp_path / "body.md").write_text("x" * 70_000)
    command = [ROOT / ".github/open-issue.sh", "A title", tmp_path / "body.md"]
    subprocess.run(command, env={**os.environ, **gh()}, check=True)
    assert (tmp_path / "calls").read_text().count("x") < 65_536


def test_a_failing_gh_fails_the_step(gh, tmp_path):
    (tmp_path / "bin/gh").write_text("#!/bin/sh\nexit 4\n")
    done = subprocess.run([ROOT / ".github/open-issue.sh", "A title", "/dev/null"], env={**os.environ, **gh()})
    assert done.returncode != 0


HOME = "A home folder of its own"


def test_nothing_that_another_job_left_on_a_t4s_own_runner_is_used(tmp_path):
    """The step comes before any other that has caches, and no path of the job leads into the runner's home folder."""
    given = tmp_path / "env"
    done = run_step("t4.yml", HOME, RUNNER_TEMP=str(tmp_path / "t e m p"), GITHUB_ENV=str(given))
    assert done.returncode == 0, done.stderr
    home = tmp_path / "t e m p" / "home"
    assert dict(line.split("=", 1) for line in given.read_text().splitlines()) == {
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "HF_HOME": str(home / ".cache" / "huggingface"),
    }
    assert (home / "tmp").is_dir()
    steps = read_workflow("t4.yml")["jobs"]["t4"]["steps"]
    assert [step["name"] for step in steps][:3] == ["The GPU", "Check out", HOME]
    paths = [step["with"]["path"] for step in steps if "path" in step.get("with", {}) and "cache" in step["uses"]]
    assert paths and all(path.startswith("${{ runner.temp }}/home/.cache/") for path in paths)
    assert "~/" not in (ROOT / ".github" / "workflows" / "t4.yml").read_text(encoding="utf-8")


def test_an_asked_for_run_without_a_runner_says_so():
    done = run_step("t4.yml", "No runner")
    assert done.returncode == 1 and "T4_RUNNER" in done.stdout


# make targets and `.ci/run`, with a stand-in for every command that they call: the real ones take a quarter of an hour.

COMMANDS = "python ruff pytest check-jsonschema zizmor jactionlint shellcheck apt-get id sudo".split()
STAND_IN = """#!/bin/sh
echo "called: ${0##*/} $*" >&2
case "${0##*/} $*" in id*) echo "${USER_ID:-0}" ;; $FAILS) exit "${STATUS:-100}" ;; esac
"""


@pytest.fixture
def run_alone(tmp_path):
    """Run a command in a folder with the Makefile, `.ci/run` and the stand-ins; `fails` is a pattern of what fails."""

    def run(*command, fails="nothing", **more):
        environment = {"PATH": f"{tmp_path / '.venv/bin'}:{tools}", "FAILS": fails, "HOME": str(tmp_path), **more}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    (tmp_path / ".github").mkdir()
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/requirements-local.txt").touch()
    (tmp_path / "docs").mkdir()
    tools = tmp_path / "tools"  # and no Chromium
    stand_ins = [tmp_path / ".venv" / "bin" / name for name in (*COMMANDS, "python3")]
    stand_ins += [tmp_path / name / "bin" / "python" for name in (".venv-proof", ".venv-site")]
    for path in stand_ins:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)
    tools.mkdir()
    for name in ("sh", "bash", "env", "make", "date", "dirname", "cp", "grep", "awk", "cat", "touch"):
        (tools / name).symlink_to(shutil.which(name))
    (tmp_path / ".venv" / ".ready").touch()
    (tmp_path / "docs/requirements.txt").touch()  # newer than .venv-site, so that it is installed
    return run


def test_make_test_says_what_each_part_took(run_alone):
    done = run_alone("make", "test")
    assert done.returncode == 0, done.stderr
    table = done.stdout.partition("make test took\n")[2]
    assert re.findall(r"^ +\d+ s  (.+)$", table, re.MULTILINE) == ["setup", "lint", "tests and series", "regression"]
    assert re.search(r"called: pytest .* tests/whole_series.py tests/test_\S+\n", done.stderr)


def test_make_unit_leaves_the_series_out(run_alone):
    done = run_alone("make", "unit")
    assert done.returncode == 0 and "called: pytest" in done.stderr
    assert "whole_series" not in done.stderr


def test_make_test_stops_at_the_first_part_that_fails(run_alone):
    done = run_alone("make", "test", fails="pytest*")
    assert done.returncode != 0
    table = done.stdout.partition("make test took\n")[2]
    assert re.findall(r"^ +\d+ s  (.+)$", table, re.MULTILINE) == ["setup", "lint", "tests and series, FAILED"]
    assert "tests.maintain.regress" not in done.stderr


@pytest.mark.parametrize(
    ("status", "said", "passes"), [(1, "FAILED", False), (2, "FAILED", False), (3, "NOT JUDGED", True)]
)
def test_make_test_fails_with_the_regression_and_says_what_was_not_judged(run_alone, status, said, passes):
    """Not judged is a machine without a baseline: what must hold on any machine held there too."""
    done = run_alone("make", "test", fails="python -m tests.maintain.regress*", STATUS=str(status))
    assert (done.returncode == 0) is passes and f"regression, {said}\n" in done.stdout


def test_ci_installs_chromium_and_tests(run_alone):
    done = run_alone(".ci/run")
    assert done.returncode == 0, done.stderr
    assert re.search("called: apt-get .*install .*chromium", done.stderr) and "NO CHROMIUM" not in done.stderr
    for tools in ("requirements-proof.txt", "docs/requirements.txt"):
        assert done.stderr.index(tools) < done.stderr.index("called: pytest")


def test_ci_tests_without_chromium_where_it_cannot_be_had(run_alone):
    done = run_alone(".ci/run", fails="apt-get*")
    assert done.returncode == 0, done.stderr
    assert "NO CHROMIUM" in done.stderr and "called: pytest" in done.stderr


def test_ci_fails_where_a_test_fails(run_alone):
    assert run_alone(".ci/run", fails="pytest*").returncode != 0


def test_make_browser_asks_sudo_where_it_is_not_root_and_fails_where_apt_does(run_alone):
    done = run_alone("make", "browser", USER_ID="1000")
    assert done.returncode == 0 and "called: sudo -n env DEBIAN_FRONTEND" in done.stderr, done.stderr
    assert "called: sudo" not in run_alone("make", "browser").stderr
    assert run_alone("make", "browser", fails="apt-get*install*").returncode != 0


def test_make_browser_leaves_a_chromium_that_is_there(run_alone, tmp_path):
    (tmp_path / "tools" / "chromium").symlink_to(shutil.which("true"))
    done = run_alone("make", "browser", fails="apt-get*")
    assert done.returncode == 0 and "apt-get" not in done.stderr


@pytest.mark.parametrize("service", ["kaggle", "colab"])
@pytest.mark.parametrize(
    ("fails", "status", "judged"),
    [
        ("nothing", 0, True),
        ("python -m tests.maintain.remote*", 1, True),  # a chapter failed there
        ("python -m tests.maintain.remote*", 2, False),  # nothing came back
        ("python -m tests.maintain.regress*", 1, True),
        ("python -m tests.maintain.regress*", 3, True),  # not judged
        ("python -m tests.maintain.re*", 1, True),
    ],
)
def test_what_came_back_is_judged_and_the_worse_status_counts(run_alone, service, fails, status, judged):
    done = run_alone("make", service, fails=fails, STATUS=str(status))
    assert ("tests.maintain.regress runs/t4" in done.stderr) == judged
    assert f"{service}] Error {status}" in done.stderr if status else done.returncode == 0


@pytest.fixture
def last_run(tmp_path):
    """A run of each profile, as `make run` leaves it, and the measures that are committed."""
    for profile, kind in (("cpu", "AVX512 CPU"), ("t4", "Tesla T4")):
        (tmp_path / "runs" / profile / "executed").mkdir(parents=True)
        (tmp_path / "runs" / profile / "executed" / "measured.json").write_text(f'{{\n  "kind": "{kind}"\n}}')
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "measured.json").write_text("committed")
    return tmp_path / "runs"


def recorded(folder):
    return "CPU" in (folder / "notebooks" / "measured.json").read_text()


def test_make_record_keeps_measures_and_outputs_of_the_run_that_it_made(run_alone, last_run, tmp_path):
    done = run_alone("make", "record")
    assert done.returncode == 0, done.stderr
    called = [line.removeprefix("called: python ") for line in done.stderr.splitlines()]
    [series] = [number for number, call in enumerate(called) if "series --fresh -f tests/profiles/cpu.toml" in call]
    outputs = "notebooks/build.py --outputs-from runs/cpu/executed"
    assert called[series + 1 :] == ["-m tests.maintain.regress runs/cpu --record", outputs]
    assert recorded(tmp_path)


@pytest.mark.parametrize("fails", ["python -m tests.maintain.regress*", "python -m *.series*"])
def test_make_record_changes_nothing_where_the_run_is_no_good(run_alone, last_run, tmp_path, fails):
    done = run_alone("make", "record", fails=fails)
    assert done.returncode != 0 and "--outputs-from" not in done.stderr and not recorded(tmp_path)


def test_make_record_keeps_no_outputs_of_another_profile_or_of_a_gpu(run_alone, last_run, tmp_path):
    done = run_alone("make", "record", "PROFILE=t4")
    assert "-f tests/profiles/t4.toml" in done.stderr and "tests.maintain.regress runs/t4 --record" in done.stderr
    (last_run / "cpu" / "executed" / "measured.json").write_text('{"kind": "Tesla T4"}')
    done = (done, run_alone("make", "record"))
    assert not any(each.returncode or "--outputs-from" in each.stderr for each in done)
    assert (tmp_path / "notebooks" / "measured.json").read_text() == "committed"


def test_make_regress_takes_the_run_that_it_is_told_or_the_last(run_alone):
    assert "tests.maintain.regress runs/t4\n" in run_alone("make", "regress", "PROFILE=t4").stderr
    assert re.search(r"tests.maintain.regress *\n", run_alone("make", "regress").stderr)
