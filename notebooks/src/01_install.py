# %% [markdown] lang="en"
# # Install Unsloth and check the machine
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/01_install.ipynb)
#
# At the end a language model answers you, on a machine that is known to be able to train it.
#
# You can
# - say in a sentence what a language model, fine-tuning and Unsloth are,
# - install exactly the versions that this series was tested with,
# - read what a machine lacks, and what to do about it.
#
# You need a browser and a Google account. In Colab choose *Runtime → Change runtime type → T4 GPU*: Google then lends
# you a computer with a T4, a graphics card that is made for such work. On a computer of your own, the README's two
# commands take its place.
#
# {{budget}}

# %% [markdown] lang="en"
# ## What you are about to do
#
# A **language model** reads text as a row of *tokens*, which are words and pieces of words, and predicts the next one.
# What it predicts depends on its *weights*: billions of numbers that training changes a little at a time.
#
# Llama 3.2 knows a language and many facts from much of the internet. An *Instruct* model was then taught to answer. It
# does not know your products, your tone or your format.
#
# **Fine-tuning** goes on with that training on examples of your own, until the model answers the way they do. A few
# hundred conversations are often enough. Try a better prompt first: it costs nothing to change. Fine-tune when the
# prompt gets long, or when you can show what you want more easily than say it.
#
# Training all weights does not fit into a T4's memory of 15 GiB. Two ideas make it fit. The weights are stored in
# **4 bits** each and stay as they are. A few small tables of numbers beside them are trained: **LoRA**, chapter 02.
#
# **Unsloth** is a library that does this in less memory and time than others; by how much,
# [the benchmarks](https://github.com/your-org/llama-3.2-unsloth-t4/blob/main/tests/benchmarks/README.md) say.

# %% [markdown] lang="en"
# ## Set up
#
# On Colab every notebook gets a computer of its own, so each chapter begins with this cell. It installs the packages of
# `requirements-colab.txt`, each in the version that was tested, and shows what it changed. On your own computer it
# installs nothing, because `make setup` did.
#
# The outputs on this page were recorded before you opened it. Yours replace them as you run the cells.

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# Choices are made in one cell. `MODEL_NAME` is a model on the Hugging Face Hub, where models and data are published,
# or a folder that holds one. `HF_ENDPOINT` is the address of a copy of the Hub, for readers who cannot reach it.
# `USE_MODELSCOPE` takes models from ModelScope, another such place.

# %% tags=["parameters"]
# @title Choices
MODEL_NAME = "unsloth/Llama-3.2-3B-Instruct"  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %% [markdown] lang="en"
# ## Check the machine
#
# Each thing that the series depends on is tried, not assumed. A row appears where something needs attention, and its
# last column says what to do. A failed row stops here, with one line, rather than in the middle of a training run.

# %%
from helpers.environment import check_choices, check_environment

check_choices(globals())
environment = check_environment(MODEL_NAME, endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE)
display(environment)
environment.raise_if_failed()

# %% [markdown] lang="en"
# ## Load a model
#
# Unsloth patches other libraries when it is imported, so it comes before them in every chapter. `load_in_4bit` stores
# the weights in 4 bits; `max_seq_length` is the longest text that the model will read here, in tokens.

# %%
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL_NAME,
    max_seq_length=2048,
    load_in_4bit=True,
)

# %% [markdown] lang="en"
# A T4 computes in float16, newer cards in bfloat16, a processor without either in 32 bits.

# %%
print(f"{model.device}, {model.dtype}, {model.get_memory_footprint() / 2**30:.2f} GiB of weights")

# %% [markdown] lang="en"
# ## Ask it a question
#
# A conversation is a list of messages, each with a `role` and its `content`. The *tokenizer* writes it in the form that
# the model was taught, and turns it into tokens.

# %%
messages = [{"role": "user", "content": "My lamp does not switch on. What can I do?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(inputs["input_ids"][0]))

# %% [markdown] lang="en"
# `generate` adds the most likely token again and again, and `decode` turns tokens back into text.

# %%
inputs = inputs.to(model.device)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)

# %% [markdown] lang="en"
# It answers politely and in general terms. It has never seen your lamps. In chapter 04 the same kind of question gets
# the answer that a support team would give.

# %%
print(f"Result: an answer of {len(answer.split())} words, from {model.device}")

# %% [markdown] lang="en"
# ## Where you are
#
# You have a machine that is known to work, and you have talked to an untouched model. Nothing is kept. Give
# this machine back first (*Runtime → Disconnect and delete runtime*), because free Colab
# lends one GPU at a time.
#
# On your own: set `do_sample=True` and run the cell twice. Set `MODEL_NAME` to
# `"unsloth/Llama-3.2-1B-Instruct"` and compare answer and memory.
#
# {{next}}
