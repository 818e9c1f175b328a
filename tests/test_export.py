"""What an export refuses before it writes, and what it leaves behind when it is interrupted."""

import collections
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub import serve_hub

from helpers.environment.choices import GGUF_TYPES
from helpers.export.files import keep_gguf
from helpers.export.gguf import GgufError, cached_llama_cpp
from helpers.export.plan import ExportError, check_adapter, count_parameters, plan_export, predict_export
from helpers.handoff.run import HandoffError, fingerprint, open_run

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["q_proj", "down_proj"]


def save_base(folder, hidden_size=32):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_adapter(folder, base, rank=4):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=rank, target_modules=TARGETS)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(base model's folder, adapter's folder), in a folder whose name has spaces and letters of other scripts."""
    folder = tmp_path_factory.mktemp("Größe 测试 model")
    base = save_base(folder / "small base")
    return base, save_adapter(folder / "mein adapter", base)


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "adapter"))


def test_a_fitting_adapter_passes(saved):
    assert check_adapter(saved[1], saved[0]) == "8 LoRA matrices of rank 4, and each fits its weight in small base"


def test_a_quantised_edition_of_the_base_is_the_same_base(saved, adapter):
    path = adapter / "adapter_config.json"
    name = saved[0].name + "-unsloth-bnb-4bit"
    path.write_text(path.read_text().replace(json.dumps(str(saved[0]))[1:-1], name))
    assert name in check_adapter(adapter, saved[0])


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_missing_file_is_named(saved, adapter, name):
    (adapter / name).unlink()
    with pytest.raises(ExportError, match=f"{name}: found no such file.*04_train"):
        check_adapter(adapter, saved[0])


def test_an_adapter_for_another_model_is_refused(saved, tmp_path):
    other = save_base(tmp_path / "other base")
    with pytest.raises(ExportError, match="base model .*small base, expected .*other base"):
        check_adapter(saved[1], other)


def test_a_base_in_a_hubs_cache_is_known_by_its_own_name(tmp_path):
    """There every model's folder is called after its revision."""
    first, second = (tmp_path / f"me--{name}" / "snapshots" / "master" for name in ("Tiny-0.1B", "Other-0.1B"))
    adapter = save_adapter(tmp_path / "adapter", save_base(first))
    assert check_adapter(adapter, first).endswith("each fits its weight in Tiny-0.1B")
    with pytest.raises(ExportError, match="base model .*Tiny-0.1B/snapshots/master, expected .*Other-0.1B"):
        check_adapter(adapter, save_base(second))


def test_another_shape_is_refused(saved, tmp_path):
    other = save_base(tmp_path / "small base", hidden_size=64)
    with pytest.raises(ExportError, match=r"found shape \(32, 4\), expected \(64, 4\)"):
        check_adapter(saved[1], other)


def test_another_rank_is_refused(saved, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(ExportError, match=r"found shape \(4, 48\), expected \(8, 48\)"):
        check_adapter(adapter, saved[0])


def test_an_adapter_without_matrices_is_refused(saved, adapter):
    from safetensors.torch import save_file

    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="no LoRA matrices"):
        check_adapter(adapter, saved[0])


def test_parameters_are_counted_once_and_without_weights(tmp_path):
    from tests.maintain.smollm2 import prepare_smollm2

    for name in ("config.json", "generation_config.json"):  # its embedding is also its last layer
        shutil.copy(prepare_smollm2() / name, tmp_path)
    assert count_parameters(tmp_path) == 134_515_008


def test_the_allowed_types_are_known_to_unsloth_and_to_llama_cpp():
    source = Path(importlib.util.find_spec("unsloth").submodule_search_locations[0], "save.py").read_text()
    allowed = source[source.index("ALLOWED_QUANTS = {") : source.index("IMATRIX_QUANTS = {")]
    assert all(f'"{name}":' in allowed for name in GGUF_TYPES)
    program = cached_llama_cpp() / "llama-quantize"
    if not program.exists():
        pytest.skip("llama.cpp is not built: run `make llama-cpp`")
    said = subprocess.run([program], capture_output=True, text=True)
    words = (said.stdout + said.stderr).split()
    assert all(name.upper() in words for name in GGUF_TYPES)


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.fixture
def run(saved, tmp_path):
    """A run folder with the adapter."""
    run = open_run(tmp_path / "run", base_model=str(saved[0]))
    with run.write("adapter") as folder:
        shutil.copytree(saved[1], folder)
    return run


def test_the_plan_says_that_adapter_and_base_fit(run, saved):
    plan = plan_export(run, str(saved[0]))
    assert plan.ok and [row[0] for row in plan.rows] == ["merge", "reload and ask"]
    assert repr(plan).endswith("8 LoRA matrices of rank 4, and each fits its weight in small base. All in GiB.")
    assert (
        plan_export(run, str(saved[0]), gguf=()).rows[0]
        == predict_export(count_parameters(saved[0]), folder=run.path).rows[0]
    )


def test_an_adapter_that_does_not_fit_stops_the_plan(run, saved, tmp_path):
    with pytest.raises(ExportError, match=r"found shape \(32, 4\), expected \(64, 4\)"):
        plan_export(run, str(save_base(tmp_path / "small base", hidden_size=64)))


def test_the_plan_asks_for_a_token_only_where_something_is_published(run, saved, no_token, tmp_path, monkeypatch):
    assert plan_export(run, str(saved[0])).ok
    with pytest.raises(ExportError, match="HF_TOKEN: found no token, expected one to publish with.*key icon"):
        plan_export(run, str(saved[0]), push_to="me/tuned")
    (tmp_path / "token").write_text("as `hf auth login` stores it\n")
    assert plan_export(run, str(saved[0]), push_to="me/tuned").ok
    (tmp_path / "token").unlink()
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    assert plan_export(run, str(saved[0]), push_to="me/tuned").ok


def test_the_plan_asks_for_llama_cpp_only_where_gguf_files_are_written(run, saved, monkeypatch):
    def none():
        raise GgufError("llama.cpp", found="none", expected="one", fix="make it")

    monkeypatch.setattr("helpers.export.plan.require_llama_cpp", none)
    assert plan_export(run, str(saved[0])).ok
    with pytest.raises(GgufError):
        plan_export(run, str(saved[0]), gguf=["q8_0"])


def test_the_plan_counts_the_copy_on_drive(run, saved, tmp_path):
    (tmp_path / "drive").mkdir()
    mirrored = open_run(run.path, base_model=str(saved[0]), drive=tmp_path / "drive")
    assert plan_export(mirrored, str(saved[0])).needed_disk_gib == 2 * plan_export(run, str(saved[0])).needed_disk_gib


def free(monkeypatch, *, disk_gib, memory_gib, gpu_gib=None, drive_gib=None, drive=None):
    """A machine with so much free; `drive` is on a disk of its own where `drive_gib` is given."""
    import psutil
    import torch

    memory = collections.namedtuple("memory", "available")(memory_gib * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    usage, stat = collections.namedtuple("usage", "free"), os.stat
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage((drive_gib if path == drive else disk_gib) * 2**30))
    if drive_gib is not None:
        device = collections.namedtuple("stat", "st_dev")(-1)
        monkeypatch.setattr(os, "stat", lambda path, **given: device if path == drive else stat(path, **given))
    if gpu_gib is not None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gpu_gib * 2**30, 15 * 2**30))


LLAMA_1B, LLAMA_3B, LLAMA_8B = 1_235_814_400, 3_212_749_824, 8_030_261_248


def test_the_prediction_follows_the_models_size(tmp_path, monkeypatch):
    free(monkeypatch, disk_gib=70, memory_gib=11, gpu_gib=14.5)
    plan = predict_export(2**30, folder=tmp_path, quantization=("q8_0", "q4_k_m"))
    assert plan.rows[0] == ("merge", 2.0, 2.0, 3.5)
    assert plan.rows[1][1:3] == (pytest.approx(4 + 1.9), pytest.approx(1.9))
    assert plan.needed_disk_gib == pytest.approx(2 + 4 + 1.9)
    assert plan.limits["GPU memory"] == (3.0, 14.5)
    shown = repr(predict_export(LLAMA_1B, folder=tmp_path, quantization=("q4_k_m", "q8_0")))
    for numbers in ("2.30 2.30 3.80", "6.79 2.19 3.80"):  # the docstring's example
        assert numbers in " ".join(shown.split())


def test_without_a_gpu_it_counts_float32_weights(tmp_path, monkeypatch):
    """As measured: 0.75 billion parameters took 6.3 and 8.2 GiB of memory, and 5.4 GiB of disk for the GGUF files."""
    free(monkeypatch, disk_gib=70, memory_gib=20)
    plan = predict_export(748_750_000, folder=tmp_path, quantization=("q4_k_m", "q8_0"))
    assert 6.3 < plan.rows[0][3] < 8.2 and 8.2 < plan.rows[1][3] < 10.7
    assert plan.rows[1][1] == pytest.approx(5.4, rel=0.05)
    assert "GPU memory" not in plan.limits


def test_a_free_colab_vm_exports_3b_but_not_8b(tmp_path, monkeypatch):
    free(monkeypatch, disk_gib=70, memory_gib=11, gpu_gib=14.5)
    assert predict_export(LLAMA_3B, folder=tmp_path, quantization=("q4_k_m",)).ok
    plan = predict_export(LLAMA_8B, folder=tmp_path, quantization=("q4_k_m",))
    assert not plan.ok
    with pytest.raises(
        ExportError, match="memory: found 11.0 GiB free, expected 16.5 GiB.*the adapter is saved"
    ) as said:
        plan.raise_if_failed()
    assert "GGUF" not in str(said.value)  # without the GGUF files it would need no less


def test_a_gpu_that_is_too_small_is_refused(tmp_path, monkeypatch):
    free(monkeypatch, disk_gib=70, memory_gib=50, gpu_gib=6)
    with pytest.raises(ExportError, match="GPU memory: found 6.0 GiB free, expected 7.0 GiB.*restart the kernel"):
        predict_export(LLAMA_3B, folder=tmp_path).raise_if_failed()


def test_too_small_a_disk_is_refused_with_what_would_fit(tmp_path, monkeypatch):
    free(monkeypatch, disk_gib=8, memory_gib=50)
    with pytest.raises(ExportError, match="disk: found 8.0 GiB free, expected .*Fix: set GGUF to \\[\\], or free some"):
        predict_export(LLAMA_3B, folder=tmp_path, quantization=("q4_k_m",)).raise_if_failed()
    predict_export(LLAMA_3B, folder=tmp_path).raise_if_failed()


def test_the_copy_on_drive_is_counted(tmp_path, monkeypatch):
    drive = tmp_path / "drive"
    drive.mkdir()
    without = predict_export(LLAMA_3B, folder=tmp_path, quantization=("q4_k_m",))
    beside = predict_export(LLAMA_3B, folder=tmp_path, quantization=("q4_k_m",), drive=drive)
    kept = sum(row[2] for row in without.rows)
    assert beside.needed_disk_gib == pytest.approx(without.needed_disk_gib + kept) and beside.drive_gib is None
    free(monkeypatch, disk_gib=70, memory_gib=50, drive=drive, drive_gib=5)
    plan = predict_export(LLAMA_3B, folder=tmp_path, quantization=("q4_k_m",), drive=drive)
    assert plan.drive_gib == (pytest.approx(kept), 5) and plan.needed_disk_gib == without.needed_disk_gib
    with pytest.raises(ExportError, match="DRIVE_DIR: found 5.0 GiB free, expected .*leave DRIVE_DIR empty"):
        plan.raise_if_failed()


@pytest.fixture
def chat_model(shared_tokenizer):
    """What a Modelfile is read off: a tokenizer, and the ids that end a reply."""
    tokenizer = shared_tokenizer("smollm2")
    config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
    return SimpleNamespace(generation_config=config), tokenizer


def test_only_finished_gguf_files_stay(tmp_path, chat_model):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "model_gguf").mkdir()
    for number, name in enumerate(("SmolLM2.Q8_0", "SmolLM2.Q4_K_M", "SmolLM2.BF16")):
        (tmp_path / "model_gguf" / f"{name}.gguf").write_bytes(b"x" * (9 - number))
    modelfile = keep_gguf(tmp_path, ["q4_k_m", "q8_0"], *chat_model, context_tokens=512)
    assert {path.name for path in tmp_path.iterdir()} == {"model-q8_0.gguf", "model-q4_k_m.gguf", "Modelfile"}
    assert (tmp_path / "Modelfile").read_text() == modelfile and modelfile.startswith("FROM ./model-q4_k_m.gguf\n")


@pytest.mark.parametrize("present", ["BF16", "Q8_0"])
def test_an_export_without_a_gguf_file_is_refused_and_nothing_is_deleted(tmp_path, chat_model, present):
    (tmp_path / f"SmolLM2.{present}.gguf").write_bytes(b"x")
    with pytest.raises(ExportError, match="no quantised GGUF file .*q4_k_m"):
        keep_gguf(tmp_path, ["q8_0", "q4_k_m"], *chat_model, context_tokens=512)
    assert len(list(tmp_path.iterdir())) == 1


EXPORT = """
import resource, sys, time
from transformers import AutoModelForCausalLM
from helpers.handoff.run import open_run
run_dir, base, limit, pause = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
run = open_run(run_dir, base_model="base")
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
with run.write("merged") as folder:
    model.save_pretrained(folder)
    print("written", flush=True)
    time.sleep(float(pause))
"""


def export(run_dir, base, *, limit_bytes=0, pause_seconds=0):
    command = [sys.executable, "-c", EXPORT, str(run_dir), str(base), str(limit_bytes), str(pause_seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refused(run_dir):
    with pytest.raises(HandoffError, match="06_save"):
        open_run(run_dir).artefact("merged")
    return not (run_dir / "merged").exists()


def test_a_killed_export_leaves_nothing_that_looks_finished_and_can_be_run_again(saved, tmp_path):
    run_dir = tmp_path / "mein Lauf 测试"
    process = export(run_dir, saved[0], pause_seconds=60)
    while "written" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert refused(run_dir)
    assert export(run_dir, saved[0]).wait() == 0
    assert (open_run(run_dir).artefact("merged") / "model.safetensors").exists()
    assert not list(run_dir.glob(".unfinished*"))


def test_a_disk_that_fills_up_leaves_nothing(saved, tmp_path):
    process = export(tmp_path / "run", saved[0], limit_bytes=50_000)
    assert process.wait() != 0
    assert "large" in process.stderr.read()  # File too large: the quota
    assert refused(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".unfinished-merged*"))


def test_an_adapter_altered_on_disk_is_refused(run):
    with open(run.path / "adapter" / "adapter_model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(HandoffError, match="adapter_model.safetensors: found sha256"):
        run.artefact("adapter")


SECRET = "hf_" + "neverShowThis" * 2
# What the base model itself is sure of: rounding moves the perplexity of a text that it does not understand by more.
COUNTED = ", ".join(map(str, range(1, 13)))


@pytest.mark.slow
def test_chapter_06_in_an_awkward_folder_with_a_token_in_the_environment(tmp_path, monkeypatch, capfd):
    """The real chapter, publishing to a stand-in Hub; what it writes is complete, and the token is in none of it."""
    if not (cached_llama_cpp() / "llama-server").exists():
        pytest.skip("llama.cpp is not built: run `make llama-cpp`")
    run_dir = make_run(tmp_path / "Größe 测试" / "mein Lauf")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    with serve_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        done = chapter_06(run_dir, GGUF=["q8_0"], PUSH_TO="me/tuned")
    assert done.failure == ""
    assert "forms answer within their limits" in done.result
    files = hub.committed_files()
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json"} < set(files)
    assert not [name for name, content in files.items() if SECRET.encode() in content]
    assert f"{hub.url}/me/tuned/commit/1" in (run_dir / "executed" / "06_save.ipynb").read_text(encoding="utf-8")
    run = open_run(run_dir)
    assert {path.name for path in run.artefact("gguf").iterdir()} == {"model-q8_0.gguf", "Modelfile"}
    assert (run.artefact("merged") / "model.safetensors").exists()
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    holding = [path for path in run_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == []
    assert str(tmp_path) not in run.artefact("README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_chapter_06_refuses_at_once_what_it_could_not_publish(tmp_path, no_token):
    """Before the weights are loaded."""
    run_dir = make_run(tmp_path / "run")
    done = chapter_06(run_dir, GGUF=[], PUSH_TO="me/tuned")
    assert "HF_TOKEN: found no token" in done.failure
    assert not (run_dir / "merged").exists()


def chapter_06(run_dir, **choices):
    from tests.maintain.series import run_chapter
    from tests.maintain.smollm2 import prepare_smollm2

    choices |= {"MODEL_NAME": str(prepare_smollm2()), "RUN_DIR": str(run_dir), "MAX_SEQ_LENGTH": 256}
    return run_chapter("06_save", executed_dir=run_dir / "executed", parameters=choices)


def make_run(run_dir):
    """A run folder as chapters 03 and 04 leave it, with an adapter that changes little and was not trained."""
    import torch
    from datasets import Dataset, DatasetDict
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from helpers.training.held_out import held_out_losses
    from helpers.training.loaded import held_out_rows
    from tests.maintain.smollm2 import prepare_smollm2

    base = prepare_smollm2()
    run, tokenizer = open_run(run_dir, base_model=str(base)), AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=1, target_modules=TARGETS, init_lora_weights=False))
    question = {"role": "user", "content": f"Count from 1 to 12: {COUNTED}. Count again."}
    answer = {"role": "assistant", "content": f"{COUNTED}."}
    turns = [[question, answer], [question, answer, question, answer]]
    template = fingerprint(tokenizer.chat_template)
    with run.write("dataset", template=template) as folder:
        texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in turns]
        rows = Dataset.from_dict({"conversations": turns, "text": texts})
        DatasetDict({"train": rows, "held_out": rows}).save_to_disk(folder)
        tokenizer.save_pretrained(folder / "tokenizer")
    losses = held_out_losses(model, held_out_rows(run, tokenizer, None))
    with run.write("adapter", template=template) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    rows = {"training rows": "2 conversations", "held-out rows": "2 conversations"}
    by_row = {"sums": losses.sums, "tokens": losses.tokens}
    report = {"held_out_loss": {"before": 2.0, "after": 1.0, "by_row": by_row}, "steps": 1}
    report |= {"house_style": {}, "right_help": {}}
    report |= {"data": {"dataset": "counting.jsonl"} | rows, "environment": {"precision": "bfloat16"}}
    report |= {"settings": {"r": 4, "learning_rate": 1e-3}}
    run.write_json("report.json", report)
    return run_dir
