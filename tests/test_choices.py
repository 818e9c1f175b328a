"""The reader's choices, models and data sets: what is taken, and what is refused in one line that says what to do."""

import math
import shutil

import pytest

from helpers.base import ROOT, InputError, short_path
from helpers.conversations import read_conversations
from helpers.environment import check_choices, find_model
from helpers.environment.choices import GGUF_TYPES, RULES
from helpers.environment.hub import require_hub
from tests.maintain.smollm2 import prepare_smollm2

COUNTS = ("ROWS", "EVAL_ROWS", "MAX_SEQ_LENGTH", "MAX_STEPS", "MICRO_BATCH", "ACCUMULATION")
COUNTS += ("MAX_NEW_TOKENS",)
SWITCHES = ("KEEP_BEST", "PADDING_FREE", "START_AFRESH", "USE_MODELSCOPE")

TAKEN = {
    **dict.fromkeys(COUNTS, [16, 100]),
    **dict.fromkeys(SWITCHES, [False, True]),
    "MODEL_NAME": ["unsloth/Llama-3.2-3B-Instruct", "gpt2", "models/mine", "/data/模型 1", "C:\\models\\mine"],
    "CHAT_TEMPLATE": ["llama-3.1", ""],
    "COLUMNS": ["", "messages", "question, answer"],
    "DATASET": ["mlabonne/FineTome-100k", "my rows.jsonl", "~/rows.json"],
    "CHECKPOINTING": [False, True, "unsloth"],
    "LEARNING_RATE": [2e-4, 1e-12, 1, 1.0],
    "EPOCHS": [0, 0.5, 3, 1000],
    "GENERAL": ["rows.jsonl"],
    "HF_ENDPOINT": ["https://hf-mirror.com", ""],
    "RUN_DIR": ["runs/llama", "/content/my run", "~/run", "läuft", "5", "."],
    "DRIVE_DIR": ["", "/content/drive/MyDrive/llama"],
    "GGUF": [[], ["q4_k_m"], ["q8_0", "q4_k_m"], list(GGUF_TYPES)],
    "PUSH_TO": ["", "me/tuned", "my-org/Llama-3.2_tuned"],
    "PUSH_FORM": ["adapter", "merged", "gguf"],
}
NO_COUNT = [0, -3, 10**30, 16.0, True, False, "16", "", None, math.nan, [16]]
NO_SWITCH = [0, 1, "True", "false", "", None, 1.0]
NO_FOLDER = [5, None, True, " runs", "runs ", "runs\n", "ru\0ns", "gs://bucket/run", "s3://run", "C:\\run", "a/" * 500]
REFUSED = {
    **dict.fromkeys(COUNTS, NO_COUNT),
    **dict.fromkeys(SWITCHES, NO_SWITCH),
    "MODEL_NAME": ["", " gpt2", "gpt2\n", "gp\0t2", 5, None, True, ["gpt2"]],
    "CHAT_TEMPLATE": [" ", None, False, 5, "llama\n"],
    "COLUMNS": [" question", "a\0b", None, ["question", "answer"]],
    "DATASET": ["", " ", "rows\0.jsonl", None, ["a.jsonl", "b.jsonl"], 5],
    "CHECKPOINTING": [0, 1, "true", "Unsloth", "", None],
    "EPOCHS": [-1, 1001, math.nan, math.inf, "1", True, None],
    "GENERAL": ["", " rows.jsonl", None],
    "LEARNING_RATE": [0, -1e-4, 1.1, 10**400, math.nan, math.inf, "2e-4", True, None],
    "HF_ENDPOINT": [None, " https://hf-mirror.com", 5, False],
    "RUN_DIR": [*NO_FOLDER, ""],
    "DRIVE_DIR": [*NO_FOLDER, " "],
    "GGUF": ["", "q8_0", None, ["f16"], ["iq2_xxs"], ["Q8_0"], ["q8_0", ""], [8], [["q8_0"]], ("q8_0",)],
    "PUSH_TO": ["tuned", "me/", "/tuned", "me/tuned/more", "me/my model", "me/tuned\n", "me/" + "x" * 97, None, True],
    "PUSH_FORM": ["", "lora", "Adapter", None, ["adapter"]],
}


def pairs(cases):
    return [pytest.param(name, value, id=f"{name}-{str(value)[:20]!r}") for name in cases for value in cases[name]]


def test_every_rule_has_values_to_take_and_to_refuse():
    assert set(TAKEN) == set(REFUSED) == set(RULES)


@pytest.mark.parametrize(("name", "value"), pairs(TAKEN))
def test_values_that_are_taken(name, value):
    check_choices({name: value})


@pytest.mark.parametrize(("name", "value"), pairs(REFUSED))
def test_values_that_are_refused(name, value):
    with pytest.raises(InputError) as caught:
        check_choices({name: value})
    said = str(caught.value)
    assert said.startswith(f"{name}: found ") and f", expected {RULES[name].expected}. Fix: " in said
    assert said.isprintable() and len(said) < 400


@pytest.mark.parametrize(
    ("name", "smallest", "largest"),
    [
        ("ROWS", 5, 10_000_000),
        ("EVAL_ROWS", 1, 100_000),
        ("MAX_SEQ_LENGTH", 16, 131_072),
        ("MAX_STEPS", 1, 1_000_000),
        ("MICRO_BATCH", 1, 1_024),
        ("ACCUMULATION", 1, 1_024),
        ("MAX_NEW_TOKENS", 1, 8_192),
    ],
)
def test_a_whole_number_has_its_bounds(name, smallest, largest):
    check_choices({name: smallest})
    check_choices({name: largest})
    for value in (smallest - 1, largest + 1):
        with pytest.raises(InputError, match=f"{name}: found {value}, expected a whole number from {smallest:,} to"):
            check_choices({name: value})


def test_names_without_a_rule_are_passed_over_and_choices_that_are_not_there_too():
    check_choices({"os": None, "max_steps": -1, "MAX_STEPS": 1})
    check_choices({})


def test_of_several_faults_one_is_said():
    with pytest.raises(InputError, match="^MAX_STEPS: found 0, expected .* Fix: correct MAX_STEPS in Choices.$"):
        check_choices({"PUSH_FORM": 5, "MAX_STEPS": 0, "GGUF": 5})


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"MODEL_NAME .*: found a folder without tokenizer_config.json, \*.safetensors"
    ):
        find_model(str(tmp_path))


def test_a_folder_that_is_a_model_is_found_from_here(tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert find_model(str(tmp_path)) == str(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert find_model(tmp_path.name) == find_model(f"~/{tmp_path.name}") == str(tmp_path)


def test_a_real_model_folder_without_weights_is_refused(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(prepare_smollm2(), copy, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="safetensors"):
        find_model(str(copy))


@pytest.mark.parametrize("name", ["models/mine/deeper", "~nobody-here/model", "x" * 300])
def test_a_name_that_is_neither_a_folder_nor_one_of_the_hub_is_one_line(name):
    with pytest.raises(
        InputError, match=f"MODEL_NAME {name}: found no such folder, expected a folder with a model"
    ) as no:
        find_model(name)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("name", ["nobody/nothing", "not a name/at all"])
def test_no_hub(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for ask in (read_conversations, lambda name: require_hub(name, setting="DATASET", repo_type="dataset")):
        with pytest.raises(InputError) as caught:
            ask(name)
        assert str(caught.value).startswith(f"DATASET {name}: found no ")
        assert ".jsonl" in str(caught.value)


def test_notebooks_show_one_line_instead_of_a_traceback():
    error = InputError("here", found="this", expected="that", fix="do so")
    assert error._render_traceback_() == ["InputError: here: found this, expected that. Fix: do so."]


def test_paths_are_shown_without_the_machine():
    assert short_path(ROOT / "runs" / "cpu") == "runs/cpu"
    assert short_path("/elsewhere") == "/elsewhere"
