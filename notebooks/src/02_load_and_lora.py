# %% [markdown] lang="en"
# # Load the model in 4-bit and add LoRA
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/02_load_and_lora.ipynb)
#
# At the end you have a frozen chat model in 4 bits, with small matrices beside it that are ready to train.
#
# You can
# - load a model in 4 bits and see what that saves,
# - say what each argument of `from_pretrained` and `get_peft_model` does,
# - count what LoRA trains, and what another size would train,
# - show that an untrained adapter changes nothing.
#
# You need nothing from chapter 01, and nothing is handed on: chapter 04 repeats the two calls.
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `MODEL_NAME`, `HF_ENDPOINT` and `USE_MODELSCOPE` are as in chapter 01. `MAX_SEQ_LENGTH` is the longest conversation
# that training will see, in tokens.

# %% tags=["parameters"]
# @title Choices
MODEL_NAME = "unsloth/Llama-3.2-3B-Instruct"  # @param {type:"string"}
MAX_SEQ_LENGTH = 2048  # @param {type:"integer"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.environment import check_choices, find_model

check_choices(globals())
MODEL_NAME = find_model(MODEL_NAME, endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE)
print(f"Found: {os.path.basename(MODEL_NAME)}")

# %% [markdown] lang="en"
# ## Load the model
#
# Names under `unsloth/` need no account. A *gated* model, such as `meta-llama/…`, needs `token=` with the access token
# of somebody who has accepted its licence.
#
# In 4 bits there are 16 values for a weight. NF4, the format of
# [QLoRA](https://arxiv.org/abs/2305.14314), places them where weights are dense, and gives every 64 weights a scale of
# their own. To compute with them, Unsloth turns them into 16 bits for a moment.

# %%
from unsloth import FastLanguageModel  # before transformers, peft and trl: it patches them

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL_NAME,
    max_seq_length=MAX_SEQ_LENGTH,  # memory grows with it; Llama 3.2 can take 131,072
    dtype=None,  # float16 on a T4, bfloat16 on newer cards
    load_in_4bit=True,
)

# %% [markdown] lang="en"
# Are they 4 bits? A model is a stack of equal *blocks*, each with seven *linear layers*, which are tables of weights.
# Four belong to *attention*, where a token gathers from those before it, and three to the *feed-forward* part, which
# works on each token alone. The count shows them as `Linear4bit`.

# %% tags=["nbval-check-output"]
from collections import Counter

kinds = Counter(type(module).__name__ for module in model.modules() if hasattr(module, "in_features"))
parameters = model.num_parameters()
print(f"{parameters:,} weights; linear layers: {dict(kinds)}")

# %% [markdown] lang="en"
# What did that save? The table through which tokens enter and leave stays in 16 bits.

# %%
print(f"{model.get_memory_footprint() / 2**20:.0f} MiB of weights")
print(f"{2 * parameters / 2**20:.0f} MiB in 16 bits")

# %% [markdown] lang="en"
# ## What LoRA adds
#
# A linear layer computes $y = Wx$. LoRA, *low-rank adaptation*, leaves $W$ alone and adds a detour through two thin
# matrices: $y = Wx + \frac{\alpha}{r}\,B A x$. $A$ squeezes the input down to $r$ numbers and $B$ spreads them out
# again. Only $A$ and $B$ are trained. Together they are the *adapter*.
#
# The picture shows the first `q_proj`, one of attention's four layers. Lengths are to scale; the thin sides are drawn
# thicker than they are.

# %%
from helpers.figures import draw_lora

query = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
draw_lora(out_features=query.out_features, in_features=query.in_features, rank=16)

# %% [markdown] lang="en"
# ## Add LoRA
#
# Training first computes an answer, then in which direction to move each trained weight. These directions are the
# *gradients*. Gradient checkpointing saves memory by computing some things twice; chapter 04 says when that pays.

# %%
model = FastLanguageModel.get_peft_model(
    model,
    r=16,  # the rank: how much the detour can hold; 8 to 64 are usual
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],  # all seven
    lora_alpha=16,  # scales the detour by alpha / r; raise it together with r
    lora_dropout=0,  # a little, such as 0.05, is a means against learning by heart
    bias="none",  # Llama's linear layers have none
    use_gradient_checkpointing=False,
    random_state=3407,  # the same A in every run
    use_rslora=False,  # scales by alpha / sqrt(r), for ranks far above 16
    loftq_config=None,  # a start that repairs rounding; it needs the 16-bit weights
)

# %% [markdown] lang="en"
# ## Count what is trained
#
# A layer with $n$ inputs and $m$ outputs gets $r\,(n + m)$ trained numbers beside its own $n\,m$.

# %% tags=["nbval-check-output"]
trainable, total = model.get_nb_trainable_parameters()
print(f"{trainable:,} of {total:,} numbers are trained: {100 * trainable / total:.2f} %")

# %% [markdown] lang="en"
# The count grows in step with the rank. Each trained number costs more than its own memory: it also has a gradient,
# and two running averages of it that say how far the next step goes.

# %% tags=["nbval-check-output"]
for rank in (4, 8, 16, 32, 64):
    count = trainable * rank // 16
    share, memory = count / (total - trainable + count), 10 * count / 2**20  # weight 4 bytes, gradient 4, averages 2
    print(f"r = {rank:2}: {count:>12,} trained, {100 * share:5.2f} % of the model, {memory:6.1f} MiB")

# %% [markdown] lang="en"
# ## It starts as the base model
#
# $B$ starts at zero, so the detour adds nothing, and training begins exactly at the model that you loaded. $A$ starts
# with small random numbers, drawn by `random_state`.

# %% tags=["nbval-check-output"]
matrices = [matrix for name, matrix in model.named_parameters() if "lora_B" in name]
print(f"{sum(bool(matrix.any()) for matrix in matrices)} of {len(matrices)} matrices B differ from zero")

# %% tags=["nbval-check-output"]
first = next(matrix for name, matrix in model.named_parameters() if "lora_A" in name)
print("The first A begins with", [round(number, 3) for number in first[0, :4].tolist()])

# %%
print(f"Result: {trainable:,} numbers are trained, {100 * trainable / total:.1f} % of the model")

# %% [markdown] lang="en"
# ## Which rank, which model
#
# Begin with `r=16` and `lora_alpha=16`. Double both where chapter 04 learns too little and more steps do not help; a
# form or a tone [needs little](https://arxiv.org/abs/2106.09685).
#
# | | 1B | 3B |
# |---|---|---|
# | general knowledge, [MMLU](https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct) | 49 % | 63 % |
# | time of a step | 1 | 1.6 to 2 times that |
# | file for a laptop | 0.8 GB | 2 GB |
#
# Try the 1B first, the 3B where its replies are too weak.

# %% [markdown] lang="en"
# ## Where you are
#
# You have seen the two calls that every fine-tuning with Unsloth begins with.
#
# On your own: leave the three feed-forward modules out and see how many of the trained numbers were theirs.
#
# {{next}}
