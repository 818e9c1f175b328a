"""The preflight: a sound environment passes, and each way of breaking it on purpose has a row that says so.

Nothing is imitated where it can be had: broken packages are real ones, installed into a folder in front of the others;
crashes and hangs are real processes; the Hub is a server on this machine. Only GPUs are described by their facts.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers.base import ROOT, InputError
from helpers.environment.preflight import (
    EnvironmentReport,
    Row,
    check_disk,
    check_environment,
    check_gpu,
    check_hub,
    check_memory,
    check_packages,
    check_probes,
    check_requirements,
    find_token,
    has_code_for,
)
from helpers.environment.probes import ProbeResult, run_probe
from helpers.environment.requirements import read_lock
from helpers.environment.setup import import_names

PINS = read_lock(ROOT / "requirements-colab.txt")
T4 = {
    "torch": "2.11.0+cu128",
    "torch_cuda": (12, 8),
    "gpu": "Tesla T4",
    "capability": (7, 5),
    "free_gib": 14.6,
    "total_gib": 14.7,
    "driver_cuda": (12, 4),
    "arch_list": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}


def row_of(rows, what):
    found = [row for row in rows if row.what == what]
    assert len(found) == 1, [row.what for row in rows]
    return found[0]


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """`packages("datasets==4.0.0")`: a folder with the real package; skips where the package index does not answer."""

    def install(requirement):
        folder = tmp_path_factory.mktemp("packages")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", folder]
        done = subprocess.run([*command, "--only-binary=:all:", requirement], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{requirement} cannot be had from the package index: {done.stderr.strip()[-200:]}")
        return folder

    return install


def put_in_front(monkeypatch, folder):
    """Make a folder's packages win, here and in the probes' processes, as in a kernel that has loaded none of them."""
    for pin in PINS:
        for name in import_names(pin.name):
            monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def package_row(name):
    return row_of(check_packages(PINS, gpu=False), name)


# A sound environment


@pytest.mark.slow
def test_a_sound_environment_passes_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom helpers.environment import check_environment\n"
        "report = check_environment('.')\nprint(report)\n"
        "report.raise_if_failed()\nprint(report._repr_html_())\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'unsloth'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text, page, heavy = done.stdout.partition("<")[0], done.stdout, done.stdout.strip().splitlines()[-1]
    assert heavy == "[]" and " 0 fail." in text
    for fact in ("4-bit forward and backward on", "a LoRA adapter was built", "fit together"):
        assert fact in page and fact not in text, "what is sound is shown on demand"


def test_the_lock_is_looked_for_in_the_repository_and_its_absence_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no-such-lock.txt: found no such file, expected a requirements file"):
        check_environment("gpt2", requirements="no-such-lock.txt")


def test_a_report_raises_for_its_first_failure_and_not_for_warnings():
    warn, fail = Row("a", "1", "2", "warn", "x"), Row("b", "3", "4", "fail", "do this")
    EnvironmentReport((warn,)).raise_if_failed()
    assert EnvironmentReport((warn,)).ok and not EnvironmentReport((warn, fail)).ok
    with pytest.raises(InputError, match="b: found 3, expected 4. Fix: do this."):
        EnvironmentReport((warn, fail)).raise_if_failed()
    assert "do this" in repr(EnvironmentReport((fail,))) and "do this" in EnvironmentReport((fail,))._repr_html_()
    assert "&lt;b&gt;" in EnvironmentReport((Row("x", "<b>", "y"),))._repr_html_()


def test_a_report_shows_what_needs_attention_and_folds_the_rest():
    sound, warn = Row("sound row", "1", "2"), Row("warned row", "3", "4", "warn", "mend it")
    report = EnvironmentReport((sound, warn))
    assert "warned row" in repr(report) and "sound row" not in repr(report)
    assert repr(report).endswith("2 checks: 1 ok, 1 warn, 0 fail.")
    shown, folded = report._repr_html_().split("<details>")
    assert "warned row" in shown and "sound row" not in shown and "2 checks: 1 ok" in shown
    assert folded.startswith("<summary>all checks</summary>") and "sound row" in folded and "warned row" in folded
    assert repr(EnvironmentReport((sound,))) == "1 checks: 1 ok, 0 warn, 0 fail."


# Broken on purpose: packages


def test_broken_sentencepiece_too_new_for_protobuf(monkeypatch, packages):
    put_in_front(monkeypatch, packages("sentencepiece==0.2.3"))
    row = row_of(check_probes({**SOUND, "sentencepiece": run_probe("sentencepiece", seconds=30)}, gpu=False), WORKS[2])
    assert row.verdict == "fail" and "incompatible Protobuf" in row.found and "setup" in row.fix


def test_broken_datasets_4_0_0(monkeypatch, packages):
    put_in_front(monkeypatch, packages("datasets==4.0.0"))
    row = package_row("datasets")
    assert (row.found, row.expected, row.verdict) == ("4.0.0", "3.6.0", "warn")
    row = row_of(check_requirements(PINS), "unsloth needs datasets")
    assert row.verdict == "fail" and row.found == "datasets 4.0.0" and "!=4.0.*" in row.expected


def test_broken_transformers_past_unsloths_range(monkeypatch, packages):
    put_in_front(monkeypatch, packages("transformers==5.18.0"))
    row = row_of(check_requirements(PINS), "unsloth needs transformers")
    assert row.verdict == "fail" and row.found == "transformers 5.18.0" and "<=5.17.0" in row.expected


def test_what_the_setup_cell_cannot_mend_names_the_runtime_to_choose(monkeypatch, tmp_path):
    for name, version in (("torch", "2.15.0"), ("transformers", "5.18.0")):
        about = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    put_in_front(monkeypatch, tmp_path)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "test")
    rows = check_requirements(PINS)
    row = row_of(rows, "unsloth needs torch")
    assert row.verdict == "fail" and row.found == "torch 2.15.0" and "Runtime version > 2026.07" in row.fix
    assert row_of(rows, "unsloth needs transformers").fix == "run the setup cell again"


def test_broken_torchao_0_10_under_peft(monkeypatch, packages):
    put_in_front(monkeypatch, packages("torchao==0.10.0"))
    assert package_row("torchao").verdict == "warn"
    assert row_of(check_requirements(PINS), "unsloth-zoo needs torchao").verdict == "fail"
    row = row_of(check_probes({**SOUND, "peft": run_probe("peft", seconds=60)}, gpu=False), "peft works")
    assert row.verdict == "fail" and "incompatible version of torchao" in row.found


def test_broken_bitsandbytes_without_its_library(monkeypatch, tmp_path):
    import importlib.util

    source = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    shutil.copytree(source, tmp_path / "bitsandbytes", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    put_in_front(monkeypatch, tmp_path)
    row = row_of(check_probes({**SOUND, "bitsandbytes": run_probe("bitsandbytes", seconds=60)}, gpu=False), WORKS[0])
    assert row.verdict == "fail" and "no native library" in row.found


def test_broken_xformers_built_for_another_torch_is_said_to_be_unused(monkeypatch, packages):
    put_in_front(monkeypatch, packages("xformers==0.0.35"))
    row = row_of(check_probes({**SOUND, "xformers": run_probe("xformers", seconds=60)}, gpu=False), "attention")
    assert row.verdict == "ok" and "built for torch 2.10" in row.found
    assert row.found.endswith("Unsloth uses PyTorch's own attention")


def test_broken_package_replaced_under_a_live_process(monkeypatch, packages, tmp_path):
    older = packages("json5==0.12.0")
    code = (
        f"import sys; sys.path.insert(0, {str(older)!r})\n"
        "import json5\n"  # this process holds the old version …
        f"sys.path.remove({str(older)!r})\n"  # … and the environment has the lock's
        "from helpers.environment.preflight import check_packages\n"
        "from helpers.environment.requirements import read_lock\n"
        "print([r for r in check_packages(read_lock('requirements-colab.txt'), gpu=False) if r.verdict != 'ok'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "what='json5', found='0.17.3, loaded 0.12.0'" in done.stdout, done.stdout + done.stderr
    assert "verdict='fail'" in done.stdout and "restart the kernel" in done.stdout


def test_broken_package_missing(monkeypatch):
    pins = [*PINS, type(PINS[0])("not-installed-anywhere", "1.0.0")]
    row = row_of(check_packages(pins, gpu=False), "not-installed-anywhere")
    assert (row.found, row.verdict) == ("not installed", "fail")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "test")
    assert row_of(check_packages(pins, gpu=False), "not-installed-anywhere").fix == "run the setup cell again"


def test_xformers_is_missed_on_a_gpu_only():
    assert package_row("xformers").verdict == "ok"
    assert row_of(check_packages(PINS, gpu=True), "xformers").verdict == "warn"  # slower at worst: training works


# Broken on purpose: native libraries that crash, hang, or write a long story


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import ctypes; ctypes.string_at(0)", "crashed (SIGSEGV)"),
        ("import os; os.abort()", "crashed (SIGABRT)"),
        ("import time; time.sleep(60)", "no answer in 2 s"),
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file')",
            "ImportError: libcudart.so.12: cannot",
        ),
        ("import sys; sys.exit(3)", "no output"),
    ],
)
def test_broken_native_library_is_a_row_and_this_process_lives_on(monkeypatch, tmp_path, source, message):
    (tmp_path / "sentencepiece.py").write_text(source)
    put_in_front(monkeypatch, tmp_path)
    result = run_probe("sentencepiece", seconds=2)
    row = row_of(check_probes({**SOUND, "sentencepiece": result}, gpu=False), WORKS[2])
    assert row.verdict == "fail" and message in row.found and len(row.found) <= 110


WORKS = ("bitsandbytes works", "peft works", "sentencepiece works")
SOUND = {name: ProbeResult(True, "sound") for name in ("bitsandbytes", "peft", "sentencepiece", "triton", "xformers")}


def test_triton_is_checked_on_a_gpu_only():
    probes = {**SOUND, "triton": ProbeResult(False, "CompilationError: no ptxas")}
    assert all(row.verdict == "ok" for row in check_probes(probes, gpu=False))
    assert row_of(check_probes(probes, gpu=True), "triton works").verdict == "fail"


# Broken on purpose: the machine


def verdicts(rows):
    return {row.what: row.verdict for row in rows}


def test_a_t4_passes_and_trains_in_float16():
    rows = check_gpu(ProbeResult(True, T4), driver="Tesla T4, 550.54.15", place="colab")
    assert set(verdicts(rows).values()) == {"ok"}
    assert row_of(rows, "precision").found == "float16"
    assert row_of(rows, "CUDA").found == "driver supports 12.4 (driver 550.54.15), torch was built for 12.8"


@pytest.mark.parametrize(
    ("facts", "what", "verdict"),
    [
        ({"gpu": "Unknown 9000", "capability": (13, 0)}, "torch's code for this GPU", "fail"),
        ({"gpu": "Tesla K80", "capability": (3, 7)}, "GPU", "fail"),
        ({"driver_cuda": (11, 8)}, "CUDA", "fail"),
        ({"free_gib": 3.0}, "GPU memory", "warn"),
    ],
)
def test_broken_gpu(facts, what, verdict):
    rows = check_gpu(ProbeResult(True, T4 | facts), driver="GPU, 1.2", place="local")
    row = row_of(rows, what)
    assert row.verdict == verdict and row.fix


@pytest.mark.parametrize(
    ("capability", "arch_list", "expected"),
    [
        ((7, 5), ["sm_75"], True),
        ((8, 9), ["sm_75", "sm_86"], True),  # same major version, newer minor
        ((8, 6), ["sm_89"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # compiled on the spot from PTX
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_100", "sm_120"], True),
        ((7, 5), [], False),
    ],
)
def test_whether_torchs_code_runs_on_a_gpu(capability, arch_list, expected):
    assert has_code_for(capability, arch_list) is expected


NO_GPU = ProbeResult(True, {"torch": "2.13.0+cpu", "torch_cuda": None, "gpu": None})


def test_broken_torch_that_cannot_use_the_gpu_that_is_there():
    row = row_of(check_gpu(NO_GPU, driver="Tesla T4, 550.54", place="local"), "GPU")
    assert row.verdict == "fail" and row.fix == "install a torch built for CUDA"


def test_a_cpu_or_tpu_runtime_on_colab_gets_the_clicks_to_a_t4(monkeypatch):
    row = row_of(check_gpu(NO_GPU, driver=None, place="colab"), "runtime type")
    assert (row.found, row.verdict) == ("a CPU runtime", "warn")
    assert row.fix.startswith("Runtime > Change runtime type > T4 GPU")
    monkeypatch.setenv("TPU_NAME", "local")
    assert row_of(check_gpu(NO_GPU, driver=None, place="colab"), "runtime type").found == "a TPU runtime"
    assert verdicts(check_gpu(NO_GPU, driver=None, place="local"))["GPU"] == "ok"


def test_broken_torch_is_a_row():
    rows = check_gpu(ProbeResult(False, "crashed (SIGSEGV)"), driver=None, place="local")
    assert verdicts(rows) == {"torch": "fail"}


def test_broken_no_disk_and_no_memory(tmp_path):
    free = shutil.disk_usage(tmp_path).free / 2**30
    assert check_disk(tmp_path, need_gib=free * 10).verdict == "fail"
    assert check_disk(tmp_path, need_gib=free * 2).verdict == "warn"
    assert check_disk(tmp_path, need_gib=free / 2).verdict == "ok"
    assert check_memory(need_gib=10**6).verdict == "warn" and check_memory(need_gib=0).verdict == "ok"


# Broken on purpose: the network and the token


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.removeprefix("/api/models/")
        if name == "slow/model":
            time.sleep(20)
        self.send_response(200 if name.startswith("open/") or name.startswith("gated/") else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"gated": "manual" if name.startswith("gated/") else False}).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "UNSLOTH_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()


def test_an_open_model_needs_no_token(hub):
    rows = check_hub("open/model")
    assert verdicts(rows) == {"Hub": "ok", "token": "ok"} and "not needed" in row_of(rows, "token").found
    assert row_of(rows, "Hub").found == f"reached at http://127.0.0.1:{hub.server_port}"


def test_a_gated_model_needs_a_token_which_is_never_shown(hub, monkeypatch, tmp_path):
    row = row_of(check_hub("gated/model"), "token")
    assert (row.found, row.verdict) == ("nowhere yet", "warn") and "HF_TOKEN" in row.fix
    monkeypatch.setenv("COLAB_RELEASE_TAG", "test")
    assert row_of(check_hub("gated/model"), "token").found == "the Colab secret HF_TOKEN, if you have made one"
    (tmp_path / "token").write_text("hf_secret")
    assert row_of(check_hub("gated/model"), "token").found == "the file that `hf auth login` wrote"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    rows = check_hub("gated/model")
    assert row_of(rows, "token").verdict == "ok" and find_token() == "environment variable HF_TOKEN"
    assert "hf_secret" not in repr(EnvironmentReport(tuple(rows)))


def test_the_token_file_is_looked_for_where_the_hubs_client_does(hub, monkeypatch, tmp_path):
    assert find_token() == "nowhere yet"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find_token() == "nowhere yet"
    (tmp_path / "cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "cache" / "huggingface" / "token").write_text("hf_secret")
    assert find_token() == "the file that `hf auth login` wrote"


def test_a_model_that_does_not_exist_is_a_row(hub):
    row = row_of(check_hub("no/model"), "token")
    assert row.verdict == "warn" and "does not show no/model (status 401)" in row.found


def test_broken_network_that_refuses(hub, monkeypatch):
    hub.server_close()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    row = row_of(check_hub("open/model"), "Hub")
    assert row.verdict == "fail" and "refused" in row.found and "connect to the network" in row.fix
    assert row.found.startswith("http://127.0.0.1:9: ") and "correct HF_ENDPOINT or leave it empty" in row.fix


def test_broken_network_that_never_answers_is_given_up(hub, monkeypatch):
    monkeypatch.setattr("helpers.environment.preflight.HUB_SECONDS", 1)
    row = row_of(check_hub("slow/model"), "Hub")
    assert row.verdict == "fail" and row.found == f"http://127.0.0.1:{hub.server_port}: no answer in 1 s"


def test_a_model_on_this_machine_asks_no_one_and_an_offline_switch_is_named(monkeypatch):
    assert verdicts(check_hub(None)) == {"Hub": "ok"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = row_of(check_hub("open/model"), "Hub")
    assert row.verdict == "warn" and "HF_HUB_OFFLINE" in row.found


def test_the_model_is_looked_for_where_the_choices_say(monkeypatch, tmp_path, capsys):
    """A folder asks no one; a name asks the address that is chosen, and a wrong one is refused before anything runs."""
    quiet = {name: lambda *arguments, **given: [] for name in ("check_gpu", "check_packages", "check_requirements")}
    for name, instead in (quiet | {"check_probes": lambda *arguments, **given: []}).items():
        monkeypatch.setattr(f"helpers.environment.preflight.{name}", instead)
    real, asked = run_probe, []

    def probe(name, *arguments, seconds):
        asked.extend(arguments)
        return real(name, *arguments, seconds=seconds) if name == "hub" else ProbeResult(False, "not tried")

    monkeypatch.setattr("helpers.environment.preflight.run_probe", probe)
    monkeypatch.setattr("helpers.environment.hub._check_loaded", lambda endpoint: None)
    monkeypatch.setattr("helpers.environment.hub._choices", {})
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "UNSLOTH_USE_MODELSCOPE"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert verdicts(check_environment("mine").rows)["Hub"] == "ok" and asked == []
    report = check_environment("owner/model", endpoint="http://127.0.0.1:9/")
    assert asked == ["http://127.0.0.1:9/api/models/owner/model"] and verdicts(report.rows)["Hub"] == "fail"
    assert "Models and data sets come from http://127.0.0.1:9." in capsys.readouterr().out
    with pytest.raises(InputError, match="HF_ENDPOINT: found '127.0.0.1:9'"):
        check_environment("owner/model", endpoint="127.0.0.1:9")


def test_a_lock_that_is_none_is_refused(tmp_path):
    lock = tmp_path / "lock.txt"
    lock.write_text("not a lock\n")
    with pytest.raises(InputError, match="expected name==version"):
        check_environment("gpt2", requirements=lock)
