"""A run that is lost is stopped and one that is only noisy is not: by made-up logs, and by the real trainer."""

import math
import random

import pytest

from helpers.base import InputError
from helpers.training.divergence import DivergenceError, allowed_overflows, find_divergence, stop_on_divergence


def log_of(losses, norms=None):
    norms = norms or [1.0] * len(losses)
    rows = zip(losses, norms, strict=True)
    return [{"step": step, "loss": loss, "grad_norm": norm} for step, (loss, norm) in enumerate(rows, 1)]


def stopped_at(losses, norms=None, *, fp16=False):
    """The step at which a run with these losses is stopped, None where it runs to its end."""
    log = log_of(losses, norms)
    return next((n for n in range(1, len(log) + 1) if find_divergence(log[:n], fp16=fp16)), None)


def falling(seed, *, noise, start=2.0, end=0.4, steps=60):
    chance = random.Random(seed)
    return [(end + (start - end) * math.exp(-step / 10)) * chance.lognormvariate(0, noise) for step in range(steps)]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_divergence(seed):
    assert stopped_at(falling(seed, noise=0.25)) is None
    assert stopped_at(falling(seed, noise=0.25, start=2.0, end=2.0)) is None  # learns nothing, which is another fault


@pytest.mark.parametrize(
    "losses",
    [
        [2.0, 3.9, 1.1, 2.7, 4.5, 2.0, 1.9, 1.8],  # noisy first steps
        [2.0] * 8 + [60.0] + [1.5] * 8,  # one bad batch
        [4.9, 4.0, 2.0, 0.5, 0.2, 0.2, 0.2, 0.5, 0.7, 0.6, 0.9, 0.6],  # much above its lowest, far below its start
        [],
    ],
)
def test_what_is_no_divergence(losses):
    assert stopped_at(losses) is None
    log = [*log_of(losses), {"eval_loss": math.nan, "step": 9}, {"train_runtime": 3.0}]
    assert find_divergence(log, fp16=False) is None


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([2.0, 1.9, math.nan], 3),
        ([math.inf], 1),
        ([2.0, 2.1, 6.0, 9.0, 11.0, 11.0], 6),  # from the first update on
        ([2.0] * 20 + [2.5, 7.0, 9.0, 10.0, 11.0], 24),
        ([4.9, 3.0, 1.0, 0.3, 0.2, 0.2, 0.2, 3.0, 6.0, 7.0, 7.0], 11),  # everything that it had learned
    ],
)
def test_what_is_divergence(losses, step):
    assert stopped_at(losses) == step


def test_the_explanation():
    found, expected = find_divergence(log_of([2.0] * 5 + [9.0] * 3), fp16=False)
    assert found == "a loss of 9 at step 8 (the median of 5)"
    assert expected == "less than 2.5 times the 2 of its start"


def test_the_scaler_may_back_off():
    losses = [2.0] * 40
    first_steps = [math.inf] * 7 + [1.0] * 33
    assert stopped_at(losses, first_steps, fp16=True) is None
    assert stopped_at(losses, [math.nan] * 16 + [1.0] * 24, fp16=True) is None
    assert stopped_at(losses, [1.0] * 3 + [math.inf] * 37, fp16=True) == 20  # the 17th: it has no end
    assert stopped_at(losses, [math.nan, 1.0] * 20, fp16=True) == 33  # the 17th too, and nothing was doubled
    assert stopped_at(losses, first_steps, fp16=False) == 1  # nothing skips such a step


@pytest.mark.parametrize("good_steps", [0, 1, 1900, 2000, 4000])
def test_the_overflows_that_are_allowed_are_those_of_the_real_scaler(good_steps):
    """After as many as are allowed PyTorch's scaler multiplies by 1, and no earlier."""
    import torch

    scaler, weight = torch.amp.GradScaler("cpu"), torch.nn.Parameter(torch.zeros(1))
    optimizer, steps = torch.optim.SGD([weight]), good_steps

    def step(gradient):
        scaler.scale(weight.sum())  # it makes its factor when it is first used
        weight.grad = torch.tensor([gradient])
        scaler.step(optimizer)
        scaler.update()

    for _ in range(good_steps):
        step(1.0)
    overflows = 0
    while scaler.get_scale() > 1 or not overflows:
        step(math.inf)
        overflows, steps = overflows + 1, steps + 1
    assert overflows == allowed_overflows(steps, fp16=True)
    assert allowed_overflows(steps, fp16=False) == 0


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory):
    """`trainer_of(**settings)`: the tiny trainer of the checkpoint tests."""
    from train_once import make_trainer, small_tokenizer

    tokenizer = small_tokenizer()
    return lambda **settings: make_trainer(tmp_path_factory.mktemp("run"), tokenizer, **settings)


def harm(trainer, factor):
    """Multiply the weights that make the logits, after step 3."""
    import torch
    from transformers import TrainerCallback

    class Harm(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.get_output_embeddings().weight.mul_(factor)

    trainer.add_callback(Harm())


def test_a_nan_stops_training(trainer_of):
    trainer = trainer_of()
    harm(trainer, math.nan)
    trainer.add_callback(stop_on_divergence())
    with pytest.raises(DivergenceError, match="found a loss of nan at step 4, expected a number") as caught:
        trainer.train()
    assert isinstance(caught.value, InputError) and "smaller learning rate than 0.01" in str(caught.value)
    assert trainer.state.global_step == 4


def test_transformers_hides_a_nan(trainer_of):
    """Why the callback turns its filter off. If this fails, that line may go."""
    trainer = trainer_of()
    harm(trainer, math.nan)
    trainer.train()
    assert trainer.state.global_step == 12
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_an_explosion_stops_training(trainer_of):
    trainer = trainer_of()
    harm(trainer, 1000)
    trainer.add_callback(stop_on_divergence())
    with pytest.raises(DivergenceError, match="of its start"):
        trainer.train()
    assert trainer.state.global_step == 6  # three of five losses


def test_a_good_run_is_left_alone(trainer_of):
    trainer = trainer_of()
    trainer.add_callback(stop_on_divergence())
    assert trainer.train().global_step == 12
