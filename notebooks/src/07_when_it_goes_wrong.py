# %% [markdown] lang="en"
# # Read a run that did not work
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/07_when_it_goes_wrong.ipynb)
#
# At the end you have seen six ways in which a training run fails, each beside a run that works.
#
# You can
# - tell a learning rate that is too low from one that is too high,
# - see that a model learns by heart, and stop it in time,
# - find out that the wrong words were trained, or in the wrong form,
# - measure what a model forgot, and keep it from forgetting.
#
# You need nothing from the chapters before. The runs are short, so that all of them take minutes.
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `DATASET` and `GENERAL` are files of this series; others need the same columns. `MAX_STEPS` and `LEARNING_RATE` are as in
# chapter 04, `CHAT_TEMPLATE` and `RUN_DIR` as in chapter 03, `MODEL_NAME`, `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and
# `USE_MODELSCOPE` as in chapter 02. Here the model is the 1B, which trains faster.

# %% tags=["parameters"]
# @title Choices
MODEL_NAME = "unsloth/Llama-3.2-1B-Instruct"  # @param {type:"string"}
CHAT_TEMPLATE = "llama-3.1"  # @param {type:"string"}
DATASET = "notebooks/data/support_conversations.jsonl"  # @param {type:"string"}
GENERAL = "notebooks/data/general_questions.jsonl"  # @param {type:"string"}
MAX_SEQ_LENGTH = 512  # @param {type:"integer"}
MAX_STEPS = 30  # @param {type:"integer"}
LEARNING_RATE = 2e-4  # @param {type:"number"}
RUN_DIR = "runs/llama"  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.environment import check_choices, find_model
from helpers.handoff import open_run

check_choices(globals())
MODEL_NAME = find_model(MODEL_NAME, endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE)
run = open_run(RUN_DIR)

# %% [markdown] lang="en"
# ## One model for all runs
#
# The small model has room in 16 bits, and trains faster so. `untrained` keeps a copy of the fresh adapter. Each run
# begins with it, so that nothing differs between two runs but the one thing that is changed.

# %%
import os

os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
from unsloth import FastLanguageModel  # before transformers, peft and trl: it patches them
from unsloth.chat_templates import get_chat_template, train_on_responses_only
from peft import get_peft_model_state_dict, set_peft_model_state_dict

model, tokenizer = FastLanguageModel.from_pretrained(MODEL_NAME, max_seq_length=MAX_SEQ_LENGTH, load_in_4bit=False)
if CHAT_TEMPLATE:
    tokenizer = get_chat_template(tokenizer, chat_template=CHAT_TEMPLATE)

# %%
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    use_gradient_checkpointing=False,
    random_state=3407,
)
untrained = {name: matrix.clone() for name, matrix in get_peft_model_state_dict(model).items()}

# %% [markdown] lang="en"
# ## Two sets of questions
#
# The first are the support conversations of one question and its answer. The others are 68 general questions, such as
# the capital of France. Of these, 20 are held out, each with a right and a wrong answer: they show what a model forgot.

# %% tags=["nbval-check-output"]
from datasets import load_dataset


def take_apart(row):
    question, answer = (turn["value"] for turn in row["conversations"])
    return {"question": question, "answer": answer}


support = load_dataset("json", data_files=DATASET, split="train").filter(lambda row: len(row["conversations"]) == 2)
support = support.map(take_apart, remove_columns="conversations")
general = load_dataset("json", data_files=GENERAL, split="train")
print(f"{len(support)} support questions and {len(general)} general ones, such as:")
general[0]

# %%
bos = tokenizer.bos_token if tokenizer("").input_ids else ""


def to_text(question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"text": tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(bos)}


support, general = (rows.map(lambda row: to_text(row["question"], row["answer"])) for rows in (support, general))
train_rows, general_rows = (rows.filter(lambda row: row["split"] == "train") for rows in (support, general))
support_held_out, right_answers = (rows.filter(lambda row: row["split"] == "held_out") for rows in (support, general))
wrong_answers = right_answers.map(lambda row: to_text(row["question"], row["wrong"]))
held_out_rows = {"support": support_held_out.select(range(12)), "right": right_answers, "wrong": wrong_answers}

# %% [markdown] lang="en"
# ## A run in one line
#
# These are chapter 04's calls in functions, so that a run is one line. The held-out loss is measured five times on the
# way. The held-out rows are masked once, and every run is measured on the same.

# %%
shared = dict(
    output_dir=f"{RUN_DIR}/tries",
    max_steps=MAX_STEPS,
    warmup_steps=min(5, MAX_STEPS // 4),
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    gradient_checkpointing=False,
    eval_strategy="steps",
    eval_steps=max(1, MAX_STEPS // 5),
    logging_steps=1,
    dataset_text_field="text",
    max_length=MAX_SEQ_LENGTH,
)

# %%
from trl import SFTConfig, SFTTrainer

runs = {}  # the trainer of every run, by its name


def new_trainer(rows, held_out, learning_rate=LEARNING_RATE, callbacks=(), **saving):
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=held_out,
        args=SFTConfig(learning_rate=learning_rate, **shared, **(saving or {"save_strategy": "no"})),
        callbacks=list(callbacks),
    )


# %%
trainer = train_on_responses_only(new_trainer(train_rows, held_out_rows))
held_out = trainer.eval_dataset
before = trainer.evaluate(held_out["support"])["eval_loss"]


def train(name, rows, masked=True, markers=None, **changes):
    set_peft_model_state_dict(model, untrained)  # begin at the base model again
    runs[name] = trainer = new_trainer(rows, rows.select(range(4)), **changes)  # held-out rows follow below
    if masked:
        train_on_responses_only(trainer, **(markers or {}))
    trainer.eval_dataset = held_out["support"]
    try:
        trainer.train()
    except ValueError as error:  # a run that stop_on_divergence ended
        print(error)


# %% [markdown] lang="en"
# Two more: one draws the losses of some runs, the other asks the model as it is now.

# %%
import matplotlib.pyplot as plt


def draw(*names):
    _, panels = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    for panel, measure, first in zip(panels, ("loss", "eval_loss"), ([], [(0, before)])):
        for name in names:
            log = runs[name].state.log_history
            points = first + [(entry["step"], entry[measure]) for entry in log if measure in entry]
            panel.plot(*zip(*points), label=f"{name}: {points[-1][1]:.2f} at the end")
        panel.legend(frameon=False, fontsize=8)
        panel.set_xlabel("step")
    panels[0].set_title("training loss")
    panels[1].set_title("held-out loss")
    plt.show()


# %%
def ask(question):
    FastLanguageModel.for_inference(model)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(model.device), max_new_tokens=48, do_sample=False)
    FastLanguageModel.for_training(model)
    print(f"{question}\n→ {tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")


support_question = support_held_out[0]["question"]
ask(support_question)

# %% [markdown] lang="en"
# ## A run that works
#
# Both losses fall fast at first, then more slowly. The other runs are drawn beside this one.

# %%
train("works", train_rows)
draw("works")
ask(support_question)

# %% [markdown] lang="en"
# How much did it forget? A model knows an answer if it finds the right one likelier, token for token, than the wrong
# one; by guessing it would know 10 of 20. The loss of the right answers says how likely they are. For the untouched
# model the adapter is switched off.

# %%
import torch


def answer_loss(row):
    tensors = {name: torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels")}
    half = torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32)
    with torch.no_grad(), half:  # as in training
        return model(**tensors).loss.item()


def ask_general():
    right, wrong = ([answer_loss(row) for row in held_out[answers]] for answers in ("right", "wrong"))
    return {"known": sum(a < b for a, b in zip(right, wrong)), "loss": sum(right) / len(right)}


# %%
with model.disable_adapter():
    knowledge = {"untouched": ask_general()}
knowledge["works"] = ask_general()
ask(right_answers[0]["question"])
knowledge

# %% [markdown] lang="en"
# ## The rate is too low
#
# *Symptom*: both losses hardly move, by a few hundredths of what they were, and the replies are the untouched model's.
# *Cause*: the steps go the right way and hardly get anywhere. *Change*: a rate three times as high, until a run is no
# better than the one before. More steps help too, and cost more.

# %%
train("rate too low", train_rows, learning_rate=LEARNING_RATE / 100)
draw("works", "rate too low")
ask(support_question)

# %% [markdown] lang="en"
# ## The rate is too high
#
# *Symptom*: the loss rises above where it began, and stays there; the replies are nonsense, or one word again and again.
# *Cause*: each step goes too far, and the next one starts from somewhere worse. *Change*: a third of the rate, and again
# until it falls. A run that diverged is lost, so `stop_on_divergence` ends it.

# %%
from helpers.training import check_evidence, held_out_losses, stop_on_divergence

set_peft_model_state_dict(model, untrained)
untouched = held_out_losses(model, held_out["support"])
train("rate too high", train_rows, learning_rate=25 * LEARNING_RATE, callbacks=[stop_on_divergence()])
draw("works", "rate too high")
ask(support_question)
after = held_out_losses(model, held_out["support"])
check_evidence(runs["rate too high"], before=untouched, after=after, learning_rate=25 * LEARNING_RATE)

# %% [markdown] lang="en"
# ## Learned by heart
#
# Four conversations, seen again and again. *Symptom*: the training loss goes to almost nothing, the held-out loss
# stops falling and turns up. *Cause*: the model learns these four answers, not how answers are made. Ten passes over
# few rows are enough for that. In chapter 04 `KEEP_BEST` measures often enough for you to see it.

# %%
train("by heart", train_rows.select(range(4)))
draw("works", "by heart")

# %%
after = held_out_losses(model, held_out["support"])
check_evidence(runs["by heart"], before=untouched, after=after, learning_rate=LEARNING_RATE)

# %% [markdown] lang="en"
# *Change*: more conversations, as in the run that works. Where there are none, stop in time.
# `EarlyStoppingCallback` ends a run whose held-out loss found no new lowest twice in a row, and
# `load_best_model_at_end` goes back to where it was lowest. In chapter 04 `KEEP_BEST` does both.

# %%
from transformers import EarlyStoppingCallback

train(
    "best kept",
    train_rows.select(range(4)),
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    save_strategy="best",
    load_best_model_at_end=True,
)
runs["best kept"].evaluate()  # of the weights that it went back to
draw("works", "by heart", "best kept")

# %% [markdown] lang="en"
# ## The wrong words were trained
#
# Somebody left `train_on_responses_only` out. *Symptom*: hardly any. The losses look well, and the held-out one falls a
# little more slowly. *Cause*: every token is trained, so part of what is learned is how customers ask. Only a look at
# the labels tells.

# %%
train("no mask", train_rows, masked=False)
draw("works", "no mask")

# %% [markdown] lang="en"
# *Change*: the line is put back, and the run is the one that works.
#
# ## The wrong form was trained
#
# Somebody wrote the conversations in a form of their own. *Symptom*: in a run of yours both losses fall, because the
# held-out rows have that form too; replies may run on, or miss the style. Here the held-out loss is measured in the form
# in which the model is asked, and falls less. *Cause*: two dialects.


# %%
def to_own_form(row):
    return {"text": f"### Question:\n{row['question']}\n\n### Answer:\n{row['answer']}{tokenizer.eos_token}"}


markers = {"instruction_part": "### Question:\n", "response_part": "### Answer:\n"}
train("own form", train_rows.map(to_own_form), markers=markers)
draw("works", "own form")
ask(support_question)

# %% [markdown] lang="en"
# What `check_masking` says of these two runs, and of the one that works:

# %%
from helpers.masking import check_masking

for name in ("works", "no mask", "own form"):
    try:
        check_masking(runs[name].train_dataset, tokenizer=tokenizer).raise_if_failed()
        print(f"{name}: no fault\n")
    except ValueError as error:
        print(f"{name}: {error}\n")

# %% [markdown] lang="en"
# *Change*: `apply_chat_template`, as in chapter 03.
#
# ## It forgot what it knew
#
# *Symptom*: the held-out loss is fine, and questions about anything else get a support reply, as the capital of France
# did above. *Cause*: nothing in the training said that other questions exist. *Change*: mix other conversations in. Here
# general questions are a tenth of all rows, then three tenths; none of them is one of the 20.

# %%
from datasets import concatenate_datasets

for name, share in (("10 % general", 0.1), ("30 % general", 0.3)):
    count = round(len(train_rows) * share / (1 - share))
    mixed_in = concatenate_datasets([general_rows, general_rows]).select(range(count))  # 48 rows, some twice
    train(name, concatenate_datasets([train_rows, mixed_in]).shuffle(seed=3407))
    knowledge[name] = ask_general()
    ask(right_answers[0]["question"])

draw("works", "10 % general", "30 % general")
for name, result in knowledge.items():
    print(f"{name:12} {result['known']:2} of 20 answers known, loss of the right ones {result['loss']:.2f}")

# %% [markdown] lang="en"
# The general rows cost steps: with as many steps in all, fewer of them teach the support form. What is mixed in should
# look like what the model must not lose: add rows of FineTome to your file, or the model's own answers to questions of
# yours. Ask five such questions before and after.
#
# ## From symptom to change
#
# | what you see | the likely cause | what to change |
# |---|---|---|
# | both losses hardly move | rate too low | three times the rate; then more steps |
# | the loss rises above its start and stays there | rate too high | a third of the rate |
# | training loss near 0, held-out loss rises | learned by heart | more conversations; fewer steps; `KEEP_BEST` |
# | `check_masking` stops chapter 04: no labels, or a user's words trained | no mask | `train_on_responses_only` |
# | `check_masking` stops chapter 04: a BOS token, or other turns | wrong form | the chat template of chapter 03 |
# | other questions get your form as well | forgetting | 10 to 30 % other conversations |

# %%
logs = {name: trainer.state.log_history for name, trainer in runs.items() if name != "rate too high"}  # it ended early
run.record(
    "07_when_it_goes_wrong",
    held_out_loss={
        name: [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1] for name, log in logs.items()
    },
    general_loss={name: result["loss"] for name, result in knowledge.items()},
    general_known={name: result["known"] for name, result in knowledge.items()},
)
known = [f"{knowledge[name]['known']} {name}" for name in ("untouched", "works", "10 % general")]
print(f"Result: of 20 general answers known: {', '.join(known)}")

# %% [markdown] lang="en"
# ## Where you are
#
# You have seen each fault once, and know what shows it.
#
# On your own: set `MAX_STEPS` to 60 and see which runs get better and which get worse. Mix in 1 % general rows.
#
# In practice: change one thing at a time, and keep the held-out rows the same. LoRA forgets less than training all
# weights, and [learns less](https://arxiv.org/abs/2405.09673). A small share of
# [earlier data](https://arxiv.org/abs/2205.12393) keeps much of what was there.
#
# {{next}}
