"""The card says what the run recorded, passes the Hub client's reading, and carries no path of this machine."""

import json

import pytest

from helpers.handoff import open_run
from helpers.model_card import CardError, check_model_card, hub_files, hub_name, make_model_card

REPORT = {
    "held_out_loss": {"before": 4.5, "after": 0.25},
    "house_style": {"before": 0.0, "after": 0.95},
    "right_help": {},
    "steps": 60,
}


@pytest.fixture
def run(tmp_path):
    run = open_run(tmp_path / "run")
    run.write_json("lora.json", {"lora": {"r": 16, "lora_alpha": 16}}, base_model="base")
    with run.write("adapter", base_model="base") as folder:
        folder.mkdir()
        (folder / "README.md").write_text("an empty form")
        (folder / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "/home/me/models/x", "r": 16})
        )
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    run.write_json("report.json", REPORT, base_model="base")
    return run


def card(run, **changes):
    given = dict(form="adapter", name="me/Llama-3.2-mine", base_model="unsloth/Llama-3.2-3B-Instruct")
    return make_model_card(run, **(given | {"dataset": "mlabonne/FineTome-100k"} | changes))


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
    text = card(run, exports="the table of exports", rows=480)
    for part in ("r: 16", "steps: 60", "unsloth: ", "0.950", "480 training", "the table of exports", "## Limits"):
        assert part in text
    assert "Built with Llama" in text
    assert 'from_pretrained("me/Llama-3.2-mine", load_in_4bit=True)' in text


@pytest.mark.parametrize(
    ("form", "said"), [("merged", "AutoModelForCausalLM"), ("gguf", "ollama create"), ("adapter", "FastLanguageModel")]
)
def test_each_form_says_how_it_is_used(run, form, said):
    assert said in card(run, form=form)


def test_folders_of_this_machine_are_not_in_the_card(run, tmp_path):
    text = card(run, base_model=str(tmp_path / "my model"), dataset=str(tmp_path / "talks.jsonl"), name="mine")
    assert str(tmp_path) not in text
    assert "my model, fine-tuned" in text and "talks.jsonl" in text
    assert "license: other" in text


def test_smollm2_is_named_as_on_the_hub(run):
    assert hub_name("SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_name("/home/me/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "license: apache-2.0" in card(run, base_model="SmolLM2-135M-Instruct")


def test_a_card_that_the_hub_would_refuse_is_refused():
    with pytest.raises(CardError, match="no licence"):
        check_model_card("---\nlanguage: en\n---\n# Mine\n")
    with pytest.raises(CardError, match="correct the header"):
        check_model_card("---\nlicense: [\n---\n# Mine\n")
    with pytest.raises(CardError, match="correct the header"):
        check_model_card("---\nlicense: mit\nmodel-index:\n- results: {}\n---\n# Mine\n")


def test_what_is_published_names_the_base_model_and_has_our_card(run):
    files = hub_files(run.artefact("adapter"), card="our card", base_model="SmolLM2-135M-Instruct")
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["README.md"] == b"our card"
    config = json.loads(files["adapter_config.json"])
    assert config == {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "r": 16}
