"""The preflight: is this machine fit for the series, and if not, what to do about it."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from helpers.base import InputError, Table
from helpers.environment.hub import (
    HUB_SECONDS,
    choose_hub,
    model_url,
    models_address,
    no_answer_fix,
    require_modelscope,
    uses_modelscope,
)
from helpers.environment.probes import SDPA, ProbeResult, run_probe
from helpers.environment.requirements import Pin, normal_name, read_lock, requirement_name, unmet
from helpers.environment.setup import (
    GPU_ONLY,
    OTHER_IMAGE,
    RESTART,
    find_place,
    find_requirements,
    installed_version,
    loaded_version,
    same_version,
    stale_packages,
)

HEADERS = ("check", "found", "expected", "verdict", "what to do")
SET_UP = {"local": "run `make setup` and choose the kernel of .venv"}
SET_UP_CELL = "run the setup cell again"
PROBE_SECONDS = 60  # for one that hangs: each takes a few seconds, the first time after an install up to 20
DISK_GIB = {"cpu": 5, "gpu": 25}  # models, checkpoints, the merged model and its GGUF files
MEMORY_GIB = 6
GPU_MEMORY_GIB = 10  # training the 3B model as chapter 04 does peaks below this
WITHOUT_GPU = "a T4, or choices as in tests/profiles/cpu.toml"
T4_CLICKS = "Runtime > Change runtime type > T4 GPU > Save, then run the notebook from the top"


@dataclass(frozen=True)
class Row:
    """One check. `verdict` is `ok`, `warn` or `fail`; `fix` says what to do where it is not `ok`."""

    what: str
    found: str
    expected: str
    verdict: str = "ok"
    fix: str = ""


@dataclass(frozen=True, repr=False)
class EnvironmentReport(Table):
    """The rows of the preflight. Example: `check_environment("gpt2").raise_if_failed()`."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """True where no row failed; warnings do not count."""
        return all(row.verdict != "fail" for row in self.rows)

    def raise_if_failed(self) -> None:
        """Raise InputError for the first failed row."""
        for row in self.rows:
            if row.verdict == "fail":
                raise InputError(row.what, found=row.found, expected=row.expected, fix=row.fix)

    def _table(self) -> tuple[tuple[str, ...], list[list[str]]]:
        return HEADERS, [_cells(row) for row in self.rows if row.verdict != "ok"]

    def _notes(self) -> list[str]:
        counts = [f"{sum(row.verdict == v for row in self.rows)} {v}" for v in ("ok", "warn", "fail")]
        return [f"{len(self.rows)} checks: {', '.join(counts)}."]

    def _folded(self) -> tuple[str, tuple[str, ...], list[list[str]]]:
        return "all checks", HEADERS, [_cells(row) for row in self.rows]


def _cells(row: Row) -> list[str]:
    return [row.what, row.found, row.expected, row.verdict, row.fix]


def check_environment(
    model_name: str,
    *,
    endpoint: str = "",
    modelscope: bool = False,
    requirements: str | Path = "requirements-colab.txt",
) -> EnvironmentReport:
    """Check this machine, its packages, the network and the token for the series.

    Everything that loads a native library runs in a process of its own: this process imports nothing heavy.

    Args:
        model_name: the model that will be loaded, a name on the hub or a folder.
        endpoint, modelscope: where models come from, see `choose_hub`.
        requirements: the lock; looked for in the working directory, then in the repository's root.

    Raises:
        InputError: the lock cannot be read. What is wrong with the machine is a row, never an exception.

    Example:
        >>> check_environment("unsloth/Llama-3.2-3B-Instruct").ok
        True
    """
    choose_hub(endpoint, modelscope=modelscope)
    pins = read_lock(find_requirements(requirements))
    gpu_expected = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    hub_model = None if os.path.isdir(os.path.expanduser(model_name)) else model_name
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2)) as pool:
        names = ("gpu", "bitsandbytes", "peft", "sentencepiece", "xformers", *(["triton"] if gpu_expected else []))
        running = {name: pool.submit(run_probe, name, seconds=PROBE_SECONDS) for name in names}
        hub = pool.submit(check_hub, hub_model)
        driver = read_driver()
        probes = {name: future.result() for name, future in running.items()}
    facts = probes["gpu"].found if probes["gpu"].ok else {}
    gpu = bool(facts.get("gpu"))
    kind = "gpu" if gpu else "cpu"
    return EnvironmentReport(
        (
            check_python(),
            *check_gpu(probes["gpu"], driver=driver, place=find_place()),
            *check_packages(pins, gpu=gpu),
            *check_requirements(pins),
            *check_probes(probes, gpu=gpu),
            check_disk(Path.cwd(), need_gib=DISK_GIB[kind]),
            check_memory(),
            *hub.result(),
        )
    )


def set_up_again() -> str:
    """How to get the lock's packages here."""
    return SET_UP.get(find_place(), SET_UP_CELL)


def check_python() -> Row:
    """The running Python against the series' range, 3.11 to 3.13."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    fix = "" if fits else "use Python 3.11, 3.12 or 3.13"
    return Row("Python", platform.python_version(), "3.11 to 3.13", "ok" if fits else "fail", fix)


def read_driver() -> str | None:
    """What `nvidia-smi` says of the first GPU and its driver: `Tesla T4, 550.54.15`; None where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def check_gpu(probe: ProbeResult, *, driver: str | None, place: str) -> list[Row]:
    """The GPU, its memory, its driver's CUDA against torch's, torch's code for it, and the precision to train in."""
    if not probe.ok:
        return [Row("torch", str(probe.found), "torch imports", "fail", set_up_again())]
    facts = probe.found
    cuda = f", built for CUDA {_dotted(facts['torch_cuda'])}" if facts["torch_cuda"] else ", built without CUDA"
    rows = [Row("torch", facts["torch"] + cuda, "torch imports")]
    if facts["gpu"] is None:
        if driver:
            fix = "install a torch built for CUDA" if not facts["torch_cuda"] else "update the driver, or restart"
            return [*rows, Row("GPU", f"{driver}, but torch cannot use it", "a GPU that torch can use", "fail", fix)]
        if place == "colab":
            kind = "a TPU runtime" if _has_tpu() else "a CPU runtime"
            return [*rows, Row("runtime type", kind, WITHOUT_GPU, "warn", T4_CLICKS)]
        if place == "kaggle":
            fix = "Settings > Accelerator > GPU T4 x2"
            return [*rows, Row("GPU", "none", WITHOUT_GPU, "warn", fix)]
        return [*rows, Row("GPU", "none", "none is needed for small choices")]
    capability = tuple(facts["capability"])
    name = f"{facts['gpu']}, compute capability {_dotted(capability)}"
    rows.append(Row("GPU", name, "7.0 or newer", *_verdict(capability >= (7, 0), "choose a T4 or newer")))
    free, total = facts["free_gib"], facts["total_gib"]
    rows.append(
        Row(
            "GPU memory",
            f"{free:.1f} GiB free of {total:.1f}",
            f"{GPU_MEMORY_GIB} GiB free",
            *_verdict(free >= GPU_MEMORY_GIB, "end other sessions on this GPU, or choose the 1B model", bad="warn"),
        )
    )
    driver_cuda, torch_cuda = tuple(facts["driver_cuda"]), tuple(facts["torch_cuda"])
    version = f" (driver {driver.rpartition(', ')[2]})" if driver else ""
    rows.append(
        Row(
            "CUDA",
            f"driver supports {_dotted(driver_cuda)}{version}, torch was built for {_dotted(torch_cuda)}",
            "the driver's major version not below torch's",
            *_verdict(driver_cuda[0] >= torch_cuda[0], "update the driver, or use a torch built for its CUDA"),
        )
    )
    rows.append(
        Row(
            "torch's code for this GPU",
            " ".join(facts["arch_list"]),
            f"sm_{capability[0]}{capability[1]} or one that runs on it",
            *_verdict(has_code_for(capability, facts["arch_list"]), "use a torch build that names this GPU"),
        )
    )
    bfloat16 = capability >= (8, 0)
    rows.append(Row("precision", "bfloat16" if bfloat16 else "float16", "bfloat16 from compute capability 8.0 on"))
    return rows


def has_code_for(capability: tuple[int, int], arch_list: Sequence[str]) -> bool:
    """Does a torch build run on a GPU? Binary code (`sm_`) runs on the same major version with an equal or higher
    minor one; PTX (`compute_`) runs on everything newer.

    Example: `has_code_for((8, 9), ["sm_75", "sm_86"])` -> True; `has_code_for((12, 0), ["sm_90"])` -> False.
    """
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and capability >= built:
            return True
        if kind == "sm" and capability[0] == built[0] and capability[1] >= built[1]:
            return True
    return False


def check_packages(pins: Sequence[Pin], *, gpu: bool) -> list[Row]:
    """Every pinned package against what is installed, and against what this process has loaded."""
    rows, stale = [], stale_packages(pins)
    for pin in pins:
        installed, loaded = installed_version(pin.name), loaded_version(pin.name)
        found = (installed or "not installed") + (f", loaded {loaded}" if pin.name in stale and loaded else "")
        if installed is None and pin.name in GPU_ONLY and not gpu:
            rows.append(Row(pin.name, found, "not needed without a GPU"))
        elif installed is None and pin.name in GPU_ONLY:  # a gain in speed at best: the row `attention` says what runs
            rows.append(Row(pin.name, found, pin.version, "warn", set_up_again()))
        elif installed is None:
            rows.append(Row(pin.name, found, pin.version, "fail", set_up_again()))
        elif pin.name in stale:
            rows.append(Row(pin.name, found, pin.version, "fail", "once: " + RESTART[find_place()]))
        elif not same_version(installed, pin.version):
            rows.append(Row(pin.name, found, pin.version, "warn", set_up_again()))
        else:
            rows.append(Row(pin.name, found, pin.version))
    return rows


def check_requirements(pins: Sequence[Pin]) -> list[Row]:
    """What the lock's packages ask for, by their installed metadata, against what is installed.

    Each requirement that does not hold is a row that fails; where all hold, one row says so.
    """
    installed = {pin.name for pin in pins if installed_version(pin.name)}
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.name:  # the first on the path wins, as in an import: a system's copy may lie behind it
            versions.setdefault(normal_name(distribution.name), distribution.version)
    place, locked, rows = find_place(), {pin.name for pin in pins}, []
    for name in sorted(installed):
        for requirement, found in unmet(
            importlib.metadata.requires(name) or (), versions, python=platform.python_version()
        ):
            dependency = requirement_name(requirement)
            if dependency in (*GPU_ONLY, "torchvision", "triton") and found == "nothing":
                continue  # only of use on a GPU
            # The setup cell brings back what is in the lock; the rest is the image's.
            fix = set_up_again() if dependency in locked else OTHER_IMAGE.get(place, set_up_again())
            rows.append(Row(f"{name} needs {dependency}", f"{dependency} {found}", requirement, "fail", fix))
    return rows or [Row("what these ask for", f"{len(installed)} packages fit together", "no conflict")]


def check_probes(probes: Mapping[str, ProbeResult], *, gpu: bool) -> list[Row]:
    """The trials in processes of their own, as rows."""
    expected = {
        "bitsandbytes": "4-bit forward and backward",
        "peft": "a LoRA adapter can be built",
        "sentencepiece": "its protobuf classes load",
    }
    if gpu and "triton" in probes:
        expected["triton"] = "a kernel compiles and runs"
    rows = []
    for name, text in expected.items():
        result = probes[name]
        verdict = "ok" if result.ok else "fail"
        fix = (
            ""
            if result.ok
            else f"read the whole error with `python -m helpers.environment.probes {name}`; {set_up_again()}"
        )
        rows.append(Row(f"{name} works", str(result.found), text, verdict, fix))
    xformers = probes["xformers"]
    found = str(xformers.found) if xformers.ok else f"xformers does not load ({xformers.found}): Unsloth uses {SDPA}"
    rows.append(Row("attention", found, "xformers where it loads"))
    return rows


def check_disk(folder: Path, *, need_gib: float) -> Row:
    """Free space where the series writes. Below a fifth of the need not even the model fits."""
    free = shutil.disk_usage(folder).free / 2**30
    verdict = "ok" if free >= need_gib else "warn" if free >= need_gib / 5 else "fail"
    fix = "" if verdict == "ok" else "free some space, or set RUN_DIR and HF_HOME to a larger disk"
    return Row("disk", f"{free:.1f} GiB free", f"{need_gib} GiB", verdict, fix)


def check_memory(*, need_gib: float = MEMORY_GIB) -> Row:
    """Main memory that can be had now."""
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    verdict, fix = _verdict(free >= need_gib, "close other programs and notebooks", bad="warn")
    return Row("memory", f"{free:.1f} GiB free of {total:.1f}", f"{need_gib} GiB", verdict, fix)


def find_token() -> str:
    """Where a Hugging Face token would come from; the token itself is neither read out nor printed."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"environment variable {name}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    home = Path(os.environ.get("HF_HOME", cache / "huggingface"))
    if Path(os.environ.get("HF_TOKEN_PATH", home / "token")).is_file():
        return "the file that `hf auth login` wrote"
    return "the Colab secret HF_TOKEN, if you have made one" if find_place() == "colab" else "nowhere yet"


def check_hub(model_name: str | None) -> list[Row]:
    """Can the model be had, and does it need a token? Asks the hub that `choose_hub` chose, for at most 5 s."""
    modelscope, local = uses_modelscope(), "set MODEL_NAME to a folder with a model"
    what, expected = "ModelScope" if modelscope else "Hub", f"an answer in {HUB_SECONDS} s"
    try:
        if modelscope:
            require_modelscope()  # without it Unsloth does not even load
    except InputError as error:
        return [Row(what, error.found, error.expected, "fail", error.fix)]
    if model_name is None:
        return [Row(what, "not asked", "not needed: the model is on this machine")]
    if not modelscope and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return [Row(what, "switched off (HF_HUB_OFFLINE)", model_name, "warn", f"unset HF_HUB_OFFLINE, or {local}")]
    result, address = run_probe("hub", model_url(model_name), seconds=HUB_SECONDS), models_address()
    if not result.ok:
        connect = {"kaggle": "switch on Settings > Internet"}.get(find_place(), "connect to the network")
        fix = no_answer_fix(local, connect=connect)
        return [Row(what, f"{address}: {result.found}", expected, "fail", fix)]
    rows = [Row(what, f"reached at {address}", expected)]
    status = result.found.get("status")
    if modelscope:
        found = f"{address} does not show it (status {status})" if status else "there"
        return [*rows, Row("model", found, model_name, *_verdict(not status, "correct MODEL_NAME", bad="warn"))]
    return [*rows, check_token(model_name, status=status, gated=bool(result.found.get("gated")))]


def check_token(model_name: str, *, status: int | None, gated: bool) -> Row:
    """Does the model need a token, and is there one?"""
    token = find_token()
    secret = "accept its licence on the Hub and put a token into HF_TOKEN (Colab: the key icon at the left, Secrets)"
    if status:
        found = f"the Hub does not show {model_name} (status {status}); token: {token}"
        return Row("token", found, "a model that exists", "warn", "correct MODEL_NAME, or " + secret)
    if not gated:
        return Row("token", f"not needed for {model_name}", "only for gated models")
    have = token.startswith(("environment", "the file"))
    return Row("token", token, f"one: {model_name} is gated", *_verdict(have, secret, bad="warn"))


def _verdict(good: bool, fix: str, *, bad: str = "fail") -> tuple[str, str]:
    return ("ok", "") if good else (bad, fix)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _has_tpu() -> bool:
    return bool(os.environ.get("COLAB_TPU_ADDR") or os.environ.get("TPU_NAME")) or Path("/dev/accel0").exists()
