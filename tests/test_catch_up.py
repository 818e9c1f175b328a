"""Opening a late chapter alone: catch-up runs what is missing, or says which chapter to run."""

from pathlib import Path

import pytest
from train_once import shallow_smollm2

from helpers.handoff.run import HandoffError, open_run

CONVERSATIONS = Path(__file__).resolve().parent.parent / "notebooks" / "data" / "support_conversations.jsonl"


def test_catch_up_off_names_the_chapter(tmp_path, monkeypatch):
    monkeypatch.setenv("CATCH_UP", "0")
    with pytest.raises(HandoffError, match="04_train"):
        open_run(tmp_path / "run", needs=("adapter",))


@pytest.mark.slow
def test_an_adapter_from_an_empty_run_folder(tmp_path, monkeypatch, capsys):
    """The real chapters 02, 03 and 04, two steps on few rows, as opening chapter 05 alone would run them."""
    shallow_smollm2(tmp_path / "shallow")
    monkeypatch.delenv("CATCH_UP", raising=False)
    lines = sorted(CONVERSATIONS.read_text(encoding="utf-8").splitlines(keepends=True), key=len)
    few = {split: [line for line in lines if f'"split": "{split}"' in line] for split in ("train", "held_out")}
    (tmp_path / "few.jsonl").write_text("".join(few["train"][:8] + few["held_out"][:3]), encoding="utf-8")
    parameters = {"PROFILE": "cpu", "MODEL_NAME": str(tmp_path / "shallow"), "MAX_STEPS": 2}
    parameters["DATASET"] = str(tmp_path / "few.jsonl")
    run = open_run(tmp_path / "run", needs=("adapter",), parameters=parameters)
    printed = capsys.readouterr().out
    assert "running 02_load_and_lora, 03_data, 04_train first" in printed
    assert "made now by 04_train" in printed
    assert (run.artefact("adapter") / "adapter_model.safetensors").exists()
    again = open_run(tmp_path / "run", needs=("adapter", "dataset"), parameters=parameters)
    assert capsys.readouterr().out.count("from the run folder") == 2
    assert again.read_json("report.json")["steps"] == 2


@pytest.mark.slow
def test_catch_up_that_fails_names_the_cell(tmp_path, monkeypatch):
    monkeypatch.delenv("CATCH_UP", raising=False)
    parameters = {"PROFILE": "cpu", "DATASET": str(tmp_path / "missing.jsonl")}
    with pytest.raises(HandoffError, match="catch-up, chapter 03_data.*missing.jsonl: found no such file"):
        open_run(tmp_path / "run", needs=("dataset",), parameters=parameters)
    assert not (tmp_path / "run" / "dataset").exists()
