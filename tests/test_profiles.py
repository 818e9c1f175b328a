"""The reader's choices: what is taken, and what is refused in one line that says what to do."""

import json
import shutil

import pytest

from helpers.base import ROOT, InputError, short_path
from helpers.environment.hub import HubError, require_hub
from helpers.profiles import ProfileError, choose_profile, choose_template, data_source, model_source
from helpers.smollm2 import prepare_smollm2

SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def test_empty_choices_mean_the_profiles_own():
    profile = choose_profile("cpu", model_name="", max_steps=None)
    assert profile == choose_profile("cpu")
    assert profile.overridden == ()


def test_choices_override_and_are_named():
    profile = choose_profile("t4", max_steps="5", learning_rate="1e-3", use_gradient_checkpointing="false")
    assert (profile.max_steps, profile.learning_rate, profile.use_gradient_checkpointing) == (5, 1e-3, False)
    assert profile.overridden == ("max_steps", "learning_rate", "use_gradient_checkpointing")
    assert "yours" in repr(profile)


def test_auto_says_why():
    assert "CUDA GPU" in choose_profile("auto").why


def test_a_run_folder_may_look_like_a_number():
    assert choose_profile("cpu", run_dir=5).run_dir.name == "5"


def test_rows_needed():
    assert choose_profile("cpu", max_steps=3, effective_batch_size=8).train_rows == 24


@pytest.mark.parametrize(
    ("name", "choices", "said"),
    [
        ("gpu", {}, "PROFILE: found 'gpu'"),
        ("cpu", {"max_steps": 0}, "MAX_STEPS: found 0, expected a whole number, 1 or more"),
        ("cpu", {"max_steps": -3}, "MAX_STEPS: found -3"),
        ("cpu", {"max_steps": 1.5}, "MAX_STEPS: found 1.5"),
        ("cpu", {"max_steps": True}, "MAX_STEPS: found True"),
        ("cpu", {"max_steps": "many"}, "MAX_STEPS: found 'many'"),
        ("cpu", {"learning_rate": "fast"}, "LEARNING_RATE: found 'fast'"),
        ("cpu", {"learning_rate": float("nan")}, "LEARNING_RATE: found nan"),
        ("cpu", {"learning_rate": 0}, "LEARNING_RATE: found 0"),
        ("cpu", {"learning_rate": "inf"}, "LEARNING_RATE: found 'inf'"),
        ("cpu", {"use_gradient_checkpointing": "maybe"}, "USE_GRADIENT_CHECKPOINTING: found 'maybe'"),
        ("cpu", {"steps": 5}, "setting: found steps"),
    ],
)
def test_bad_choices(name, choices, said):
    with pytest.raises(ProfileError) as caught:
        choose_profile(name, **choices)
    assert str(caught.value).startswith(said)
    assert "Fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ProfileError, match=r"a folder without tokenizer_config.json, \*.safetensors"):
        model_source(str(tmp_path))


def test_folder_that_is_a_model(tmp_path):
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert model_source(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "an empty file"),
        ("  \n", "an empty file"),
        ("[ ]", "an empty file"),
        (b'{"conversations": "caf\xe9"}', "a byte that is not UTF-8, at 22"),
        ("hello", "not JSON"),
        ('{"conversations": [', "not JSON"),
        ('{"text": "hello"}', "row 1"),
        ('{"conversations": "hello"}', "row 1"),
        ('{"conversations": []}', "row 1"),
        (json.dumps(SHAREGPT) + '\n{"conversations": ["hello"]}', 'row 2: found {"conversations": ["hello"]}'),
        ("[1, 2]", "row 1"),
    ],
)
def test_data_files_that_cannot_be_used(tmp_path, content, said):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProfileError) as caught:
        data_source(str(file))
    assert said in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    file = tmp_path / "transcript.jsonl"
    row = {"conversations": [{"from": "human", "value": "one\u2028two\u0085three"}]}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")  # as the chat box writes it
    assert data_source(str(file)) == {"path": "json", "data_files": str(file)}


@pytest.mark.parametrize("text", [json.dumps(SHAREGPT), json.dumps([SHAREGPT, SHAREGPT])], ids=["lines", "array"])
def test_data_file_that_can_be_used(tmp_path, text):
    file = tmp_path / "data.json"
    file.write_text(text)
    from datasets import load_dataset

    loaded = load_dataset(**data_source(str(file)), split="train", cache_dir=tmp_path / "cache")
    assert loaded[0]["conversations"] == SHAREGPT["conversations"]


@pytest.mark.parametrize("name", ["nobody/nothing", "not a name/at all"])
def test_no_hub(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError) as caught:
        require_hub(name, setting="DATASET", repo_type="dataset")
    assert str(caught.value).startswith(f"DATASET {name}: found no ")
    assert ".jsonl file" in str(caught.value)


def test_template_follows_the_model(shared_tokenizer):
    assert choose_template(shared_tokenizer("llama-3.1")).name == "llama-3.1"
    own = choose_template(shared_tokenizer("smollm2"))
    assert (own.name, own.response_part) == ("", "<|im_start|>assistant\n")


def test_template_of_an_unknown_family_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unknown = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ProfileError, match="chat template"):
        choose_template(unknown)


def test_notebooks_show_one_line_instead_of_a_traceback():
    error = InputError("here", found="this", expected="that", fix="do so")
    assert error._render_traceback_() == ["InputError: here: found this, expected that. Fix: do so."]


def test_paths_are_shown_without_the_machine():
    assert short_path(ROOT / "runs" / "cpu") == "runs/cpu"
    assert short_path("/elsewhere") == "/elsewhere"


def test_a_real_model_folder_without_weights_is_refused(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(prepare_smollm2(), copy, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ProfileError, match="safetensors"):
        model_source(str(copy))


@pytest.mark.parametrize(
    ("dataset", "name"), [("mlabonne/FineTome-100k", "mlabonne/FineTome-100k"), ("/a/b/my rows.jsonl", "my rows.jsonl")]
)
def test_a_data_set_is_recorded_without_this_machines_folders(dataset, name):
    assert choose_profile("cpu", dataset=dataset).dataset_name == name
