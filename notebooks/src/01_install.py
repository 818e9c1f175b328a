# %% [markdown] lang="en"
# # Install Unsloth and check the machine
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/01_install.ipynb)
#
# At the end you know that this machine can fine-tune a Llama 3.2 chat model, and with which settings.
#
# You can
# - say in a sentence what a language model, fine-tuning and Unsloth are,
# - install exactly the packages that the series was tested with,
# - see what was found on this machine, and what to do where something is missing,
# - tell the two profiles apart: `t4` for a GPU, `cpu` for a laptop without one.
#
# You need a browser and, for the `t4` profile, a Colab runtime with a T4 (*Runtime → Change runtime type → T4 GPU*); on
# your own computer, run `make setup` first.
#
# {{budget}}

# %% [markdown] lang="en"
# ## What you are about to do
#
# A **large language model** (LLM) reads text as a row of *tokens* (words and pieces of words) and predicts the next
# one. What it predicts depends on its *weights*, billions of numbers, which training changes a little at a time.
# Trained on much of the internet it knows a language and many facts; an *Instruct* model such as Llama 3.2 was then
# taught to answer. It still does not know your products, your tone or your format.
#
# **Fine-tuning** continues that training on your own examples (a few hundred conversations are often enough) until the
# model answers the way they do. Compared with a long prompt it costs nothing at each request, and it can teach
# behaviour that is hard to describe.
#
# Training all three billion weights does not fit into a free T4's 15 GiB. Two ideas make it fit: keep the base model's
# weights frozen in **4 bits** each, and train a few small extra matrices beside them (**LoRA**, chapter 02).
#
# **Unsloth** does that with less memory than the standard libraries: it computes the loss, the measure of the model's
# mistakes, piece by piece instead of keeping a prediction over the whole vocabulary for every token, and replaces many
# small steps by hand-written *kernels* (programs for the GPU). Weights in 4 bits (*quantised*: stored in fewer bits)
# both have. How much time it saves depends on the card and the settings. One comparison, on an H100 GPU that was given
# a T4's memory, in bfloat16, importing the libraries not counted: to load a model of Llama-3.2-3B's shape and train 60
# steps of 8 conversations takes chapter 04's settings 33 s and 6.9 GiB, and the standard libraries (Transformers, PEFT
# and TRL, with the largest batch that fits) 103 s and 14.2 GiB. A T4 has no bfloat16, and its arithmetic is what takes
# the time: expect a smaller difference in time there, which was not measured. `tests/benchmarks/README.md` has the details.

# %% [markdown] lang="en"
# ## Set up
#
# The next cell is the first of every chapter, because on Colab every notebook gets a machine of its own. On Colab and
# Kaggle it installs the packages of `requirements-colab.txt`, each in the one version that this series was tested with.
# It leaves all other packages alone, and shows which ones it changed. On your own computer it installs nothing, because
# `make setup` has done that.
#
# A new machine on Colab starts with Google's own set of packages, its *image*, which changes every few weeks. If our
# packages cannot work with that image, the cell says so before it installs anything. It then names another image, which
# you choose under *Runtime → Change runtime type → Runtime version*.
#
# The outputs below a cell, before you run it, were recorded without a GPU. A T4 trains a larger model on other
# conversations, so your figures and answers will differ.

# %%
# include: setup_cell.py

# %% [markdown] lang="en"
# Choices are made in one cell. `"auto"` takes the `t4` profile where a CUDA GPU is present and `cpu` otherwise. An
# empty `MODEL_NAME` means the profile's own model. Models and data sets are published on the Hugging Face Hub; some need
# an access token, a password that the Hub gives you. Name such a model, and the check below says so.
#
# Two choices are for readers who cannot reach the Hub. `HF_ENDPOINT` is the address of a copy of it, such as
# `"https://hf-mirror.com"`; that copy is sent your access token, if you have set one. `USE_MODELSCOPE` takes models from
# ModelScope, another place that publishes them. Data sets still come from the Hub or its copy.

# %% tags=["parameters"]
# @title Choices
PROFILE = "auto"  # @param ["auto", "t4", "cpu"]
MODEL_NAME = ""  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %% [markdown] lang="en"
# ## Check the machine
#
# One row for each thing that the series depends on. `ok` needs nothing, `warn` works, `fail` does not. Where a row is
# not `ok`, its last column says what to do.

# %%
from helpers.environment import check_environment
from helpers.environment import choose_hub

choose_hub(HF_ENDPOINT, modelscope=USE_MODELSCOPE)
environment = check_environment(model_name=MODEL_NAME or None)
environment

# %% [markdown] lang="en"
# A failed row stops here, with one line, rather than in the middle of a training run.

# %%
environment.raise_if_failed()

# %% [markdown] lang="en"
# ## See the profile
#
# A profile is a set of choices that the same cells run with. Any of them can be overridden in a chapter's *Choices*
# cell; the column `from` says whose value it is, the profile's or yours. On a laptop the series trains SmolLM2-135M, a
# small chat model of the same architecture as Llama. (Its weights come from a file with 4 bits a weight, turned into 16
# bits, so it answers somewhat worse than the original.) What each setting does is said in the chapter that uses it.

# %%
from helpers.profiles import choose_profile

profile = choose_profile(PROFILE, model_name=MODEL_NAME)
profile

# %% [markdown] lang="en"
# ## Import Unsloth
#
# Unsloth patches Transformers, PEFT and TRL when it is imported, so it comes before them in every chapter. Without a
# GPU it announces its CPU backend. The setup cell has silenced three warnings of other libraries that nobody can act
# on.

# %%
import unsloth
from unsloth import FastLanguageModel

print(f"Unsloth {unsloth.__version__} is ready: {FastLanguageModel.__name__}")

# %% [markdown] lang="en"
# This is the device that will train, and the number format that it computes in: 16 bits where it has instructions for
# them. A T4 has no bfloat16, so it computes in float16, which is finer but overflows sooner; many a laptop's processor
# has neither and computes in 32 bits.

# %%
import torch

device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
precision = (
    "bfloat16" if unsloth.is_bfloat16_supported() else "float16" if torch.cuda.is_available() else "float32"
)
print(f"Device: {device}. Precision: {precision}.")

# %%
passed = sum(row.verdict == "ok" for row in environment.rows)
print(f"Result: {passed} of {len(environment.rows)} checks ok, profile {profile.name}")

# %% [markdown] lang="en"
# ## Where you are
#
# You have a machine that is known to work. Nothing is kept: on Colab this installation ends with the notebook's
# machine, and the setup cell makes it again in the next chapter. Before you open that one, give this machine back
# (*Runtime → Disconnect and delete runtime*), because free Colab often lends one GPU at a time.
#
# On Colab, decide now where your results shall be kept: set `DRIVE_DIR` in chapters 02 to 06 to the same folder of your
# Google Drive, such as `"/content/drive/MyDrive/llama"`. Without it, what a chapter made ends with its machine, and the
# next chapter makes it again, training included.
#
# On your own: set `PROFILE` to `"t4"` on a machine without a GPU (to `"cpu"` on a T4), and read which settings differ.
#
# {{next}}
