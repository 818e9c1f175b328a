"""The best weights: kept while a run trains, and given back at its end."""

import pytest
from safetensors import safe_open

from helpers.training.best import FILE, keep_best
from helpers.training.evidence import RESTORED, STOPPED, describe_overfitting


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory):
    """`trainer_of(**settings)`: the tiny trainer of the checkpoint tests, measured every other step."""
    from train_once import make_trainer, small_tokenizer

    tokenizer = small_tokenizer()
    settings = {"eval_strategy": "steps", "save_strategy": "no"}
    return lambda **more: make_trainer(tmp_path_factory.mktemp("run"), tokenizer, **settings | {"eval_steps": 2} | more)


def trained(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def spoil(trainer, step, noted):
    """From that step on the adapter is made worse; what it was at the measurement before is noted."""
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                noted.update(trained(trainer))
            if state.global_step == step:  # as far to the other side of what was learned
                for name, weight in trainer.model.named_parameters():
                    weight.data.mul_(-40 if "lora_B" in name else 1)

    trainer.add_callback(Spoil())


def test_a_run_that_gets_worse_is_stopped_and_goes_back(trainer_of, capsys):
    trainer, noted = trainer_of(), {}
    best = keep_best(trainer)
    spoil(trainer, 5, noted)
    trainer.train()
    losses = dict((step, loss) for loss, step in best.measured())
    assert min(losses, key=losses.get) == 4 and max(losses) == 8 == trainer.state.global_step < trainer.state.max_steps
    best.restore()
    assert all(weight.equal(noted[name]) for name, weight in trained(trainer).items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[4], rel=1e-5)
    said = capsys.readouterr().out
    assert "Stopped at step 8: 2 measurements in a row without a new best" in said
    assert f"Back to the lowest held-out loss: {losses[4]:.3f} at step 4, {losses[8]:.3f} at step 8" in said
    assert describe_overfitting(trainer.state.log_history) == ""
    assert describe_overfitting([entry for entry in trainer.state.log_history if RESTORED not in entry][:-1]) != ""
    assert sum(STOPPED in entry for entry in trainer.state.log_history) == 1


def test_a_run_that_was_interrupted_goes_back_to_the_best_of_both_sessions(tmp_path, capsys):
    from train_once import make_trainer, small_tokenizer
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    settings = {"eval_steps": 2, "save_strategy": "steps", "save_steps": 6}
    first, noted = make_trainer(tmp_path, small_tokenizer(), **settings), {}
    keep_best(first)
    spoil(first, 5, noted)
    first.add_callback(Stop())
    first.train()
    second = make_trainer(tmp_path, small_tokenizer(), **settings)
    best = keep_best(second)
    second.train(resume_from_checkpoint=True)
    best.restore()
    assert "at step 4" in capsys.readouterr().out.splitlines()[-1]
    assert all(weight.equal(noted[name]) for name, weight in trained(second).items())


def test_a_run_that_ends_at_its_best_keeps_its_last_weights(trainer_of, capsys):
    trainer = trainer_of(learning_rate=5e-3)
    best = keep_best(trainer)
    trainer.train()
    last = trained(trainer)
    best.restore()
    assert all(weight.equal(last[name]) for name, weight in trained(trainer).items())
    assert "lowest at the end" in capsys.readouterr().out
    with safe_open(best.path, "pt") as file:
        assert file.metadata()["step"] == str(best.measured()[-1][1])


@pytest.mark.parametrize("harm", ["gone", "cut short", "another run's"])
def test_without_the_file_the_last_weights_stay_and_that_is_said(trainer_of, capsys, harm):
    trainer = trainer_of()
    best = keep_best(trainer)
    spoil(trainer, 5, {})
    trainer.train()
    last = trained(trainer)
    if harm == "gone":
        best.path.unlink()
    elif harm == "cut short":
        best.path.write_bytes(best.path.read_bytes()[:-100])
    else:
        trainer.state.log_history = [
            entry | {"eval_loss": entry["eval_loss"] * 1.01} if "eval_loss" in entry else entry
            for entry in trainer.state.log_history
        ]
    best.restore()
    assert best.path.name == FILE and "not on this machine" in capsys.readouterr().out
    assert all(weight.equal(last[name]) for name, weight in trained(trainer).items())


def test_a_run_that_was_never_measured_says_so(trainer_of, capsys):
    trainer = trainer_of(eval_strategy="no", max_steps=1, warmup_steps=0)
    best = keep_best(trainer)
    trainer.train()
    best.restore()
    assert "never measured" in capsys.readouterr().out and not best.path.exists()
