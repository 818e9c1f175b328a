"""What an export refuses before it writes, and what it leaves behind when it is interrupted."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.export import ExportError, check_adapter, count_parameters, hub_token, keep_gguf, list_files, plan_export
from helpers.handoff import HandoffError, open_run

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


def test_a_quantised_model_is_not_merged(saved):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved[0])
    count = base.num_parameters()
    model = PeftModel.from_pretrained(base, saved[1])
    assert count_parameters(model) == count
    model.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(ExportError, match="load_in_4bit=False"):
        count_parameters(model)


def free(monkeypatch, *, disk_gib, memory_gib):
    import psutil

    memory = collections.namedtuple("memory", "available")(memory_gib * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    usage = collections.namedtuple("usage", "free")(disk_gib * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


LLAMA_3B, LLAMA_8B = 3_212_749_824, 8_030_261_248


def test_the_prediction_follows_the_models_size(tmp_path):
    plan = plan_export(2**30, folder=tmp_path, quantization=("q8_0", "q4_k_m"))
    assert plan.rows[0] == ("merge", 2.0, 2.0, 3.5)
    assert plan.rows[1][1:3] == (pytest.approx(4 + 1.9), pytest.approx(1.9))
    assert plan.needed_disk_gib == pytest.approx(2 + 4 + 1.9)


def test_a_free_colab_vm_exports_3b_but_not_8b(tmp_path, monkeypatch):
    free(monkeypatch, disk_gib=70, memory_gib=11)
    assert plan_export(LLAMA_3B, folder=tmp_path, quantization=("q4_k_m",)).ok
    plan = plan_export(LLAMA_8B, folder=tmp_path, quantization=("q4_k_m",))
    assert not plan.ok
    with pytest.raises(ExportError, match="memory: found 11.0 GiB free, expected 16.5 GiB.*the adapter is saved"):
        plan.raise_if_failed()


def test_too_small_a_disk_is_refused_with_what_would_fit(tmp_path, monkeypatch):
    free(monkeypatch, disk_gib=8, memory_gib=50)
    with pytest.raises(ExportError, match="disk: found 8.0 GiB free, expected .*Fix: leave GGUF empty, or free some"):
        plan_export(LLAMA_3B, folder=tmp_path, quantization=("q4_k_m",)).raise_if_failed()
    plan_export(LLAMA_3B, folder=tmp_path).raise_if_failed()


def test_only_finished_gguf_files_stay(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "model_gguf").mkdir()
    for number, name in enumerate(("SmolLM2.Q8_0", "SmolLM2.Q4_K_M", "SmolLM2.BF16")):
        (tmp_path / "model_gguf" / f"{name}.gguf").write_bytes(b"x" * (9 - number))
    assert [path.name for path in keep_gguf(tmp_path, name="model")] == ["model-q8_0.gguf", "model-q4_k_m.gguf"]
    assert {name for name, _ in list_files(tmp_path).rows} == {"model-q8_0.gguf", "model-q4_k_m.gguf"}


def test_an_export_without_a_gguf_file_is_refused(tmp_path):
    (tmp_path / "SmolLM2.BF16.gguf").write_bytes(b"x")
    with pytest.raises(ExportError, match="no quantised GGUF file"):
        keep_gguf(tmp_path, name="model")


EXPORT = """
import resource, sys, time
from transformers import AutoModelForCausalLM
from helpers.handoff import open_run
run_dir, base, limit, pause = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
run = open_run(run_dir)
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
with run.write("merged", base_model="base") as folder:
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


def test_an_adapter_altered_on_disk_is_refused(saved, tmp_path):
    run = open_run(tmp_path / "run")
    with run.write("adapter", base_model="base") as folder:
        shutil.copytree(saved[1], folder)
    with open(run.path / "adapter" / "adapter_model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(HandoffError, match="adapter_model.safetensors: found sha256"):
        run.artefact("adapter")


def test_the_token_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    assert hub_token() == "from-the-environment"


def test_the_token_is_the_one_that_hf_auth_login_wrote_or_its_lack_is_said(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ExportError, match="HF_TOKEN: found no token"):
        hub_token()
    (tmp_path / "token").write_text("from-the-file\n")
    assert hub_token() == "from-the-file"


SECRET = "hf_" + "neverShowThis" * 2
# What the base model itself is sure of: rounding moves the perplexity of a text that it does not understand by more.
COUNTED = ", ".join(map(str, range(1, 13)))


@pytest.mark.slow
def test_chapter_06_in_an_awkward_folder_with_a_token_in_the_environment(tmp_path, monkeypatch, capfd):
    """The real chapter; what it writes is complete, and the token is in none of it."""
    from helpers.gguf import cached_llama_cpp
    from helpers.series import run_chapter

    if not (cached_llama_cpp() / "llama-server").exists():
        pytest.skip("llama.cpp is not built: run `make llama-cpp`")
    run_dir = make_run(tmp_path / "Größe 测试" / "mein Lauf")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("CATCH_UP", "0")
    parameters = {"PROFILE": "cpu", "RUN_DIR": str(run_dir), "GGUF": "q8_0"}
    done = run_chapter("06_save", executed_dir=run_dir / "executed", parameters=parameters)
    assert done.failure == ""
    assert "exports answer as the model in memory" in done.result
    run = open_run(run_dir)
    assert {path.name for path in run.artefact("gguf").iterdir()} == {"model-q8_0.gguf", "Modelfile"}
    assert (run.artefact("merged") / "model.safetensors").exists()
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    holding = [path for path in run_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == []
    assert str(tmp_path) not in run.artefact("README.md").read_text(encoding="utf-8")


def make_run(run_dir):
    """A run folder as chapters 02 to 04 leave it, with an adapter that changes little and was not trained."""
    import torch
    from datasets import Dataset, DatasetDict
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from helpers.smollm2 import NAME, prepare_smollm2

    run, base = open_run(run_dir), prepare_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=1, target_modules=TARGETS, init_lora_weights=False))
    question = {"role": "user", "content": f"Count from 1 to 12: {COUNTED}. Count again."}
    answer = {"role": "assistant", "content": f"{COUNTED}."}
    turns = [[question, answer], [question, answer, question, answer]]
    run.write_json("lora.json", {"lora": {"r": 4}}, base_model=NAME)
    with run.write("dataset", base_model=NAME) as folder:
        rows = Dataset.from_dict({"conversations": turns})
        DatasetDict({"train": rows, "held_out": rows}).save_to_disk(folder)
    with run.write("adapter", base_model=NAME) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    report = {"held_out_loss": {"before": 2.0, "after": 1.0}, "house_style": {}, "right_help": {}, "steps": 1}
    run.write_json("report.json", report, base_model=NAME)
    return run_dir
