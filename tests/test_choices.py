"""The reader's choices, models and data sets: what is taken, and what is refused in one line that says what to do."""

import math
import shutil

import numpy as np
import pytest

from helpers.base import ROOT, InputError, short_path
from helpers.conversations import read_conversations
from helpers.environment import check_choices, find_model
from helpers.environment.choices import GGUF_TYPES, RULES, bare
from helpers.environment.hub import require_hub
from tests.maintain.smollm2 import prepare_smollm2

COUNTS = ("ROWS", "EVAL_ROWS", "MAX_SEQ_LENGTH", "MAX_STEPS", "MICRO_BATCH", "ACCUMULATION")
COUNTS += ("MAX_NEW_TOKENS",)
SWITCHES = ("KEEP_BEST", "PADDING_FREE", "START_AFRESH", "USE_MODELSCOPE", "LOAD_IN_4BIT")
SWITCHES += ("GROW_BATCH",)
PATHS = ("MODEL_NAME", "DATASET", "GENERAL", "REQUIREMENTS", "RUN_DIR", "DRIVE_DIR", "OUTPUT_DIR", "SCALED_DIR")

TAKEN = {
    **dict.fromkeys(COUNTS, [16, 100]),
    **dict.fromkeys(SWITCHES, [False, True]),
    "MODEL_NAME": ["unsloth/Llama-3.2-3B-Instruct", "gpt2", "models/mine", "/data/模型 1", "C:\\models\\mine"],
    "CHAT_TEMPLATE": ["llama-3.1", ""],
    "COLUMNS": ["", "messages", "question, answer", "Frage 1,Antwort"],
    "DATASET": ["mlabonne/FineTome-100k", "my rows.jsonl", "~/rows.json"],
    "CHECKPOINTING": [False, True, "unsloth"],
    "LEARNING_RATE": [2e-4, 1e-12, 1, 1.0],
    "EPOCHS": [0, 0.0, 0.5, 3, 1000],
    "GENERAL": ["rows.jsonl"],
    "HF_ENDPOINT": ["https://hf-mirror.com", "http://127.0.0.1:8080/", ""],
    "RUN_DIR": ["runs/llama", "/content/my run", "~/run", "läuft", "5", ".", "runs/a:b", "{x}"],
    "DRIVE_DIR": ["", "/content/drive/MyDrive/llama"],
    "GGUF": [[], ["q4_k_m"], ["q8_0", "q4_k_m"], list(GGUF_TYPES)],
    "PUSH_TO": ["", "me/tuned", "my-org/Llama-3.2_tuned", "m/t", "me/" + "x" * 96],
    "PUSH_FORM": ["adapter", "merged", "gguf"],
    "OUTPUT_DIR": ["quickstart"],
    "SCALED_DIR": ["runs/scaled"],
    "PROCESSES": [0, 1, 16],
    "REQUIREMENTS": ["requirements-colab.txt", "https://example.org/requirements.txt"],
}
NO_COUNT = [0, -3, 10**30, 16.0, True, False, "16", "٦٠", "1_000", "", None, math.nan, math.inf, -0.0, [16], []]
NO_SWITCH = [0, 1, "True", "false", "FALSE", "no", "", None, 1.0]
NO_FOLDER = [
    5,
    None,
    True,
    ["runs"],
    " runs",
    "gs://bucket/run",
    "s3://run",
    "C:\\run",
    "\\\\server\\run",
    "runs\\llama",
]
REFUSED = {
    **dict.fromkeys(COUNTS, NO_COUNT),
    **dict.fromkeys(SWITCHES, NO_SWITCH),
    "MODEL_NAME": ["", " gpt2", "gpt2\n", "gp\0t2", 5, None, True, ["gpt2"]],
    "CHAT_TEMPLATE": [" ", None, False, 5, "llama\n"],
    "COLUMNS": [" question", "a\0b", ",", "question,", "question,,answer", None, ["question", "answer"]],
    "DATASET": ["", " ", "rows\0.jsonl", None, ["a.jsonl", "b.jsonl"], 5],
    "CHECKPOINTING": [0, 1, "true", "Unsloth", "", None],
    "EPOCHS": [-1, -0.0, 1001, math.nan, math.inf, "1", True, None],
    "GENERAL": ["", " rows.jsonl", None],
    "LEARNING_RATE": [0, -0.0, -1e-4, 1.1, 10**400, math.nan, math.inf, "2e-4", True, None],
    "HF_ENDPOINT": [
        None,
        " https://hf-mirror.com",
        "hf-mirror.com",
        "ftp://hf-mirror.com",
        "/",
        "https://a b",
        5,
        False,
    ],
    "RUN_DIR": [*NO_FOLDER, ""],
    "DRIVE_DIR": [*NO_FOLDER, " "],
    "GGUF": [
        "",
        "q8_0",
        None,
        ["q8_0", "q8_0"],
        ["f16"],
        ["iq2_xxs"],
        ["Q8_0"],
        ["q8_0", ""],
        [8],
        [["q8_0"]],
        ("q8_0",),
    ],
    "PUSH_TO": ["tuned", "me/", "/tuned", "me/tuned/more", "me/my model", "me/tuned\n", "me/" + "x" * 97, None, True]
    + ["../tuned", "me/..", "-me/tuned", "me/tuned.", "me/a--b", "me/a..b", "me/tuned.git", "me/٦٠"],
    "PUSH_FORM": ["", "lora", "Adapter", None, ["adapter"]],
    "OUTPUT_DIR": [*NO_FOLDER, ""],
    "SCALED_DIR": [*NO_FOLDER, ""],
    "PROCESSES": [-1, 1.0, True, "2", None, 1025],
    "REQUIREMENTS": ["", 5, None, "a\0b"],
}
NOT_SEEN = [
    "a\0b",
    "a\nb",
    "a\rb",
    "a\tb",
    "a ",
    "a\u200bb",
    "a\u202eb",
    "a\u2066b",
    "\ufeffa",
    "a\u2028b",
    "\ud800",
    "a\x1b[31m",
]


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


@pytest.mark.parametrize("value", NOT_SEEN, ids=ascii)
@pytest.mark.parametrize("name", [*PATHS, "CHAT_TEMPLATE", "COLUMNS", "HF_ENDPOINT", "PUSH_TO"])
def test_characters_that_are_not_seen_are_refused_and_said_as_their_codes(name, value):
    with pytest.raises(InputError) as caught:
        check_choices({name: value})
    assert ascii(value) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("taken", "refused"),
    [
        ("x" * 255, "x" * 256),
        ("é" * 127, "é" * 128),
        ("abc/" * 249, "abc/" * 250),
        ("é/" * 333, "é/" * 334),
        ("./~nobody-here/x", "~nobody-here/x"),
        ("~", "~nobody-here"),
        ("~root/x", "~roots/x"),
    ],
    ids=lambda path: ascii(path)[:20],
)
def test_a_path_is_one_that_the_system_takes(name, taken, refused):
    check_choices({name: taken})
    with pytest.raises(InputError, match=f"^{name}: found '.*, expected "):
        check_choices({name: refused})


class Unsayable:
    """Nothing can be done with it: shown, compared, hashed or measured."""

    def _refuse(self, *_):
        raise RuntimeError("no")

    __repr__ = __eq__ = __len__ = __iter__ = _refuse
    __hash__ = None


class UnsayableText(str):
    isprintable = strip = __repr__ = __eq__ = Unsayable._refuse
    __hash__ = str.__hash__


class UnsayableNumber(int):
    __le__ = __ge__ = __lt__ = __gt__ = __repr__ = Unsayable._refuse


class SeveralLines:
    def __repr__(self):
        return "several\nlines \u202e" + "x" * 10**6


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ODD = {
    "no repr": Unsayable(),
    "lines": SeveralLines(),
    "text": UnsayableText("a"),
    "number": UnsayableNumber(16),
    "huge number": 10**5000,
    "long": "x" * 10**6,
    "deep": nested(5000),
    "wide": ["q8_0"] * 10**5,
    "array": np.array(["q8_0", "q4_0"]),
    "dictionary": {"q8_0": "x" * 10**6},
    "set": {16},
    "bytes": b"runs",
    "complex": 16j,
    "function": print,
}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", RULES)
def test_values_of_any_type_are_one_short_line(name, value):
    with pytest.raises(InputError) as caught:
        check_choices({name: value})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_password_in_an_address_is_not_said():
    for name in ("HF_ENDPOINT", "RUN_DIR"):
        with pytest.raises(InputError, match="found 'https://…@example.org") as caught:
            check_choices({name: "https://me:secret" + "x" * 100 + "@example.org"})
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("name", "said"), [("STEP", "STEP"), ("", "''"), (" ", "' '"), ("A\nB", r"'A\nB'")])
def test_a_name_is_said_as_it_stands_where_it_can_be_seen(name, said):
    assert bare(name) == said and len(bare("x" * 1000)) < 120


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
