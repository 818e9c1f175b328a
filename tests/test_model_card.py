"""The card says what the run recorded, passes the Hub client's reading, and carries no path of this machine."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub import COMMIT, HubHandler, Server, serve_hub, serving

from helpers.environment.hub import hub_name
from helpers.export.card import CardError, check_model_card, languages_of, make_model_card, one_line
from helpers.export.publish import hub_files
from helpers.handoff.run import HandoffError, open_run

ROOT = Path(__file__).resolve().parent.parent
REPORT = {
    "held_out_loss": {"before": 4.5, "after": 0.25},
    "house_style": {"before": 0.0, "after": 0.95},
    "right_help": {},
    "steps": 60,
    "settings": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 0.0002,
        "max_length": 2048,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "report_to": "none",
        "bf16": False,
    },
    "environment": {"precision": "float16"},
    "data": {
        "dataset": "mlabonne/FineTome-100k",
        "training rows": "480 conversations, 200,000 tokens, 150,000 of them in answers",
        "held-out rows": "64 conversations, 9,000 tokens, 7,000 of them in answers",
    },
}


@pytest.fixture
def run(tmp_path):
    run = open_run(tmp_path / "run", base_model="base")
    with run.write("adapter") as folder:
        folder.mkdir()
        (folder / "README.md").write_text("an empty form")
        (folder / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "/home/me/models/x", "r": 16})
        )
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    run.write_json("report.json", REPORT)
    return run


def card(run, **changes):
    given = dict(form="adapter", name="me/Llama-3.2-mine", base_model="unsloth/Llama-3.2-3B-Instruct")
    return make_model_card(run, **(given | changes))


def trained_on(run, dataset):
    run.write_json("report.json", REPORT | {"data": REPORT["data"] | {"dataset": dataset}})


def test_the_header_is_read_back_by_the_hubs_client(run):
    from huggingface_hub import ModelCard

    header = ModelCard(card(run)).data
    assert (header.base_model, header.license, header.datasets) == (
        "unsloth/Llama-3.2-3B-Instruct",
        "llama3.2",
        ["mlabonne/FineTome-100k"],
    )
    assert {result.metric_type: result.metric_value for result in header.eval_results} == {
        "held_out_loss": 0.25,
        "replies_in_house_style": 0.95,
    }


def test_the_text_holds_settings_versions_results_use_and_limits(run):
    text = card(run, exports=Exports())
    for part in ("r: 16", "steps: 60", "unsloth: ", "0.950", "the table of exports", "## Limits", "precision: float16"):
        assert part in text
    for part in ("target_modules: q_proj, v_proj", "learning_rate: 0.0002", "max_length: 2048", "bf16: False"):
        assert part in text
    assert "mlabonne/FineTome-100k. Trained on: 480 conversations, 200,000 tokens" in text
    assert "Held out: 64 conversations" in text and "report_to" not in text
    assert "Built with Llama" in text
    assert 'from_pretrained("me/Llama-3.2-mine", load_in_4bit=True)' in text


class Exports:
    def __init__(self, text="the table of exports\nand a note"):
        self.text = text

    def __repr__(self):
        return self.text


@pytest.mark.parametrize("exports", [None, Exports()])
@pytest.mark.parametrize("form", ["adapter", "merged", "gguf"])
def test_the_text_is_one_block_a_thing(run, form, exports):
    """One blank line between two blocks and none inside one, so that each is one block of code as Markdown reads it."""
    text = card(run, form=form, exports=exports)
    assert "\n\n\n" not in text and text.endswith("\n") and not text.endswith("\n\n")
    assert all(line == line.rstrip() for line in text.splitlines())
    parts = text.split("\n## ")[1:]
    assert [part.partition("\n\n")[0] for part in parts] == [
        "Data",
        "Settings",
        "Results",
        "How to use it",
        "Limits",
        "Versions",
    ]
    settings, results, versions = (part.partition("\n\n")[2].strip("\n") for part in (parts[1], parts[2], parts[5]))
    for block in (settings, versions, results.partition("\n\n")[0]):
        assert block and all(line.startswith("    ") for line in block.splitlines())
    said = "Each saved form against the model in memory:\n\n    the table of exports\n    and a note\n\n## How"
    assert (said in text) == (exports is not None)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_what_is_not_published_is_loaded_from_its_folder(run, form):
    text = card(run, name="Llama-3.2-3B-Instruct-tuned", form=form)
    assert f'from_pretrained("./{form}"' in text and "# Llama-3.2-3B-Instruct-tuned" in text


@pytest.mark.parametrize(
    ("dataset", "shown", "on_hub"),
    [
        ("mlabonne/FineTome-100k", "mlabonne/FineTome-100k", ["mlabonne/FineTome-100k"]),
        ("talks.jsonl", "talks.jsonl", None),
        ("squad", "squad", None),
    ],
)
def test_the_data_are_those_of_the_training(run, dataset, shown, on_hub):
    from huggingface_hub import ModelCard

    trained_on(run, dataset)
    text = card(run)
    assert ModelCard(text).data.datasets == on_hub
    assert f"## Data\n\n{shown}. Trained on:" in text


@pytest.mark.parametrize(
    ("form", "said"), [("merged", "AutoModelForCausalLM"), ("gguf", "ollama create"), ("adapter", "FastLanguageModel")]
)
def test_each_form_says_how_it_is_used(run, form, said):
    assert said in card(run, form=form)


AWKWARD = {
    "HTML": "a<script>alert(1)</script><!-- b",
    "entities": "a &lt;b&gt; &#60;b&#62;",
    "a fence": "a\n```\n# b\n~~~\n",
    "a header": "a\n---\nlicense: mit\n---\n# b",
    "YAML": "a: [b, {c: !!python/name:os.system ''}] # d",
    "a rule": "---",
    "Jinja": "a {{ 7 * 7 }}{% for x in y %}{# b #}",
    "a heading": "# a #",
    "lists": "- a\n1. b\n+ c",
    "a number": "2024",
    "links": "[a](javascript:alert(1)) ![b](c) <https://d>",
    "emphasis": "_a_ **b** `c` ~~d~~ $e$ \\",
    "a table": "a | b\n--|--\nc | d",
    "other ends of lines": "a\r# b\u2028# c\x85# d\v# e",
    "what cannot be seen": "a\x00\x1b[31m\u202eb\u200b",
    "a quote": 'a", trust_remote_code=True) #',
}


def read_card(text):
    """The header as the Hub's client reads it, and (kind, content) of the blocks and spans of the rest."""
    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    loaded = ModelCard(text)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(loaded.text)
    spans = [span for token in tokens for span in (token.children or [])]
    return loaded.data, [(each.type, each.content) for each in tokens], spans


@pytest.mark.parametrize("name", AWKWARD)
def test_a_text_from_outside_stays_a_text(run, name, monkeypatch):
    text = AWKWARD[name]
    shown = one_line(text)
    settings = REPORT["settings"] | {"learning_rate": text, "target_modules": [text]}
    report = {"data": dict.fromkeys(REPORT["data"], text), "environment": {"precision": text}, "settings": settings}
    run.write_json("report.json", REPORT | report)
    recorded = type(run).facts
    changed = recorded(run, "adapter") | {"versions": {"unsloth": text}}
    monkeypatch.setattr(type(run), "facts", lambda run, each: changed if each == "adapter" else recorded(run, each))
    header, blocks, spans = read_card(
        card(run, name=f"me/{text}", base_model=f"/home/me/{text}", exports=Exports(text))
    )
    assert (header.model_name, header.license, header.base_model) == (shown.rpartition("/")[2], "other", None)
    assert {result.dataset_type for result in header.eval_results} == {shown}
    trained_on(run, "x")
    plain = read_card(card(run, name="me/x", base_model="/home/me/x", exports=Exports("x")))
    assert [kind for kind, _ in blocks] == [kind for kind, _ in plain[1]]
    assert {span.type for span in spans} <= {"text", "text_special", "softbreak"}
    code = [content for kind, content in blocks if kind == "code_block"]
    shown_text = "".join(span.content for span in spans)
    assert shown.rpartition("/")[2] in shown_text and shown_text.count(f"{shown}. Trained on: {shown}. Held") == 1
    assert f"from_pretrained({json.dumps(one_line(f'me/{text}'), ensure_ascii=False)}, load_in" in code[3]
    ast.parse(code[3])
    assert f"learning_rate: {shown}\n" in code[0] and f"precision: {shown}\n" in code[0]


def test_folders_of_this_machine_are_not_in_the_card(run, tmp_path):
    text = card(run, base_model=str(tmp_path / "my model"), name="mine")
    assert str(tmp_path) not in text
    assert "my model, fine-tuned" in text and "base_model:" not in text
    assert "license: other" in text


@pytest.mark.parametrize(
    ("base_model", "licence", "on_hub"),
    [
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "llama3.2", True),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", True),
        ("/home/me/SmolLM2-135M-Instruct", "apache-2.0", False),
        ("Qwen/Qwen3-0.6B", "other", True),
    ],
)
def test_the_licence_is_the_base_models(run, base_model, licence, on_hub):
    from huggingface_hub import ModelCard

    header = ModelCard(card(run, base_model=base_model)).data
    assert (header.license, header.base_model) == (licence, base_model if on_hub else None)


def test_a_local_folder_is_not_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("models/mine") == "models/mine"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_name("models/mine") == ""


def test_a_card_that_the_hub_would_refuse_is_refused():
    with pytest.raises(CardError, match="no licence"):
        check_model_card("---\nlanguage: en\n---\n# Mine\n")
    with pytest.raises(CardError, match="correct the header"):
        check_model_card("---\nlicense: [\n---\n# Mine\n")
    with pytest.raises(CardError, match="correct the header"):
        check_model_card("---\nlicense: mit\nmodel-index:\n- results: {}\n---\n# Mine\n")


@pytest.mark.parametrize(
    ("base_model", "named"),
    [("unsloth/Llama-3.2-3B-Instruct", "unsloth/Llama-3.2-3B-Instruct"), ("/home/me/models/mine", "mine")],
)
def test_what_is_published_names_the_base_model_and_has_our_card(run, base_model, named):
    files = hub_files(run, "adapter", card="our card", base_model=base_model)
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["README.md"] == b"our card"
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": named, "r": 16}


def test_only_the_files_that_were_recorded_are_published(run):
    (run.path / "adapter" / "notes.txt").write_text("not for others")
    assert "notes.txt" not in hub_files(run, "adapter", card="", base_model="base")
    (run.path / "adapter" / "adapter_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(HandoffError, match="adapter_model.safetensors: found sha256"):
        hub_files(run, "adapter", card="", base_model="base")


@pytest.fixture
def hub():
    with serve_hub() as server:
        yield server


TOKEN = "hf_" + "neverShowThis" * 2
# The client reads HF_ENDPOINT when it is imported: so in a process of its own.
PUBLISH = """
import json, sys
from helpers.export.publish import publish
from helpers.handoff.run import open_run
folder, *options = json.loads(sys.stdin.read())
print(publish(open_run(folder), "adapter", **dict(zip(("repository", "card", "base_model"), options))))
"""


def published(hub, run, text):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": TOKEN}
    given = json.dumps([str(run.path), "me/tuned", text, "unsloth/Llama-3.2-3B-Instruct"])
    command = [sys.executable, "-c", PUBLISH]
    return subprocess.run(command, input=given, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_publishing_uploads_the_verified_files_into_a_private_repository(run, hub):
    done = published(hub, run, card(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/tuned/commit/1"
    bodies = {path: body for path, _, body in hub.requests}
    created = json.loads(bodies["/api/repos/create"])
    assert (created["name"], created["organization"], created["visibility"]) == ("tuned", "me", "private")
    assert json.loads(bodies["/api/validate-yaml"])["content"] == card(run)
    files = hub.committed_files()
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["README.md"].decode() == card(run)
    assert files["adapter_model.safetensors"] == b"weights"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "unsloth/Llama-3.2-3B-Instruct"


def test_the_token_is_in_nothing_but_the_authorization_header(run, hub):
    done = published(hub, run, card(run))
    asked = [path for path, headers, _ in hub.requests if headers.get("authorization") == f"Bearer {TOKEN}"]
    assert {"/api/repos/create", "/api/models/me/tuned/commit/main"} <= set(asked)
    for path, headers, body in hub.requests:
        others = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        assert TOKEN not in f"{path} {others}" and TOKEN.encode() not in body
    assert TOKEN not in done.stdout + done.stderr + card(run)
    assert not [file for file in run.path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]


def test_a_card_that_the_hub_refuses_stops_before_anything_is_uploaded(run, hub):
    done = published(hub, run, "---\nlicense: mit\n---\n# Mine\n")
    said = "ExportError: publishing in me/tuned: found ValueError: Invalid metadata in README.md. - the Hub says no, "
    assert done.returncode != 0 and said in done.stderr.splitlines()[-1]
    assert "During handling" not in done.stderr and "direct cause" not in done.stderr
    assert [path for path, _, body in hub.requests if body] == ["/api/repos/create", "/api/validate-yaml"]


class Echo(HubHandler):
    """A Hub that gives the request's token back: `server.place` says where."""

    def do_POST(self):  # noqa: N802, the base class's name
        where, path = self.server.place, self.path
        said = f"who is {self.headers.get('authorization')}?"
        ok = {"url": f"{self.server.url}/me/tuned", "errors": [], "warnings": []}
        if where == "the error of the first request":
            self.keep()
            self.answer(403, {"error": said})
        elif where == "a header of an error":
            self.keep()
            self.answer(500, {}, X_Error_Message=said, X_Request_Id=said)
        elif where == "a text that is no JSON":
            self.keep()
            self.answer(418, said.encode(), Content_Type="text/plain")
        elif where == "the log":
            self.keep()
            self.answer(401, {}, X_HF_Warning=f"topic; {said}")
        elif path == "/api/validate-yaml" and where == "what is wrong with the card":
            self.keep()
            self.answer(400, ok | {"errors": [{"message": said}]})
        elif path == "/api/validate-yaml" and where == "a remark on the card":
            self.keep()
            self.answer(200, ok | {"warnings": [{"message": said}]})
        elif path.endswith("/commit/main") and where == "the commit's address":
            self.keep()
            self.answer(200, {"commitUrl": f"{self.server.url}/me/tuned/commit/1?{said}", "commitOid": COMMIT})
        else:
            super().do_POST()


@pytest.mark.parametrize(
    ("place", "published_all_the_same"),
    [
        ("the error of the first request", False),
        ("a header of an error", False),
        ("a text that is no JSON", False),
        ("the log", False),
        ("what is wrong with the card", False),
        ("a remark on the card", True),
        ("the commit's address", True),
    ],
)
def test_a_hub_that_gives_the_token_back_brings_it_into_no_output(run, place, published_all_the_same):
    with serving(Server(Echo)) as hub:
        hub.place = place
        done = published(hub, run, card(run))
    assert (done.returncode == 0) == published_all_the_same, done.stderr
    said = done.stdout + done.stderr
    assert "who is Bearer hf_…?" in said and TOKEN not in said
    if not published_all_the_same:
        assert done.stderr.splitlines()[-1].startswith("helpers.export.plan.ExportError: publishing in me/tuned: found")
        assert done.stderr.count("Traceback") == 1


def test_publishing_without_a_network_is_one_line(run):
    with serving(Server(HubHandler)) as gone:
        pass
    done = published(gone, run, card(run))
    assert re.search(r"ExportError: publishing in me/tuned: found \w+: .*refused", done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("Keep the vents free, and wait for an hour. It is not broken.", ["en"]),
        ("Halten Sie die Schlitze frei und warten Sie eine Stunde. Das Gerät ist nicht kaputt.", ["de"]),
        ("Gardez les fentes libres et attendez une heure. Il est dans la boîte.", ["fr"]),
        ("Deje las ranuras libres y espere una hora. El aparato no es el problema que ve.", ["es"]),
        ("请保持通风口畅通，等待一小时。Wi-Fi", ["zh"]),
        ("通気口をふさがないでください。一時間お待ちください。", ["ja"]),
        ("통풍구를 막지 말고 한 시간 기다리세요.", ["ko"]),
        ("Gdzie jest instrukcja? Proszę sprawdzić pudełko i numer seryjny urządzenia.", []),
        ("Оставьте отверстия открытыми.", []),  # one of several languages in these letters
        ("def f(x): return x + 1", []),
        ("42 %", []),
        ("", []),
    ],
)
def test_the_language_is_that_of_the_text_or_left_out(text, languages):
    assert languages_of([text]) == languages == languages_of(text.split())


def test_the_card_names_the_language_of_the_held_out_answers(run):
    from datasets import Dataset, DatasetDict
    from huggingface_hub import ModelCard

    assert not ModelCard(card(run)).data.language  # the data are not in the folder any more
    answer = "Halten Sie die Schlitze frei und warten Sie eine Stunde. Das Gerät ist nicht kaputt."
    turns = [{"role": "user", "content": "What is the matter?"}, {"role": "assistant", "content": answer}]
    rows = Dataset.from_list([{"conversations": turns}])
    with run.write("dataset") as folder:
        DatasetDict(train=rows, held_out=rows).save_to_disk(folder)
    assert ModelCard(card(run)).data.language == ["de"]
