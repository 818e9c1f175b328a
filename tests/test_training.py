"""Evidence of learning, each claim with a run that must fail it; and the real trainer on the real small model."""

import math

import pytest

from helpers.training import (
    Evidence,
    EvidenceError,
    check_evidence,
    count_changed_adapters,
    count_trainable,
    frozen_checksum,
)

LOG = [{"loss": 2.0, "grad_norm": 1.0}, {"loss": 1.0, "grad_norm": 0.5}, {"eval_loss": 1.0}]


@pytest.fixture
def model():
    """A small Llama with LoRA on two kinds of layers, every B trained a little."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return tuned


def evidence_of(model, log=LOG, frozen=None, before=2.0, after=1.0):
    frozen = frozen_checksum(model) if frozen is None else frozen
    return check_evidence(model, log=log, frozen_before=frozen, loss_before=before, loss_after=after)


def failed(evidence):
    return [claim for claim, _, holds in evidence.rows if not holds]


def test_a_good_run(model):
    evidence = evidence_of(model)
    assert evidence.ok
    evidence.raise_if_failed()
    assert repr(evidence).count("True") == 4


def test_an_adapter_that_was_not_trained_is_found(model):
    import torch

    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        parameter.zero_()
    assert failed(evidence_of(model)) == ["every LoRA matrix B left zero"]
    assert count_changed_adapters(model) == (3, 4)


def test_no_adapter_at_all_is_found(model):
    assert "every LoRA matrix B left zero" in failed(evidence_of(model.unload()))


@pytest.mark.parametrize(
    "log", [[], [{"loss": math.nan, "grad_norm": 1.0}], [{"loss": 1.0, "grad_norm": math.inf}], [{"loss": 1.0}]]
)
def test_a_run_that_was_not_finite_is_found(model, log):
    assert failed(evidence_of(model, log=log)) == ["loss and gradient norm stayed finite"]


def test_a_touched_base_weight_is_found(model):
    import torch

    before = frozen_checksum(model)
    frozen = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    with torch.no_grad():
        frozen.view(-1)[3] += 0.01
    assert failed(evidence_of(model, frozen=before)) == ["the base weights are untouched"]


@pytest.mark.parametrize("after", [2.0, 2.5, math.nan])
def test_a_loss_that_did_not_fall_is_found(model, after):
    evidence = evidence_of(model, after=after)
    assert failed(evidence) == ["held-out loss fell"]
    with pytest.raises(EvidenceError, match="held-out loss fell"):
        evidence.raise_if_failed()


def test_evidence_stops_at_the_first_false_claim():
    with pytest.raises(EvidenceError, match="found b, expected second"):
        Evidence((("first", "a", True), ("second", "b", False))).raise_if_failed()


def test_trainable_parameters_by_kind(model):
    counted = count_trainable(model)
    # r · (in + out), two layers: q_proj is 32 × 32, down_proj 32 × 64
    assert counted.rows == (("q_proj", 2, "32 × 32", 4, 2 * 4 * 64), ("down_proj", 2, "32 × 64", 4, 2 * 4 * 96))
    assert counted.trainable == 2 * 4 * 64 + 2 * 4 * 96
    assert counted.total == model.get_nb_trainable_parameters()[1]
    assert "down_proj" in repr(counted) and "down_proj" in counted._repr_html_()
