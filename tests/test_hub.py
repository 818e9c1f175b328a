"""Readers behind a slow or closed network: a mirror, ModelScope, or a folder; and what is refused on the way.

The servers are stand-ins on this machine. The clients that ask them are the real ones, in processes of their own where
they read the address once, when they are imported.
"""

import ast
import json
import os
import re
import subprocess
import sys
import time

import pytest
from hub import serve_hub, serve_modelscope, serve_silence
from train_once import shallow_smollm2

from helpers.base import ROOT, InputError, sha256_of
from helpers.environment.hub import (
    HUB_SECONDS,
    HUGGING_FACE,
    base_name,
    choose_hub,
    download_from_modelscope,
    hide_token,
    missing_files,
    model_url,
    models_address,
    read_endpoint,
)
from helpers.environment.models import find_model
from helpers.environment.preflight import check_hub

MIRROR = "https://hf-mirror.com"
NAME = "me/Tiny-0.1B"
CHAPTERS = sorted((ROOT / "notebooks" / "src").glob("0[1-9]_*.py"))
NETWORK = ("HF_", "HUGGING", "MODELSCOPE", "UNSLOTH_USE", "TRANSFORMERS_OFFLINE")  # what the environment says of hubs


def run_code(code, *, folder, timeout=300, options=(), **environment):
    """Run code as a chapter's fresh kernel would, with nothing known of any hub but what is given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NETWORK)}
    kept |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT), "UNSLOTH_DISABLE_STATISTICS": "1"}
    kept |= {"HF_HOME": str(folder / "huggingface"), "MODELSCOPE_CACHE": str(folder / "modelscope"), **environment}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=timeout)


def last_line(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def environment(monkeypatch):
    """No choice made, here or before, and the Hub's client not loaded."""
    for name in ("HF_ENDPOINT", "UNSLOTH_USE_MODELSCOPE", "HF_HUB_OFFLINE", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)
    monkeypatch.setattr("helpers.environment.hub._choices", {})
    monkeypatch.setattr("modelscope_hub.config._default_config", None)
    return monkeypatch


# The choice


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("", ""),
        (None, ""),
        (" ", ""),
        ("https://hf-mirror.com", MIRROR),
        (" https://hf-mirror.com/ ", MIRROR),
        ("http://127.0.0.1:8080//", "http://127.0.0.1:8080"),
        (
            "https://proxy.example/artifactory/api/huggingfaceml/hub/",
            "https://proxy.example/artifactory/api/huggingfaceml/hub",
        ),
    ],
)
def test_addresses_that_can_be_used(endpoint, address):
    assert read_endpoint(endpoint) == address


@pytest.mark.parametrize(
    "endpoint",
    [
        "hf-mirror.com",
        "ftp://hf-mirror.com",
        "https://",
        "https:///models",
        "https://hf-mirror.com:port",
        "http://[::1",
        "https://hf mirror.com",
        "https://hf-mirror.com?token=1",
        "/data/models",
        5,
        True,
    ],
)
def test_addresses_that_are_refused(endpoint, environment):
    with pytest.raises(InputError) as caught:
        choose_hub(endpoint)
    assert str(caught.value).startswith(f"HF_ENDPOINT: found {endpoint!r}, expected an address such as {MIRROR}")
    assert "\n" not in str(caught.value) and "HF_ENDPOINT" not in os.environ


def test_an_address_with_a_password_is_refused_and_not_shown(environment):
    with pytest.raises(InputError) as caught:
        choose_hub("https://me:secret@hf-mirror.com")
    assert "secret" not in str(caught.value)


def test_without_a_choice_nothing_is_changed_or_said(environment, capsys):
    choose_hub("", modelscope=False)
    assert "HF_ENDPOINT" not in os.environ and "UNSLOTH_USE_MODELSCOPE" not in os.environ
    environment.setenv("HF_ENDPOINT", "https://own.example/")
    environment.setenv("UNSLOTH_USE_MODELSCOPE", "1")
    choose_hub("", modelscope=False)
    assert (os.environ["HF_ENDPOINT"], os.environ["UNSLOTH_USE_MODELSCOPE"]) == ("https://own.example/", "1")
    assert capsys.readouterr().out == ""


def test_a_choice_is_set_and_said(environment, capsys):
    choose_hub(MIRROR + "/")
    assert os.environ["HF_ENDPOINT"] == MIRROR
    assert capsys.readouterr().out == f"Models and data sets come from {MIRROR}.\n"
    choose_hub(MIRROR, modelscope=True)
    assert os.environ["UNSLOTH_USE_MODELSCOPE"] == "1"
    assert capsys.readouterr().out == f"Models come from ModelScope, data sets from {MIRROR}.\n"
    choose_hub("", modelscope=True)
    assert capsys.readouterr().out == f"Models come from ModelScope, data sets from {HUGGING_FACE}.\n"


def test_a_choice_that_is_taken_back_leaves_the_environments_own(environment):
    choose_hub(MIRROR, modelscope=True)
    choose_hub("https://other.example", modelscope=True)
    choose_hub("", modelscope=False)
    assert "HF_ENDPOINT" not in os.environ and "UNSLOTH_USE_MODELSCOPE" not in os.environ
    environment.setenv("HF_ENDPOINT", "https://own.example")
    choose_hub(MIRROR)
    choose_hub("")
    assert os.environ["HF_ENDPOINT"] == "https://own.example"


def test_a_choice_that_comes_too_late_is_refused_and_changes_nothing(tmp_path):
    code = (
        "import json, os, huggingface_hub.constants\nfrom helpers.environment.hub import choose_hub\n"
        "choose_hub(''), choose_hub('https://own.example/')\n"
        f"try: choose_hub('{MIRROR}')\nexcept ValueError as error: said = str(error)\n"
        "print(json.dumps([said, os.environ['HF_ENDPOINT']]))"
    )
    said, endpoint = last_line(run_code(code, folder=tmp_path, HF_ENDPOINT="https://own.example"))
    assert said == (
        f"HF_ENDPOINT: found huggingface_hub loaded with https://own.example, expected {MIRROR} before it is loaded. "
        "Fix: restart the session, then run the notebook from the top."
    )
    assert endpoint == "https://own.example"


def test_the_choice_needs_the_standard_library_alone_and_modelscope_its_package(tmp_path):
    """`-S`: a Python without any installed package."""
    code = f"from helpers.environment.hub import choose_hub\nchoose_hub('{MIRROR}')\nchoose_hub('', modelscope=True)"
    done = run_code(code, folder=tmp_path, options=["-S"])
    assert done.stdout == f"Models and data sets come from {MIRROR}.\n"
    assert "USE_MODELSCOPE: found no package modelscope, expected ModelScope's client" in done.stderr
    assert "Fix: run `%pip install modelscope` in a new cell, then this cell again." in done.stderr
    (tmp_path / "modelscope").mkdir()
    (tmp_path / "modelscope" / "__init__.py").touch()  # as before 1.38: without the package modelscope_hub
    done = run_code(code, folder=tmp_path, options=["-S"], PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert "Fix: run `%pip install -U modelscope` in a new cell" in done.stderr


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_each_chapter_chooses_the_hub_before_anything_else(chapter):
    cells = chapter.read_text(encoding="utf-8").split("\n# %%")
    number = next(number for number, cell in enumerate(cells) if 'tags=["parameters"]' in cell)
    assert 'HF_ENDPOINT = ""  # @param {type:"string"}\n' in cells[number]
    assert 'USE_MODELSCOPE = False  # @param {type:"boolean"}\n' in cells[number]
    code = next(cell for cell in cells[number + 1 :] if not cell.startswith(" [markdown]"))
    statements = ast.parse("#" + code).body
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {node.module.partition(".")[0] for node in imports} == {"helpers"}
    checked, chosen = map(ast.unparse, statements[len(imports) :][:2])
    assert checked == "check_choices(globals())"
    assert re.match(r"\w+ = (find_model|check_environment)\(MODEL_NAME, ", chosen)
    assert "endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE" in chosen


def test_what_the_chapters_import_before_the_choice_loads_no_hubs_client(tmp_path):
    code = (
        "import json, sys\nfrom helpers import conversations, environment, handoff\n"
        "heavy = {'huggingface_hub', 'transformers', 'datasets', 'unsloth', 'torch'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    assert last_line(run_code(code, folder=tmp_path)) == []


# What is asked


def test_the_address_that_is_asked(environment):
    assert (models_address(), model_url(NAME)) == (HUGGING_FACE, f"{HUGGING_FACE}/api/models/{NAME}")
    environment.setenv("HF_ENDPOINT", MIRROR + "/")
    assert model_url("not a name/at all") == f"{MIRROR}/api/models/not%20a%20name/at%20all"


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "https://modelscope.cn"),
        ({"MODELSCOPE_DOMAIN": "www.modelscope.ai"}, "https://www.modelscope.ai"),
        ({"MODELSCOPE_DOMAIN": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
        ({"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9/", "MODELSCOPE_DOMAIN": "x.example"}, "http://127.0.0.1:9"),
    ],
)
@pytest.mark.filterwarnings("ignore:Environment variable MODELSCOPE_DOMAIN is deprecated")
def test_modelscopes_address_is_what_its_client_says(variables, address, environment):
    environment.setenv("UNSLOTH_USE_MODELSCOPE", "1")
    environment.setenv("HF_ENDPOINT", MIRROR)
    for name, value in variables.items():
        environment.setenv(name, value)
    assert model_url(NAME) == f"{address}/api/v1/models/{NAME}"


def test_a_models_name_is_found_in_a_caches_folder_too():
    assert base_name("/cache/models/unsloth--Llama-3.2-3B-Instruct/snapshots/master") == "Llama-3.2-3B-Instruct"
    assert (
        base_name("unsloth/Llama-3.2-3B-Instruct")
        == base_name("/data/Llama-3.2-3B-Instruct")
        == "Llama-3.2-3B-Instruct"
    )


def test_a_folder_lacks_every_file_that_its_index_names(tmp_path):
    (tmp_path / "config.json").touch()
    assert missing_files(tmp_path) == ["tokenizer_config.json", "*.safetensors"]
    assert missing_files(tmp_path, weights=False) == ["tokenizer_config.json"]
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in ("tokenizer_config.json", shards["a"]):
        (tmp_path / name).touch()
    assert missing_files(tmp_path) == [shards["b"]]
    with pytest.raises(InputError, match="a folder without model-00002-of-00002.safetensors"):
        find_model(str(tmp_path))


# The preflight's row


@pytest.fixture
def tiny(tmp_path):
    """A folder that can be listed and downloaded; nothing in it is read by the tests that take it."""
    folder = tmp_path / "tiny"
    (folder / "original").mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    for name in ("model.safetensors", "original/consolidated.00.pth", "model.gguf"):
        (folder / name).write_bytes(os.urandom(1000))
    return folder


def test_the_preflight_asks_the_mirror_and_shows_its_address(environment, tiny):
    with serve_hub({NAME: tiny}) as mirror:
        environment.setenv("HF_ENDPOINT", mirror.url)
        hub, token = check_hub(NAME)
        assert (hub.what, hub.found, hub.verdict) == ("Hub", f"reached at {mirror.url}", "ok")
        assert (token.verdict, token.found) == ("ok", f"not needed for {NAME}")
        assert check_hub("me/nothing")[1].verdict == "warn"
    assert mirror.paths() == [f"/api/models/{NAME}", "/api/models/me/nothing"]


def test_the_preflight_asks_modelscope_and_shows_its_address(environment, tiny):
    with serve_modelscope({NAME: tiny}) as modelscope, serve_silence() as mirror:
        environment.setenv("UNSLOTH_USE_MODELSCOPE", "1")
        environment.setenv("MODELSCOPE_ENDPOINT", modelscope.url)
        environment.setenv("HF_ENDPOINT", mirror.url)
        environment.setenv("HF_HUB_OFFLINE", "1")  # says nothing of ModelScope
        hub, model = check_hub(NAME)
        assert (hub.what, hub.found, hub.verdict) == ("ModelScope", f"reached at {modelscope.url}", "ok")
        assert (model.found, model.expected, model.verdict) == ("there", NAME, "ok")
        model = check_hub("me/nothing")[1]
        assert model.verdict == "warn" and model.found == f"{modelscope.url} does not show it (status 404)"
        assert mirror.connections == []


@pytest.mark.parametrize(
    ("variables", "fix"),
    [
        (
            ("HF_ENDPOINT",),
            "connect to the network, correct HF_ENDPOINT or leave it empty, or set MODEL_NAME to a folder",
        ),
        (
            ("MODELSCOPE_ENDPOINT", "UNSLOTH_USE_MODELSCOPE"),
            "connect to the network, set USE_MODELSCOPE to False, or set",
        ),
    ],
)
def test_an_address_that_does_not_answer_is_a_failed_row_in_time(variables, fix, environment):
    with serve_silence() as server:
        for name in variables:
            environment.setenv(name, "1" if name.startswith("UNSLOTH") else server.url)
        start = time.monotonic()
        [row] = check_hub(NAME)
        assert time.monotonic() - start < HUB_SECONDS + 2
        assert (row.found, row.verdict) == (f"{server.url}: no answer in {HUB_SECONDS} s", "fail")
        assert row.fix.startswith(fix) and len(server.connections) == 1


def test_without_a_mirror_the_row_names_one_as_a_way_out(environment):
    from helpers.environment.hub import no_answer_fix

    assert "set HF_ENDPOINT to a mirror" in no_answer_fix("give a folder")


def test_a_mirror_that_cannot_reach_the_hub_itself_is_a_failed_row(environment):
    from http.server import BaseHTTPRequestHandler

    from hub import Server, serving

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, the base class's name
            self.send_error(502)

        def log_message(self, *arguments):
            """Say nothing."""

    with serving(Server(Broken)) as server:
        environment.setenv("HF_ENDPOINT", server.url)
        [row] = check_hub(NAME)
    assert row.verdict == "fail" and "502" in row.found


def test_a_missing_package_modelscope_is_a_failed_row_also_for_a_model_on_this_machine(environment):
    environment.setenv("UNSLOTH_USE_MODELSCOPE", "1")
    assert [row.verdict for row in check_hub(None)] == ["ok"]
    environment.setitem(sys.modules, "modelscope", None)  # Python's own way to say that it cannot be imported
    for model_name in (None, NAME):
        [row] = check_hub(model_name)
        assert (row.what, row.found, row.verdict) == ("ModelScope", "no package modelscope", "fail")
        assert "%pip install modelscope" in row.fix
    with pytest.raises(InputError, match="%pip install modelscope"):
        find_model(NAME)


# Downloads


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """SmolLM2 with two layers: its tokenizer is whole, and Unsloth loads it in a few seconds."""
    folder = tmp_path_factory.mktemp("models") / "small"
    shallow_smollm2(folder, layers=2)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"the weights in another format")
    return folder


LOAD = """
import json
from helpers.environment import find_model
source = find_model({name!r}, endpoint={endpoint!r}, modelscope={modelscope!r}, weights=False)
from unsloth import FastLanguageModel
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(source)
weights = find_model({name!r}, endpoint={endpoint!r}, modelscope={modelscope!r})
model, _ = FastLanguageModel.from_pretrained(model_name=weights, max_seq_length=64, dtype=None, load_in_4bit=True)
print(json.dumps([source, weights, len(tokenizer), model.config.num_hidden_layers]))
"""


@pytest.mark.slow
def test_a_mirror_gives_tokenizer_and_model_and_the_hub_itself_is_not_asked(small_model, tmp_path):
    """Unsloth's own loader, which looks at a repository in more ways than Transformers does."""
    with serve_hub({NAME: small_model}) as mirror:
        code = LOAD.format(endpoint=mirror.url + "/", modelscope=False, name=NAME)
        done = run_code(code, folder=tmp_path, HTTPS_PROXY="http://127.0.0.1:9")  # no way to anything but the mirror
        source, weights, words, layers = last_line(done)
    assert f"Models and data sets come from {mirror.url}." in done.stdout
    assert (source, weights, words, layers) == (NAME, NAME, 49152, 2)
    assert any(path.endswith("/model.safetensors") for path in mirror.paths())
    [downloaded] = (tmp_path / "huggingface").rglob("model.safetensors")
    assert sha256_of(downloaded) == sha256_of(small_model / "model.safetensors")


ROWS = """
import json
from helpers.environment.hub import choose_hub
choose_hub({endpoint!r})
from helpers.conversations import read_conversations
print(json.dumps(read_conversations("me/rows", rows=3)[0]["conversations"][:]))
"""


def test_a_mirror_gives_a_data_set(tmp_path):
    rows = [[{"from": "human", "value": f"What is {n}?"}, {"from": "gpt", "value": "A number."}] for n in range(5)]
    (tmp_path / "rows").mkdir()
    lines = [json.dumps({"conversations": row}) + "\n" for row in rows]
    (tmp_path / "rows" / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    with serve_hub({"datasets/me/rows": tmp_path / "rows"}) as mirror:
        done = run_code(ROWS.format(endpoint=mirror.url), folder=tmp_path, HTTPS_PROXY="http://127.0.0.1:9")
    answer = {"role": "assistant", "content": "A number."}
    assert last_line(done) == [[{"role": "user", "content": f"What is {n}?"}, answer] for n in range(3)]


@pytest.mark.slow
def test_modelscope_gives_tokenizer_and_model_and_no_hub_is_asked(small_model, tmp_path):
    with serve_modelscope({NAME: small_model}) as modelscope, serve_silence() as mirror:
        code = LOAD.format(endpoint=mirror.url, modelscope=True, name=NAME)
        source, weights, words, layers = last_line(
            run_code(code, folder=tmp_path, MODELSCOPE_ENDPOINT=modelscope.url, HTTPS_PROXY=mirror.url)
        )
        assert mirror.connections == []
    folder = tmp_path / "modelscope" / "models" / "me--Tiny-0.1B" / "snapshots" / "master"
    assert source == weights == str(folder)
    assert (words, layers) == (49152, 2)
    files = [path.rpartition("FilePath=")[2] for path in modelscope.paths() if "FilePath=" in path]
    assert (
        files.index("model.safetensors") == len(files) - 1
    )  # the tokenizer was there before the weights were asked for
    assert len(files) == len(set(files)) and not any("consolidated" in file for file in files)
    assert sha256_of(folder / "model.safetensors") == sha256_of(small_model / "model.safetensors")


def test_modelscopes_client_downloads_what_is_loaded_and_nothing_else(environment, tiny, tmp_path):
    environment.setenv("UNSLOTH_USE_MODELSCOPE", "1")
    environment.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    with serve_modelscope({NAME: tiny}) as modelscope:
        environment.setenv("MODELSCOPE_ENDPOINT", modelscope.url)
        folder = find_model(NAME, weights=False)
        assert names_in(folder) == {"config.json", "tokenizer_config.json"}
        assert find_model(NAME) == folder
        assert names_in(folder) == {"config.json", "tokenizer_config.json", "model.safetensors"}
        with pytest.raises(InputError, match="MODEL_NAME me/nothing: found no such model on ModelScope") as caught:
            find_model("me/nothing")
        assert "\n" not in str(caught.value)
    assert find_model(NAME) == folder  # without the server: the copy that is here is whole
    (tmp_path / "cache" / "models" / "me--Tiny-0.1B" / "snapshots" / "master" / "model.safetensors").unlink()
    assert find_model(NAME, weights=False) == folder
    with pytest.raises(
        InputError, match=rf"found no answer from {modelscope.url} \(.*refused.*expected a model that can"
    ):
        find_model(NAME)


def names_in(folder):
    return {name for _, _, files in os.walk(folder) for name in files}


@pytest.mark.parametrize("status", [401, 403, 500])
def test_modelscopes_other_answers_are_one_line_too(status, environment, tmp_path):
    from hub import ModelScopeHandler, Server, serving

    class Refusing(ModelScopeHandler):
        def do_GET(self):  # noqa: N802, the base class's name
            if "/repo/files" in self.path:
                self.answer(status, {"Code": status, "Message": "no"})
            else:
                self.answer(200, {"Code": 200, "Data": {}})

    environment.setenv("UNSLOTH_USE_MODELSCOPE", "1")
    environment.setenv("MODELSCOPE_CACHE", str(tmp_path))
    with serving(Server(Refusing)) as server:
        environment.setenv("MODELSCOPE_ENDPOINT", server.url)
        with pytest.raises(InputError) as caught:
            download_from_modelscope(NAME)
    said = "a download that did not come to its end" if status == 500 else "a model that needs a token"
    assert str(caught.value).startswith(f"MODEL_NAME {NAME}: found {said}") and "\n" not in str(caught.value)


ASK = """
import json
from helpers.conversations import read_conversations
from helpers.environment import find_model
said = []
for ask in (lambda name: find_model(name, endpoint={endpoint!r}), read_conversations):
    try:
        said.append(ask({name!r}))
    except ValueError as error:
        said.append(f"{{type(error).__name__}}: {{error}}")
print(json.dumps(said))
"""


def test_what_a_mirror_does_not_have_is_one_line(tmp_path):
    with serve_hub() as mirror:
        model, data = last_line(run_code(ASK.format(endpoint=mirror.url, name=NAME), folder=tmp_path))
    assert model.startswith(
        f"InputError: MODEL_NAME {NAME}: found no such repository at {mirror.url}, expected a model"
    )
    assert data.startswith(f"InputError: DATASET {NAME}: found no such repository at {mirror.url}, expected a data set")


def test_a_mirror_that_never_answers_is_one_line_in_time(tmp_path):
    with serve_silence() as mirror:
        start = time.monotonic()
        model, data = last_line(run_code(ASK.format(endpoint=mirror.url, name=NAME), folder=tmp_path))
        assert time.monotonic() - start < 2 * HUB_SECONDS + 20  # the client and its imports
        assert mirror.connections
    assert model.startswith(f"InputError: MODEL_NAME {NAME}: found no answer from {mirror.url} (")
    fix = "connect to the network, correct HF_ENDPOINT or leave it empty, or set MODEL_NAME to a folder with a model"
    assert model.endswith(f" Fix: {fix}.")
    assert data.startswith(f"InputError: DATASET {NAME}: found no answer from {mirror.url} (")


def test_modelscope_that_never_answers_is_one_line_in_time(environment, tmp_path):
    environment.setenv("UNSLOTH_USE_MODELSCOPE", "1")
    environment.setenv("MODELSCOPE_CACHE", str(tmp_path))
    with serve_silence() as server:
        environment.setenv("MODELSCOPE_ENDPOINT", server.url)
        start = time.monotonic()
        with pytest.raises(InputError, match=f"found no answer from {server.url} .no answer in {HUB_SECONDS} s"):
            find_model(NAME)
        assert time.monotonic() - start < HUB_SECONDS + 15  # the import of its client


# Offline


OFFLINE = """
import json
from helpers.environment import find_model
source = find_model({folder!r}, endpoint={endpoint!r})
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=source, max_seq_length=256, dtype=None, load_in_4bit=True
)
print(json.dumps([source, model.config.num_hidden_layers, len(tokenizer)]))
"""


@pytest.mark.slow
def test_a_model_in_a_folder_asks_no_one_behind_a_mirror_that_hangs(small_model, tmp_path):
    """The same server holds every client up that asks it: `test_a_mirror_that_never_answers_is_one_line_in_time`."""
    with serve_silence() as mirror:
        code = OFFLINE.format(endpoint=mirror.url, folder=f"models/{small_model.name}")
        (tmp_path / "models").symlink_to(small_model.parent)
        every_way = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), mirror.url)
        done = run_code(code, folder=tmp_path, timeout=180, **every_way)
        assert last_line(done) == [str(tmp_path / "models" / small_model.name), 2, 49152]
        assert mirror.connections == []


def test_a_token_that_an_address_gives_back_is_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_1234567890")
    assert hide_token(ValueError("refused\n hf_1234567890 twice: hf_1234567890")) == "refused hf_… twice: hf_…"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    assert hide_token("no token:  hf_1") == "no token: hf_1"
