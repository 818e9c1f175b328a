# %% [markdown] lang="en"
# # Save, merge, export to GGUF, reload and verify
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/06_save.ipynb)
#
# At the end you have your model in every form that others can load, and a table that says how close each is to the
# model that you trained.
#
# You can
# - choose between an adapter (10 to 100 MB, needs its base model), a merged model (whole) and GGUF files (whole and
#   small, for llama.cpp and Ollama, programs that run a model on a laptop),
# - merge without the rounding of 4 bits,
# - prove that the saved model answers like the one you trained,
# - publish it under your own name, if you want to.
#
# You need `adapter/` from chapter 04. If it is neither in the run folder nor in `DRIVE_DIR`, this chapter first runs
# chapters 02 to 04, training included.
#
# {{budget}}

# %%
# include: setup_cell.py

# %% [markdown] lang="en"
# `GGUF` names the quantised files to write; leave it empty to write none. `PUSH_TO` is empty: nothing leaves this
# machine. Give `your-name/your-model` to publish the form in `PUSH_FORM` on the Hugging Face Hub; that needs a token
# with write access in the environment variable `HF_TOKEN` (on Colab: the key icon, *Secrets*). `RUN_DIR`, `DRIVE_DIR`
# and `HUB_REPO` say where the adapter is found, as in chapter 04; `PROFILE`, `MODEL_NAME`, `DATASET`, `MAX_SEQ_LENGTH`
# and `MAX_STEPS` say how to train it, should it have to be trained first. `HF_ENDPOINT` and `USE_MODELSCOPE` choose
# the hub, as in chapter 01. What is published goes to `HF_ENDPOINT` too.

# %% tags=["parameters"]
# @title Choices
PROFILE = "auto"  # @param ["auto", "t4", "cpu"]
MODEL_NAME = ""  # @param {type:"string"}
DATASET = ""  # @param {type:"string"}
MAX_SEQ_LENGTH = None  # @param {type:"raw"}
MAX_STEPS = None  # @param {type:"raw"}
GGUF = "q4_k_m, q8_0"  # @param {type:"string"}
RUN_DIR = ""  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HUB_REPO = ""  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}
PUSH_TO = ""  # @param {type:"string"}
PUSH_FORM = "adapter"  # @param ["adapter", "merged", "gguf"]

# %%
from helpers.export import check_push, read_gguf_types
from helpers.handoff import open_run
from helpers.environment import choose_hub
from helpers.profiles import choose_profile, model_source

choose_hub(HF_ENDPOINT, modelscope=USE_MODELSCOPE)
quantization = read_gguf_types(GGUF)
check_push(PUSH_TO, PUSH_FORM, quantization=quantization)  # what would fail at the end is refused now
choices = dict(model_name=MODEL_NAME, dataset=DATASET, max_seq_length=MAX_SEQ_LENGTH, max_steps=MAX_STEPS)
profile = choose_profile(PROFILE, **choices, run_dir=RUN_DIR)
given = {name.upper(): value for name, value in choices.items()} | {"PROFILE": PROFILE}
needs = ("dataset", "adapter", "report.json")
run = open_run(profile.run_dir, needs=needs, drive=DRIVE_DIR, hub=HUB_REPO, parameters=given)

# %% [markdown] lang="en"
# ## The adapter
#
# Chapter 04 saved it with `model.save_pretrained(folder)` and `tokenizer.save_pretrained(folder)`. It holds the LoRA
# matrices, the name of the base model that they belong to, and the tokenizer with its chat template.

# %%
from helpers.export import list_files

adapter = run.artefact("adapter", base_model=profile.model_name)
list_files(adapter)

# %% [markdown] lang="en"
# ## Load it on 16-bit weights
#
# Merging adds $\frac{\alpha}{r} B A$ to each frozen $W$ and leaves one ordinary model. Training kept $W$ in 4 bits to save
# memory; merge into those, and the rounding error of every weight is baked in for good. So the base model is loaded
# unquantised: `load_in_4bit=False`. GGUF files are written with llama.cpp, which Unsloth looks for when it is imported,
# so this cell comes first. (On Colab Unsloth fetches its own.)

# %%
from helpers.export import use_llama_cpp

print(use_llama_cpp() if quantization else "GGUF is empty: no llama.cpp is needed.")

# %% [markdown] lang="en"
# Each LoRA matrix must fit the weight that it stands beside; `check_adapter` reads that from the files' headers.

# %%
from unsloth import FastLanguageModel  # before the check: it patches transformers

from helpers.export import check_adapter

base = model_source(profile.model_name)
print(check_adapter(adapter, base))

# %% [markdown] lang="en"
# ## Does it fit?
#
# A free Colab VM has about 12 GB of memory and ends without a word when it is used up. The model's size says what each
# step will take, so ask before the weights are loaded and anything is written. The last two rows count: what is needed
# must be less than what is free.

# %%
from helpers.export import count_parameters, plan_export

parameters = count_parameters(base)
print(f"{parameters:,} parameters without the adapter's")
plan = plan_export(parameters, folder=run.path, quantization=quantization, drive=run.mirror)
plan.raise_if_failed()
plan

# %% [markdown] lang="en"
# Now the base model, with the adapter on top. On a T4 its 16-bit weights are downloaded, over 6 GB for the 3B; chapter
# 04 needed the 4-bit ones alone. (A processor without 16-bit instructions gets them as 32 bits.) `require_template`
# makes sure that the model will be asked in the form that it was trained in.

# %%
from helpers.export import require_16_bit
from helpers.template import require_template

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=str(adapter),
    max_seq_length=profile.max_seq_length,
    dtype=None,
    load_in_4bit=False,
)
require_16_bit(model)
require_template(tokenizer, expected=run.facts("adapter")["template"], model=model)
FastLanguageModel.for_inference(model)
print(f"Loaded as {model.dtype}")

# %% [markdown] lang="en"
# ## What the model in memory says
#
# These are the answers that every saved form is held against: greedy replies to held-out questions, and how likely the
# model finds each token of the right answers. A reply may differ from chapter 05's, where the base was in 4 bits.

# %%
from datasets import load_from_disk

from helpers.chat import stop_tokens
from helpers.export import probe_model

held_out = load_from_disk(run.artefact("dataset"))["held_out"]
held_out = held_out.select(range(min(8, len(held_out))))
conversations = held_out["conversations"]
in_memory = probe_model(model, tokenizer, conversations)
model_stops = stop_tokens(tokenizer, model)
print(f"{conversations[0][-2]['content']}\n\n{in_memory.replies[0]}\n\nPerplexity: {in_memory.perplexity:.4f}")

# %% [markdown] lang="en"
# *Perplexity* is how many equally likely tokens the model hesitates between, on average, at each token of the right
# answer: 1 would be certainty.
#
# ## Merge
#
# `run.write` gives a temporary folder and renames it when everything is there, so that a merge that was interrupted
# never looks like a finished one.

# %% tags=["handoff"]
facts = run.facts("adapter")
with run.write("merged", base_model=profile.model_name, template=facts["template"]) as folder:
    model.save_pretrained_merged(str(folder), tokenizer, save_method="merged_16bit")
merged = run.artefact("merged")
list_files(merged)

# %% [markdown] lang="en"
# ## Export to GGUF
#
# A GGUF file holds weights, tokenizer and chat template in one. `q8_0` keeps about 8 bits a weight, `q4_k_m` about 5 in
# a Llama; in SmolLM2, whose rows are no multiple of 256 weights, llama.cpp takes finer types for most of it. Ollama
# also reads a `Modelfile`; its template and stop words are derived from the tokenizer's, because a model that is asked
# in another form than it was trained in answers worse. (`num_ctx` is how many tokens Ollama keeps of a conversation:
# `max_seq_length`, since the model was trained on nothing longer. Raise it for long conversations.) It is made first:
# the export takes minutes.

# %%
from helpers.export import make_modelfile, write_modelfile

if quantization:
    options = dict(gguf_file=f"model-{quantization[0]}.gguf", context_tokens=profile.max_seq_length)
    modelfile = make_modelfile(model, tokenizer, **options)
    print(modelfile)

# %% [markdown] lang="en"
# Unsloth writes a 16-bit GGUF file first, larger than the two others together, into the folder that it works in: here
# the temporary one, with which that file goes.

# %% tags=["handoff"]
import contextlib

from helpers.export import keep_gguf

if quantization:
    with run.write("gguf", base_model=profile.model_name, template=facts["template"]) as folder:
        folder.mkdir()
        with contextlib.chdir(folder):
            model.save_pretrained_gguf(str(folder / "model"), tokenizer, quantization_method=list(quantization))
        keep_gguf(folder, name="model")
        write_modelfile(folder, modelfile)
    gguf = run.artefact("gguf")
list_files(gguf) if quantization else "no GGUF files"

# %% [markdown] lang="en"
# To talk to it, bring the folder `gguf/` to a machine with Ollama (from Colab, download it: the folder icon); there
# `ollama create my-model -f Modelfile`, then `ollama run my-model`.
#
# ## Reload every form in a fresh process
#
# A model that answers in this notebook proves little about its files: it is still in memory. Now it goes, and each form
# is asked by a process that has nothing but the files: the adapter through Unsloth, the merged model through plain
# Transformers, each GGUF file through `llama-server` and its OpenAI-style API, as any program would ask it.

# %%
import gc

import torch

from helpers.export import SavedForm, probe_gguf, probe_in_fresh_processes

del model
gc.collect()
torch.cuda.empty_cache()
forms = {"adapter": SavedForm(adapter), "adapter, 4-bit base": SavedForm(adapter, load_in_4bit=True)}
forms["merged"] = SavedForm(merged, library="transformers")
probes = probe_in_fresh_processes(forms, conversations)
for name in quantization:
    file = gguf / f"model-{name}.gguf"
    probes[f"GGUF {name}"] = probe_gguf(file, conversations, tokenizer=tokenizer, model_stops=model_stops)

# %% [markdown] lang="en"
# ## The verdict
#
# Adapter and merged model must give the same replies, word for word; only where the model in memory itself found two
# tokens nearly equal (one at most 1.65 times as likely as the other) may they part, because merging rounds too: $W +
# \frac{\alpha}{r} B A$ is stored in 16 bits. The GGUF files round the weights more, so their words may differ.
# Perplexity must stay within 1 %, and within 10 % in GGUF files of other types than `q8_0`. Where the data have a house
# style (the three lines of the support replies), every form must write as many replies in it as the model in memory.
# The adapter on the 4-bit base is how chapter 05 talks to it; that base is no file of yours, so its perplexity is only
# shown.

# %%
from helpers.chat import judge_reply
from helpers.export import compare_exports

judged = "product" in held_out.column_names


def in_style(row, reply):
    return judge_reply(reply, product=held_out["product"][row], right_help=()).house_style


exports = compare_exports(in_memory, probes, tokenizer=tokenizer, in_style=in_style if judged else None)
exports

# %% [markdown] lang="en"
# Read a row from left to right: how many replies are the same text; how many of their first 32 tokens; by how much the
# log-probabilities of the right answers' tokens moved, on average and at worst; how far the whole distributions are
# apart (Kullback-Leibler divergence, where a form gives them whole); and perplexity. On the 4-bit base it may even be
# lower than in memory: the adapter learned beside that rounding, and makes up for some of it.
#
# A form that missed a limit stops here, before anyone can take it for your model.

# %%
exports.raise_if_failed()

# %% [markdown] lang="en"
# ## The model card
#
# A model without a card is a riddle to whoever finds it, you included. This one is written from what the chapters
# recorded.

# %% tags=["handoff"]
from helpers.export import make_model_card

name = PUSH_TO or f"{profile.model_name.rpartition('/')[2]}-tuned"
card = make_model_card(run, form=PUSH_FORM, name=name, base_model=profile.model_name, exports=exports)
with run.write("README.md", base_model=profile.model_name) as path:
    path.write_text(card, encoding="utf-8")
print(card)

# %% [markdown] lang="en"
# ## Publish, if you want to
#
# Only with a name in `PUSH_TO`, and then the very files that were verified, with the card, into a private repository.
# The access token is read from Colab's secrets or the environment (`HF_TOKEN`), or is what `hf auth login` stored; it is
# never printed. Mind the licences: a model made from Llama 3.2 carries Meta's community licence and must have "Llama"
# at the beginning of its name.

# %%
from helpers.export import hub_token
from helpers.export import publish

if PUSH_TO:
    options = dict(card=card, base_model=profile.model_name, token=hub_token())
    print(publish(run.artefact(PUSH_FORM), repository=PUSH_TO, **options))
else:
    print("PUSH_TO is empty: nothing was published.")

# %%
passed = sum(not check.faults for check in exports.checks)
print(f"Result: {passed} of {len(exports.checks)} forms answer within their limits as the model in memory")

# %% [markdown] lang="en"
# ## Where you are
#
# You have `adapter/`, `merged/`, `gguf/` with its `Modelfile`, and a model card in the run folder, and know how close
# each is to what you trained.
#
# On your own: add `q2_k` to `GGUF` and see how far it moves from the model in memory, and whether a limit stops the
# chapter; load with `load_in_4bit=True` and read why the chapter stops; change a word in the Modelfile's template and
# ask Ollama again.
#
# Start again with data of your own: put the file on your Drive (or anywhere on your own
# computer), and give its full path as `DATASET`, and the same `DRIVE_DIR`, in [chapter 03](03_data.ipynb) and the
# chapters after it.
#
# {{next}}
