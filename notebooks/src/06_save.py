# %% [markdown] lang="en"
# # Save, merge, reload and verify
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/06_save.ipynb)
#
# At the end you have your model in two forms that others can load, each reloaded in a fresh process and asked again.
#
# You can
# - choose between an adapter (a few MB, needs its base model) and a merged model (whole, needs nothing),
# - merge without the rounding of 4 bits,
# - prove that what you saved answers as what you trained,
# - publish it under your own name, if you want to.
#
# You need `adapter/` from chapter 04. If it is not in the run folder, this chapter makes it first.
#
# {{budget}}

# %%
# include: setup_cell.py

# %% [markdown] lang="en"
# `PUSH_TO` is empty: nothing leaves this machine. Give `your-name/your-model` to publish the adapter on the Hugging Face
# Hub; that needs a token with write access in the environment variable `HF_TOKEN` (on Colab: the key icon, *Secrets*).

# %% tags=["parameters"]
# @title Choices
PROFILE = "auto"  # @param ["auto", "t4", "cpu"]
MODEL_NAME = ""  # @param {type:"string"}
DATASET = ""  # @param {type:"string"}
MAX_SEQ_LENGTH = None  # @param {type:"raw"}
MAX_STEPS = None  # @param {type:"raw"}
RUN_DIR = ""  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HUB_REPO = ""  # @param {type:"string"}
PUSH_TO = ""  # @param {type:"string"}

# %%
from helpers.handoff import open_run
from helpers.profiles import choose_profile, model_source

choices = dict(model_name=MODEL_NAME, dataset=DATASET, max_seq_length=MAX_SEQ_LENGTH, max_steps=MAX_STEPS)
profile = choose_profile(PROFILE, **choices, run_dir=RUN_DIR)
given = {name.upper(): value for name, value in choices.items()} | {"PROFILE": PROFILE}
run = open_run(profile.run_dir, needs=("adapter", "dataset"), drive=DRIVE_DIR, hub=HUB_REPO, parameters=given)

# %% [markdown] lang="en"
# ## The adapter
#
# Chapter 04 saved it with `model.save_pretrained(folder)` and `tokenizer.save_pretrained(folder)`. It holds the LoRA
# matrices, the name of the base model that they belong to, and the tokenizer with its chat template.

# %%
adapter = run.artefact("adapter", base_model=profile.model_name)
for path in sorted(adapter.iterdir()):
    print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.name}")

# %% [markdown] lang="en"
# Load it as it was trained, on the 4-bit base model, and ask it some held-out questions. These answers are what the
# saved forms are compared with.

# %%
from datasets import load_from_disk
from unsloth import FastLanguageModel

from helpers.chat import batch_replies

model_source(profile.model_name)  # the base model has to be there, or the Hub has to answer
load_options = dict(max_seq_length=profile.max_seq_length, dtype=None)
model, tokenizer = FastLanguageModel.from_pretrained(str(adapter), load_in_4bit=True, **load_options)
FastLanguageModel.for_inference(model)
held_out = load_from_disk(run.artefact("dataset"))["held_out"]
questions = [turns[:-1] for turns in held_out["conversations"][:8]]
in_memory = batch_replies(model, tokenizer, questions)
print(f"{questions[0][-1]['content']}\n→ {in_memory[0]}")

# %% [markdown] lang="en"
# ## Reload the adapter in a fresh process
#
# A model that answers in this notebook proves little about its files: it is still in memory. A new Python process has
# nothing but the files.

# %%
from helpers.export import ask_in_fresh_process, compare_answers

from_adapter = ask_in_fresh_process(adapter, questions, load_in_4bit=True)
compare_answers("adapter, 4-bit base, fresh process", in_memory, from_adapter)

# %% [markdown] lang="en"
# ## Merge
#
# Merging adds $\frac{\alpha}{r} B A$ to each frozen $W$ and leaves one ordinary model. Do it on the 16-bit weights: on
# the 4-bit ones, the rounding errors would be baked in for good. So the base model is loaded again, unquantised.

# %%
import gc

import torch

del model
gc.collect()
torch.cuda.empty_cache()
model, tokenizer = FastLanguageModel.from_pretrained(str(adapter), load_in_4bit=False, **load_options)
FastLanguageModel.for_inference(model)
in_memory_16bit = batch_replies(model, tokenizer, questions)
compare_answers("adapter, 16-bit base, in memory", in_memory, in_memory_16bit)

# %% [markdown] lang="en"
# A few answers may differ from the 4-bit model's: the adapter was trained beside rounded weights and now stands beside
# exact ones.

# %% tags=["handoff"]
facts = run.facts("adapter")
with run.write("merged", base_model=profile.model_name, template=facts["template"]) as folder:
    model.save_pretrained_merged(str(folder), tokenizer, save_method="merged_16bit")
merged = run.artefact("merged")
for path in sorted(merged.iterdir()):
    print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.name}")

# %% [markdown] lang="en"
# ## Reload the merged model without Unsloth
#
# Whoever takes your merged model may have nothing but Transformers. A fresh process loads it with
# `AutoModelForCausalLM`, and must give the same answers as the adapter on the 16-bit base.

# %%
from_merged = ask_in_fresh_process(merged, questions, library="transformers")
compare_answers("merged, plain Transformers, fresh process", in_memory_16bit, from_merged)

# %% [markdown] lang="en"
# ## Publish, if you want to
#
# Only with a name in `PUSH_TO`. Mind the licences: a model made from Llama 3.2 carries Meta's community licence and must
# have "Llama" at the beginning of its name.

# %%
from helpers.export import hub_token

if PUSH_TO:
    model.push_to_hub(PUSH_TO, token=hub_token())
    tokenizer.push_to_hub(PUSH_TO, token=hub_token())
else:
    print("PUSH_TO is empty: nothing was published.")

# %%
same_adapter = sum(a == b for a, b in zip(in_memory, from_adapter, strict=True))
same_merged = sum(a == b for a, b in zip(in_memory_16bit, from_merged, strict=True))
print(f"Result: same answers after reloading: adapter {same_adapter}, merged {same_merged} of {len(questions)}")

# %% [markdown] lang="en"
# ## Where you are
#
# You have `adapter/` and `merged/` in the run folder, and know that both answer from their files alone.
#
# On your own: copy `merged/` to another machine and ask it there; merge from `load_in_4bit=True` instead and compare the
# answers.
#
# This was the last chapter. Start again with data of your own: give its file as `DATASET` in
# [chapter 03](03_data.ipynb).
