"""Short trials that run in a process of their own, so that a crash in a native library is a row and not a dead kernel.

python -m helpers.environment.probes NAME runs one of them and prints what it found as one line of JSON.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

from helpers.base import ROOT
from helpers.messages import _


@dataclass(frozen=True)
class ProbeResult:
    """How a probe ended: what it found, or in one line why it failed."""

    ok: bool
    found: object


def probe_gpu() -> dict | None:
    """The first GPU as torch sees it, or None; `torch` and `torch_cuda` are there in either case.

    Memory is in GiB, the compute capability and the CUDA versions are `(major, minor)`.
    """
    import torch

    facts = {"torch": torch.__version__, "torch_cuda": _pair(torch.version.cuda), "gpu": None}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)
        driver_cuda = ctypes.c_int()  # 12080 is CUDA 12.8; not every build of torch passes this on
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver_cuda))
        facts |= {
            "gpu": torch.cuda.get_device_name(0),
            "capability": torch.cuda.get_device_capability(0),
            "free_gib": free / 2**30,
            "total_gib": total / 2**30,
            "driver_cuda": (driver_cuda.value // 1000, driver_cuda.value % 1000 // 10),
            "arch_list": torch.cuda.get_arch_list(),
        }
    return facts


def _pair(version: str | None) -> tuple[int, int] | None:
    return tuple(int(part) for part in version.split(".")[:2]) if version else None


def probe_bitsandbytes() -> str:
    """A 4-bit (NF4) layer, forward and backward, on the device that training will use."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.cextension import lib

    if "Mock" in type(lib).__name__:  # bitsandbytes imports without its library, and fails (or crawls) when used
        raise RuntimeError(_("bitsandbytes has no native library for this machine"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=dtype).to(device)
    x = torch.ones(4, 64, device=device, dtype=dtype, requires_grad=True)
    layer(x).float().sum().backward()
    if not (torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0):
        raise RuntimeError(_("the gradient through a 4-bit layer is zero or not finite"))
    return _("4-bit forward and backward on {device}", device=device)


def probe_peft() -> str:
    """LoRA on a one-layer model: peft checks torchao's version only when it builds the adapter."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    model(torch.ones(1, 8)).sum().backward()
    return _("a LoRA adapter was built and trained")


def probe_sentencepiece() -> str:
    """sentencepiece's protobuf classes load under this protobuf: Unsloth's `get_chat_template` needs them."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(model.SerializeToString())
    versions = {name: importlib.metadata.version(name) for name in ("sentencepiece", "protobuf")}
    return _("sentencepiece {sentencepiece} with protobuf {protobuf}", **versions)


def probe_triton() -> str:
    """A one-line kernel, compiled and run on the GPU."""
    import torch

    if not torch.cuda.is_available():
        return _("not needed without a GPU")
    global tl  # a kernel sees the globals of its module only
    import triton
    import triton.language as tl

    @triton.jit
    def add_one(x, n: tl.constexpr):
        tl.store(x + tl.arange(0, n), tl.load(x + tl.arange(0, n)) + 1)

    x = torch.zeros(16, device="cuda")
    add_one[(1,)](x, 16)
    if x.sum().item() != 16:
        raise RuntimeError(_("a kernel ran and gave a wrong result"))
    return _("triton {version} compiled and ran a kernel", version=triton.__version__)


def probe_xformers() -> str:
    """Which attention Unsloth will use: one of xformers' is run. An error says why xformers cannot be used."""
    if importlib.util.find_spec("flash_attn"):
        return _("flash-attn is installed: Unsloth tries it first")
    if importlib.util.find_spec("xformers") is None:
        return _("not installed: Unsloth uses PyTorch's own attention")
    import torch
    from xformers._cpp_lib import _register_extensions

    try:  # importing xformers only warns where its library was built for another torch
        _register_extensions()
    except Exception as error:
        built = re.search(r"PyTorch (\S+)", str(error))
        why = _("built for torch {version}", version=built[1]) if built else " ".join(str(error).split())
        raise RuntimeError(why) from error
    if not torch.cuda.is_available():
        return _("unused without a GPU: Unsloth uses PyTorch's own attention")
    import xformers.ops.fmha as fmha

    q = torch.ones(1, 8, 1, 64, device="cuda", dtype=torch.float16)
    fmha.memory_efficient_attention(q, q, q, attn_bias=fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens([8]))
    version = importlib.metadata.version("xformers")
    return _("xformers {version} ran an attention: Unsloth uses it", version=version)


def probe_hub(url: str) -> dict:
    """Ask a hub about a model, without a token: `{"gated": False}`, or `{"status": 401}` for one it does not show.

    Example: `probe_hub("https://huggingface.co/api/models/gpt2")` -> `{"gated": False}`
    """
    from urllib.error import HTTPError
    from urllib.request import urlopen

    try:
        with urlopen(url) as answer:
            return {"gated": json.load(answer).get("gated", False)}
    except HTTPError as error:
        if error.code >= 500:  # a mirror that cannot reach the Hub, or a hub that is down
            raise
        return {"status": error.code}


def run_probe(name: str, *arguments: str, seconds: float) -> ProbeResult:
    """Run one probe in a new process, for at most `seconds`.

    Example: `run_probe("peft", seconds=20)` -> `ProbeResult(ok=True, found="a LoRA adapter was built and trained")`.
    """
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    quiet = ("-W", "ignore::RuntimeWarning:runpy")  # the package's face has loaded this module already
    command = [sys.executable, *quiet, "-m", "helpers.environment.probes", name, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return ProbeResult(False, _("no answer in {seconds:.0f} s", seconds=seconds))
    if done.returncode < 0:
        return ProbeResult(False, _("crashed ({signal})", signal=signal.Signals(-done.returncode).name))
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [_("no output")]
    return ProbeResult(True, json.loads(lines[-1])) if done.returncode == 0 else ProbeResult(False, _short(lines))


def _short(lines: list[str], *, width: int = 110) -> str:
    """The exception of a traceback in one line: the last line that is not indented and names one."""
    named = [line for line in lines if line[:1].isalpha() and ("Error" in line.split(":")[0] or ": " in line)]
    line = (named or lines)[-1]
    return line if len(line) <= width else line[: width - 1] + "…"


if __name__ == "__main__":
    gc.disable()  # a probe ends before its garbage matters, and searching while it imports takes a seventh of its time
    print(json.dumps(globals()[f"probe_{sys.argv[1]}"](*sys.argv[2:])))
    gc.freeze()  # else Python searches once more as it ends
