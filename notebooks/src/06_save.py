# %% [markdown] lang="en"
# # Save, merge, export to GGUF, reload and verify
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/06_save.ipynb)
#
# At the end you have your model in every form that others can load, and a table that says how close each is to the
# model that you trained.
#
# You can
# - choose between an adapter, a merged model, and GGUF files for a laptop,
# - merge without the rounding of 4 bits,
# - prove that the saved model answers like the one you trained,
# - use it from other programs, and publish it if you want to.
#
# You need `dataset/`, `adapter/` and `report.json` from chapters 03 and 04, in the run folder or in `DRIVE_DIR`. Where
# they are in neither, a message prints the command that makes them here.
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `GGUF` names the GGUF files to write; `[]` writes none. `PUSH_TO` is empty, and nothing leaves this machine. With
# `"your-name/your-model"` the form in `PUSH_FORM` is published on the Hub at the end. `RUN_DIR` and `DRIVE_DIR` are as
# in chapter 03, `MODEL_NAME`, `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and `USE_MODELSCOPE` as in chapter 02.

# %% tags=["parameters"]
# @title Choices
MODEL_NAME = "unsloth/Llama-3.2-3B-Instruct"  # @param {type:"string"}
MAX_SEQ_LENGTH = 2048  # @param {type:"integer"}
GGUF = ["q4_k_m", "q8_0"]  # @param {type:"raw"}
PUSH_TO = ""  # @param {type:"string"}
PUSH_FORM = "adapter"  # @param ["adapter", "merged", "gguf"]
RUN_DIR = "runs/llama"  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.environment import check_choices, find_model
from helpers.handoff import open_run

check_choices(globals())
MODEL_NAME = find_model(MODEL_NAME, endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE)
run = open_run(RUN_DIR, chapter="06_save", base_model=MODEL_NAME, drive=DRIVE_DIR)

# %% [markdown] lang="en"
# ## The adapter
#
# Chapter 04 saved it with `save_pretrained`: the LoRA matrices, the name of the base model that they belong to, and the
# tokenizer with its chat template. It is small, and needs its base model.

# %%
import os

for file in sorted(os.scandir(f"{RUN_DIR}/adapter"), key=lambda file: -file.stat().st_size):
    print(f"{file.stat().st_size / 2**20:9.2f} MiB  {file.name}")

# %% [markdown] lang="en"
# ## Does it fit?
#
# A free Colab machine has about 12 GB of memory, and ends without a word when it is used up. So ask before anything is
# loaded or written: what is needed must be less than what is free. The adapter is held against its base model too.

# %%
from helpers.export import plan_export

plan = plan_export(run, MODEL_NAME, gguf=GGUF, push_to=PUSH_TO)
plan.raise_if_failed()
plan

# %% [markdown] lang="en"
# ## Load it on 16-bit weights
#
# Merging adds $\frac{\alpha}{r} B A$ to each frozen $W$ and leaves one ordinary model. Training kept $W$ in 4 bits. Merge
# into those, and the rounding of every weight stays for good. So the base model is loaded anew, in 16 bits; for the 3B
# that is a download of over 6 GB.

# %%
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=f"{RUN_DIR}/adapter", max_seq_length=MAX_SEQ_LENGTH, dtype=None, load_in_4bit=False
)
FastLanguageModel.for_inference(model)
print(f"Loaded as {model.dtype}")

# %% [markdown] lang="en"
# Is it the model of chapter 04? Its held-out loss may differ a little, because the 16-bit base is not rounded.

# %% tags=["nbval-check-output"]
from helpers.training import check_loaded

check_loaded(run, model, tokenizer)

# %% [markdown] lang="en"
# ## What the model in memory says
#
# Every saved form is held against these answers: greedy replies to held-out questions, and how likely the model finds
# each token of the right answers. *Perplexity* is between how many equally likely tokens it wavers at each of them; 1
# would be certainty.

# %%
from datasets import load_from_disk

conversations = load_from_disk(f"{RUN_DIR}/dataset")["held_out"]["conversations"][:8]

# %%
from helpers.export import probe_model

in_memory = probe_model(model, tokenizer, conversations)
print(f"{conversations[0][-2]['content']}\n\n{in_memory.replies[0]}\n\nPerplexity: {in_memory.perplexity:.4f}")

# %% [markdown] lang="en"
# ## Merge
#
# This writes one ordinary model, in 16 bits.

# %% tags=["handoff"]
model.save_pretrained_merged(f"{RUN_DIR}/new/merged", tokenizer, save_method="merged_16bit")
template = run.facts("adapter")["template"]
run.keep("merged", template=template)

# %% [markdown] lang="en"
# ## Export to GGUF
#
# A GGUF file holds weights, tokenizer and chat template in one, for llama.cpp and Ollama, programs that run a model on
# a laptop. `q8_0` keeps about 8 bits a weight, `q4_k_m` about 5. It takes minutes.

# %% tags=["handoff"]
if GGUF:
    model.save_pretrained_gguf(f"{RUN_DIR}/new/gguf/model", tokenizer, quantization_method=GGUF)

# %% [markdown] lang="en"
# Unsloth writes a 16-bit file too; `keep_gguf` drops it and gives the others short names. The same helper writes a `Modelfile`
# for Ollama, whose template and stop words come from the tokenizer: a model that is asked in another form than it was
# trained in answers worse.

# %% tags=["handoff"]
from helpers.export import keep_gguf

if GGUF:
    modelfile = keep_gguf(f"{RUN_DIR}/new/gguf", GGUF, model, tokenizer, context_tokens=MAX_SEQ_LENGTH)
    run.keep("gguf", template=template)
    print(modelfile)

# %% [markdown] lang="en"
# ## Reload every form in a fresh process
#
# A model that answers in this notebook proves little about its files: it is still in memory. Now it goes, and each form
# is asked by a process that has nothing but the files. The adapter is loaded by Unsloth, the merged model by plain
# Transformers, and each GGUF file is asked through `llama-server`, as any program would.

# %%
import gc
import torch
from helpers.export import verify_exports

del model
gc.collect()
torch.cuda.empty_cache()
forms = {name: f"{RUN_DIR}/adapter" for name in ("adapter", "adapter, 4-bit base")} | {"merged": f"{RUN_DIR}/merged"}
forms |= {f"GGUF {name}": f"{RUN_DIR}/gguf/model-{name}.gguf" for name in GGUF}
exports = verify_exports(in_memory, forms, conversations, tokenizer=tokenizer)
exports

# %% [markdown] lang="en"
# Adapter and merged model must give the same replies, word for word; a *near tie* is a place where the model in memory
# itself found two tokens nearly equal. GGUF files round the weights, so their words may differ. Perplexity may change
# by 1 %, and by 10 % in files of fewer than 8 bits.
#
# The adapter on the 4-bit base is how chapter 05 talks to it; that base is no file of yours, and is not judged. A form
# that missed a limit stops here, before anyone can take it for your model.

# %%
exports.raise_if_failed()

# %% [markdown] lang="en"
# ## Write the model card
#
# A model without a card is a riddle to whoever finds it, you included. This one is written from what the chapters
# recorded.

# %% tags=["handoff"]
from helpers.export import make_model_card

name = PUSH_TO or f"{os.path.basename(MODEL_NAME)}-tuned"
card = make_model_card(run, form=PUSH_FORM, name=name, base_model=MODEL_NAME, exports=exports)
with run.write("README.md") as path:
    path.write_text(card, encoding="utf-8")
print(card)

# %% [markdown] lang="en"
# ## Publish, if you want to
#
# Only with a name in `PUSH_TO`, and then the very files that were verified, with the card, into a private repository.
# The access token is the one in Colab's secrets (`HF_TOKEN`, the key icon), or what `hf auth login` stored. A model
# made from Llama 3.2 carries Meta's licence, and its name must begin with "Llama".

# %%
from helpers.export import publish

if PUSH_TO:
    print(publish(run, PUSH_FORM, repository=PUSH_TO, card=card, base_model=MODEL_NAME))
else:
    print("PUSH_TO is empty: nothing was published.")

# %% [markdown] lang="en"
# ## Use it elsewhere
#
# **Python.** The merged model needs nothing but Transformers, and is the fastest of these forms on a GPU.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

merged = AutoModelForCausalLM.from_pretrained(f"{RUN_DIR}/merged", dtype="auto", device_map="auto")
inputs = AutoTokenizer.from_pretrained(f"{RUN_DIR}/merged").apply_chat_template(
    conversations[0][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = merged.generate(**inputs.to(merged.device), max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# %% [markdown] lang="en"
# The adapter needs the library PEFT too, which loads the base model and puts the adapter on top.

# %%
from peft import AutoPeftModelForCausalLM

adapted = AutoPeftModelForCausalLM.from_pretrained(f"{RUN_DIR}/adapter", dtype="auto", device_map="auto")
output = adapted.generate(**inputs.to(adapted.device), max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# %% [markdown] lang="en"
# **Any program that can ask OpenAI.** `llama-server -m model-q4_k_m.gguf` serves a GGUF file, and any OpenAI client asks
# it at the address that it prints, path `/v1`. Here `serve_gguf` starts and ends it.

# %%
from helpers.export import serve_gguf

if GGUF:
    with serve_gguf(f"{RUN_DIR}/gguf/model-{GGUF[0]}.gguf") as server:
        answer = server.client.chat.completions.create(
            model="my-model", messages=conversations[0][:-1], temperature=0, max_tokens=64
        )
    print(answer.choices[0].message.content)

# %% [markdown] lang="en"
# **Ollama.** Bring the folder `gguf` to a computer with Ollama. The same client asks it at port 11434, path `/v1`.
# ```
# cd gguf
# ollama create my-model -f Modelfile
# ollama run my-model
# ```
# **vLLM**, for many users at once. It needs a GPU, and was not run here. On a T4 add `--dtype half`. The name for the
# client is `my-model`.
# ```
# vllm serve unsloth/Llama-3.2-3B-Instruct --enable-lora --lora-modules my-model=adapter
# ```
#
# ## Train on
#
# You have new conversations. The adapter is loaded as in chapter 05, and the trainer goes on from it, at a tenth of the
# rate. For the new ones run chapter 03 with another `RUN_DIR`, and load that folder's `dataset`. Mix old rows in, or it
# forgets them. Here sixteen old rows stand for the new ones.

# %%
from unsloth.chat_templates import train_on_responses_only
from trl import SFTConfig, SFTTrainer

del merged, adapted
gc.collect()
torch.cuda.empty_cache()
rows = load_from_disk(f"{RUN_DIR}/dataset")["train"]
rows = rows.select(range(min(16, len(rows))))
model, tokenizer = FastLanguageModel.from_pretrained(f"{RUN_DIR}/adapter", max_seq_length=MAX_SEQ_LENGTH)

# %%
settings = SFTConfig(
    output_dir=f"{RUN_DIR}/second",
    max_steps=4,
    learning_rate=2e-5,
    per_device_train_batch_size=2,
    gradient_checkpointing=False,
    max_length=MAX_SEQ_LENGTH,
    dataset_text_field="text",
    logging_steps=1,
    save_strategy="no",
)

# %%
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=settings)
trainer = train_on_responses_only(trainer)
trainer.train()
model.save_pretrained(f"{RUN_DIR}/second/adapter")
print("Loss of each step:", [round(entry["loss"], 2) for entry in trainer.state.log_history if "loss" in entry])

# %% [markdown] lang="en"
# The first loss is where chapter 04 ended, not where an untouched model begins: it goes on.

# %%
within = sum(not check.faults for check in exports.checks)
run.record(
    "06_save",
    perplexity_in_memory=in_memory.perplexity,
    same_replies={check.form: check.same_replies for check in exports.checks},
    perplexity_change={check.form: check.perplexity_change for check in exports.checks},
    forms=len(forms),
    forms_within_limits=within,
)
print(f"Result: {within} of {len(forms)} forms answer within their limits")

# %% [markdown] lang="en"
# ## Where you are
#
# You have `adapter/`, `merged/`, `gguf/` with its `Modelfile`, and a model card in the run folder, and know how close
# each is to what you trained.
#
# On your own: add `"q2_k"` to `GGUF` and see how far it moves. Load with `load_in_4bit=True` and read why the chapter
# stops. Change a word in the Modelfile's template and ask Ollama again.
#
# In practice: keep the adapter. It is the whole of your work, and every other form can be made from it again.
#
# {{next}}
