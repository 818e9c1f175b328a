"""The preflight: is this machine fit for the series, and if not, what to do about it."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
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
from helpers.environment.probes import ProbeResult, run_probe
from helpers.environment.requirements import (
    NOTHING,
    Pin,
    name_and_version,
    normal_name,
    read_lock,
    requirement_name,
    unmet,
)
from helpers.environment.setup import (
    GPU_ONLY,
    RESTART,
    find_place,
    find_requirements,
    installed_version,
    loaded_version,
    other_image,
    same_version,
    stale_packages,
)
from helpers.messages import N_, _

HEADERS = (N_("check"), N_("found"), N_("expected"), N_("verdict"), N_("what to do"))
VERDICTS = {"ok": N_("ok"), "warn": N_("warn"), "fail": N_("fail")}
SET_UP = {"local": N_("run `make setup` and choose the kernel of .venv")}
SET_UP_CELL = N_("run the setup cell again")
PROBE_SECONDS = 60  # for one that hangs: each takes a few seconds, the first time after an install up to 20
DISK_GIB = {"cpu": 5, "gpu": 25}  # models, checkpoints, the merged model and its GGUF files
MEMORY_GIB = 6
GPU_MEMORY_GIB = 10  # training the 3B model as chapter 04 does peaks below this
WITHOUT_GPU = N_("a T4, or choices as in tests/profiles/cpu.toml")
T4_CLICKS = N_("Runtime > Change runtime type > T4 GPU > Save, then run the notebook from the top")


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

    def _table(self) -> tuple[list[str], list[list[str]]]:
        return _headers(), [_cells(row) for row in self.rows if row.verdict != "ok"]

    def _notes(self) -> list[str]:
        counts = Counter(row.verdict for row in self.rows)
        return [
            _(
                "{count} checks: {ok} ok, {warn} warn, {fail} fail.",
                count=len(self.rows),
                ok=counts["ok"],
                warn=counts["warn"],
                fail=counts["fail"],
            )
        ]

    def _folded(self) -> tuple[str, list[str], list[list[str]]]:
        return _("all checks"), _headers(), [_cells(row) for row in self.rows]


def _headers() -> list[str]:
    return [_(header) for header in HEADERS]


def _cells(row: Row) -> list[str]:
    return [row.what, row.found, row.expected, _(VERDICTS[row.verdict]), row.fix]


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
    return _(SET_UP.get(find_place(), SET_UP_CELL))


def check_python() -> Row:
    """The running Python against the series' range, 3.11 to 3.13."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Row(
        "Python", platform.python_version(), _("3.11 to 3.13"), *_verdict(fits, _("use Python 3.11, 3.12 or 3.13"))
    )


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
        return [Row("torch", str(probe.found), _("torch imports"), "fail", set_up_again())]
    facts = probe.found
    torch = _("{torch}, built without CUDA", torch=facts["torch"])
    if facts["torch_cuda"]:
        torch = _("{torch}, built for CUDA {cuda}", torch=facts["torch"], cuda=_dotted(facts["torch_cuda"]))
    rows = [Row("torch", torch, _("torch imports"))]
    if facts["gpu"] is None:
        return [*rows, _no_gpu(driver, built=bool(facts["torch_cuda"]), place=place)]
    capability = tuple(facts["capability"])
    name = _("{gpu}, compute capability {capability}", gpu=facts["gpu"], capability=_dotted(capability))
    rows.append(Row("GPU", name, _("7.0 or newer"), *_verdict(capability >= (7, 0), _("choose a T4 or newer"))))
    free, total = facts["free_gib"], facts["total_gib"]
    less = _("end other sessions on this GPU, or choose the 1B model")
    rows.append(
        Row(
            _("GPU memory"),
            _("{free:.1f} GiB free of {total:.1f}", free=free, total=total),
            _("{need} GiB free", need=GPU_MEMORY_GIB),
            *_verdict(free >= GPU_MEMORY_GIB, less, bad="warn"),
        )
    )
    rows.append(_check_cuda(driver, driver_cuda=tuple(facts["driver_cuda"]), torch_cuda=tuple(facts["torch_cuda"])))
    rows.append(
        Row(
            _("torch's code for this GPU"),
            " ".join(facts["arch_list"]),
            _("{code} or one that runs on it", code=f"sm_{capability[0]}{capability[1]}"),
            *_verdict(has_code_for(capability, facts["arch_list"]), _("use a torch build that names this GPU")),
        )
    )
    precision = "bfloat16" if capability >= (8, 0) else "float16"
    rows.append(Row(_("precision"), precision, _("bfloat16 from compute capability 8.0 on")))
    return rows


def _no_gpu(driver: str | None, *, built: bool, place: str) -> Row:
    """What torch cannot see: a GPU with a driver, one that this place lends, or none. `built`: torch has CUDA."""
    if driver:
        found = _("{driver}, but torch cannot use it", driver=driver)
        fix = _("update the driver, or restart") if built else _("install a torch built for CUDA")
        return Row("GPU", found, _("a GPU that torch can use"), "fail", fix)
    if place == "colab":
        kind = _("a TPU runtime") if _has_tpu() else _("a CPU runtime")
        return Row(_("runtime type"), kind, _(WITHOUT_GPU), "warn", _(T4_CLICKS))
    if place == "kaggle":
        return Row("GPU", _("none"), _(WITHOUT_GPU), "warn", "Settings > Accelerator > GPU T4 x2")
    return Row("GPU", _("none"), _("none is needed for small choices"))


def _check_cuda(driver: str | None, *, driver_cuda: tuple[int, int], torch_cuda: tuple[int, int]) -> Row:
    versions = {"cuda": _dotted(driver_cuda), "torch_cuda": _dotted(torch_cuda)}
    found = _("driver supports {cuda}, torch was built for {torch_cuda}", **versions)
    if driver:
        versions["driver"] = driver.rpartition(", ")[2]
        found = _("driver supports {cuda} (driver {driver}), torch was built for {torch_cuda}", **versions)
    fix = _("update the driver, or use a torch built for its CUDA")
    expected = _("the driver's major version not below torch's")
    return Row("CUDA", found, expected, *_verdict(driver_cuda[0] >= torch_cuda[0], fix))


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
        found = installed or _("not installed")
        if pin.name in stale and loaded:
            found = _("{installed}, loaded {loaded}", installed=found, loaded=loaded)
        if installed is None and pin.name in GPU_ONLY and not gpu:
            rows.append(Row(pin.name, found, _("not needed without a GPU")))
        elif installed is None and pin.name in GPU_ONLY:  # a gain in speed at best: the row `attention` says what runs
            rows.append(Row(pin.name, found, pin.version, "warn", set_up_again()))
        elif installed is None:
            rows.append(Row(pin.name, found, pin.version, "fail", set_up_again()))
        elif pin.name in stale:
            fix = _("once: {restart}", restart=_(RESTART[find_place()]))
            rows.append(Row(pin.name, found, pin.version, "fail", fix))
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
            if dependency in (*GPU_ONLY, "torchvision", "triton") and found == NOTHING:
                continue  # only of use on a GPU
            # The setup cell brings back what is in the lock; the rest is the image's.
            fix = ("" if dependency in locked else other_image(place)) or set_up_again()
            what = _("{package} needs {dependency}", package=name, dependency=dependency)
            rows.append(Row(what, name_and_version(dependency, found), requirement, "fail", fix))
    fit = _("{count} packages fit together", count=len(installed))
    return rows or [Row(_("what these ask for"), fit, _("no conflict"))]


def check_probes(probes: Mapping[str, ProbeResult], *, gpu: bool) -> list[Row]:
    """The trials in processes of their own, as rows."""
    expected = {
        "bitsandbytes": _("4-bit forward and backward"),
        "peft": _("a LoRA adapter can be built"),
        "sentencepiece": _("its protobuf classes load"),
    }
    if gpu and "triton" in probes:
        expected["triton"] = _("a kernel compiles and runs")
    rows = []
    for name, text in expected.items():
        result = probes[name]
        fix = _(
            "read the whole error with `python -m helpers.environment.probes {name}`; {remedy}",
            name=name,
            remedy=set_up_again(),
        )
        rows.append(Row(_("{name} works", name=name), str(result.found), text, *_verdict(result.ok, fix)))
    found = str(probes["xformers"].found)
    if not probes["xformers"].ok:
        found = _("xformers does not load ({error}): Unsloth uses PyTorch's own attention", error=found)
    rows.append(Row(_("attention"), found, _("xformers where it loads")))
    return rows


def check_disk(folder: Path, *, need_gib: float) -> Row:
    """Free space where the series writes. Below a fifth of the need not even the model fits."""
    free = shutil.disk_usage(folder).free / 2**30
    verdict = "ok" if free >= need_gib else "warn" if free >= need_gib / 5 else "fail"
    fix = "" if verdict == "ok" else _("free some space, or set RUN_DIR and HF_HOME to a larger disk")
    return Row(_("disk"), _("{free:.1f} GiB free", free=free), f"{need_gib} GiB", verdict, fix)


def check_memory(*, need_gib: float = MEMORY_GIB) -> Row:
    """Main memory that can be had now."""
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    verdict, fix = _verdict(free >= need_gib, _("close other programs and notebooks"), bad="warn")
    found = _("{free:.1f} GiB free of {total:.1f}", free=free, total=total)
    return Row(_("memory"), found, f"{need_gib} GiB", verdict, fix)


def find_token() -> str:
    """Where a Hugging Face token would come from; the token itself is neither read out nor printed."""
    if variable := _token_variable():
        return _("environment variable {name}", name=variable)
    if _has_token_file():
        return _("the file that `hf auth login` wrote")
    return _("the Colab secret HF_TOKEN, if you have made one") if find_place() == "colab" else _("nowhere yet")


def _token_variable() -> str:
    return next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), "")


def _has_token_file() -> bool:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    home = Path(os.environ.get("HF_HOME", cache / "huggingface"))
    return Path(os.environ.get("HF_TOKEN_PATH", home / "token")).is_file()


def check_hub(model_name: str | None) -> list[Row]:
    """Can the model be had, and does it need a token? Asks the hub that `choose_hub` chose, for at most 5 s."""
    modelscope, local = uses_modelscope(), _("set MODEL_NAME to a folder with a model")
    what = "ModelScope" if modelscope else "Hub"
    expected = _("an answer in {seconds} s", seconds=HUB_SECONDS)
    try:
        if modelscope:
            require_modelscope()  # without it Unsloth does not even load
    except InputError as error:
        return [Row(what, error.found, error.expected, "fail", error.fix)]
    if model_name is None:
        return [Row(what, _("not asked"), _("not needed: the model is on this machine"))]
    if not modelscope and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        fix = _("unset HF_HUB_OFFLINE, or {local}", local=local)
        return [Row(what, _("switched off (HF_HUB_OFFLINE)"), model_name, "warn", fix)]
    result, address = run_probe("hub", model_url(model_name), seconds=HUB_SECONDS), models_address()
    if not result.ok:
        connect = _("switch on Settings > Internet") if find_place() == "kaggle" else ""
        fix = no_answer_fix(local, connect=connect)
        return [Row(what, f"{address}: {result.found}", expected, "fail", fix)]
    rows = [Row(what, _("reached at {address}", address=address), expected)]
    status = result.found.get("status")
    if modelscope:
        found = _("{address} does not show it (status {status})", address=address, status=status)
        verdict = _verdict(not status, _("correct MODEL_NAME"), bad="warn")
        return [*rows, Row(_("model"), found if status else _("there"), model_name, *verdict)]
    return [*rows, check_token(model_name, status=status, gated=bool(result.found.get("gated")))]


def check_token(model_name: str, *, status: int | None, gated: bool) -> Row:
    """Does the model need a token, and is there one?"""
    token = find_token()
    secret = _("accept its licence on the Hub and put a token into HF_TOKEN (Colab: the key icon at the left, Secrets)")
    if status:
        place = {"model": model_name, "status": status, "token": token}
        found = _("the Hub does not show {model} (status {status}); token: {token}", **place)
        return Row("token", found, _("a model that exists"), "warn", _("correct MODEL_NAME, or {fix}", fix=secret))
    if not gated:
        return Row("token", _("not needed for {model}", model=model_name), _("only for gated models"))
    have = bool(_token_variable()) or _has_token_file()
    return Row("token", token, _("one: {model} is gated", model=model_name), *_verdict(have, secret, bad="warn"))


def _verdict(good: bool, fix: str, *, bad: str = "fail") -> tuple[str, str]:
    return ("ok", "") if good else (bad, fix)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _has_tpu() -> bool:
    return bool(os.environ.get("COLAB_TPU_ADDR") or os.environ.get("TPU_NAME")) or Path("/dev/accel0").exists()
