# %% [markdown] lang="en"
# # Load the model in 4-bit and add LoRA
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/02_load_and_lora.ipynb)
#
# At the end you have a frozen 4-bit chat model with LoRA matrices that are ready to train, and the settings that
# chapter 04 trains with.
#
# You can
# - load a model in 4 bits and see what that saves,
# - say what each argument of `from_pretrained` and `get_peft_model` does,
# - count what LoRA adds, by kind of layer, and what another rank would add,
# - show that an untrained adapter changes nothing.
#
# You need nothing from chapter 01: the setup cell is the same.
#
# {{budget}}

# %%
# include: setup_cell.py

# %% [markdown] lang="en"
# Empty means: the profile's own value. `PROFILE` is `"t4"` or `"cpu"`, and `"auto"` looks for a GPU. `MODEL_NAME` takes
# a Hub repository or a folder, `MAX_SEQ_LENGTH` the most tokens that a conversation may have. `RUN_DIR` is the folder
# through which the chapters hand their results on; it ends with a Colab machine. There, set
# `DRIVE_DIR = "/content/drive/MyDrive/llama"` (the same in every chapter): Colab asks you for permission, and a copy
# stays on your Google Drive, where the next chapter finds it. `HF_ENDPOINT` and `USE_MODELSCOPE` choose
# the hub, as in chapter 01; set them alike in every chapter.

# %% tags=["parameters"]
# @title Choices
PROFILE = "auto"  # @param ["auto", "t4", "cpu"]
MODEL_NAME = ""  # @param {type:"string"}
MAX_SEQ_LENGTH = None  # @param {type:"raw"}
RUN_DIR = ""  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.handoff import open_run
from helpers.environment import choose_hub
from helpers.profiles import choose_profile, model_source

choose_hub(HF_ENDPOINT, modelscope=USE_MODELSCOPE)
profile = choose_profile(PROFILE, model_name=MODEL_NAME, max_seq_length=MAX_SEQ_LENGTH, run_dir=RUN_DIR)
run = open_run(profile.run_dir, drive=DRIVE_DIR)
profile

# %% [markdown] lang="en"
# ## Load the model
#
# | argument | why |
# |---|---|
# | `model_name` | A repository on the Hugging Face Hub, or a folder. Names under `unsloth/` need no token; a *gated* one, such as `meta-llama/…`, needs `token=` with an access token of somebody who has accepted Meta's licence. |
# | `max_seq_length` | The longest conversation, in tokens, that training will see. Memory grows with it. Llama 3.2 itself can take 131,072. |
# | `dtype=None` | Let Unsloth choose the precision for what is not quantised: float16 on a T4, bfloat16 on newer cards. |
# | `load_in_4bit=True` | Keep the frozen weights as 4-bit NormalFloat numbers (NF4, from the QLoRA paper): a quarter of 16 bits. Every 64 weights share a scale. To compute with them, Unsloth turns them into 16 bits for a moment. For the Llama models it downloads a copy that is in 4 bits already. From ModelScope it takes the 16-bit weights. |
#
# `track_memory` measures the seconds and the memory of what is indented below it.

# %%
from unsloth import FastLanguageModel  # before transformers, peft and trl: it patches them

from helpers.memory import stage_table, track_memory

with track_memory("load in 4-bit") as load:
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=model_source(profile.model_name),
        max_seq_length=profile.max_seq_length,
        dtype=None,
        load_in_4bit=True,
    )

# %% [markdown] lang="en"
# Are they 4 bits? The model is a stack of equal *blocks*, each with seven *linear layers* (tables of weights: four in
# *attention*, where each token gathers from the tokens before it, and three in the *feed-forward* part, which works on
# each token alone). These are now `Linear4bit`; in the ready-made copy of Llama, Unsloth may have left some in 16 bits.
# The last linear layer stays as it was: it shares its 16-bit weights with the embedding, through which every token
# enters and leaves.

# %% tags=["nbval-check-output"]
from collections import Counter

kinds = Counter(type(module).__name__ for module in model.modules() if hasattr(module, "in_features"))
parameters = model.num_parameters()
print(f"{parameters:,} parameters; linear layers: {dict(kinds)}")

# %% [markdown] lang="en"
# What did that save? In a small model the embedding weighs much, so the whole shrinks to more than a quarter.

# %%
print(f"{model.get_memory_footprint() / 2**20:.0f} MiB of weights")
print(f"{2 * parameters / 2**20:.0f} MiB in 16 bits")

# %% [markdown] lang="en"
# ## What LoRA adds
#
# A linear layer computes $y = Wx$. LoRA (*low-rank adaptation*) leaves $W$ as it is and adds a detour through two thin
# matrices: $y = Wx + \frac{\alpha}{r}\,B A x$. $A$ squeezes the input down to $r$ numbers, $B$ spreads them out again.
# Only $A$ and $B$ are trained; together they are the *adapter*. The picture is drawn from this model's first `q_proj`
# (the *query projection*, one of attention's four layers). Lengths are to scale, but the thin sides are drawn thicker
# than they are.

# %%
from helpers.figures import draw_lora

query = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
draw_lora(out_features=query.out_features, in_features=query.in_features, rank=16)

# %% [markdown] lang="en"
# ## Choose the settings
#
# | setting | value | why |
# |---|---|---|
# | `r` | 16 | The rank: how much the detour can hold. 8 to 64 are usual; more costs memory and learns small sets by heart. |
# | `target_modules` | seven | Every linear layer of a block: the four of attention and the three of the feed-forward part. |
# | `lora_alpha` | 16 | The detour is scaled by α / r, here 1. Raise it together with `r`, or the detour counts for less. |
# | `lora_dropout` | 0 | No random zeros in the detour's input. A little, such as 0.05, is a means against learning by heart. |
# | `bias` | `"none"` | Llama's linear layers have no biases (numbers added after the multiplication) to train. |
# | `use_gradient_checkpointing` | the profile's | Training first computes the answer (forward), then in which direction to move each trained weight (the *backward pass*, which gives the *gradients*). `True` keeps only each block's input in between and recomputes the rest: less memory for more time. `"unsloth"` also moves those inputs to main memory, which saves the most (below a `max_seq_length` of 512 Unsloth takes `True` instead). Chapter 04 chooses it anew, by the memory and the data that there are. |
# | `random_state` | 3407 | Seeds $A$, so that your run can be repeated. |
# | `use_rslora` | `False` | *Rank-stabilised* LoRA scales by α / √r, for ranks far above 16. |
# | `loftq_config` | `None` | LoftQ starts $A$ and $B$ so that they repair the error of quantisation; it needs the 16-bit weights, and here only 4-bit ones are loaded. |

# %%
lora_settings = dict(
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing=profile.use_gradient_checkpointing,
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)

# %%
with track_memory("add LoRA") as add_lora:
    model = FastLanguageModel.get_peft_model(model, **lora_settings)

# %% [markdown] lang="en"
# ## Count what is trained
#
# A layer with $n$ inputs and $m$ outputs gets $r\,(n + m)$ trainable parameters, instead of its own $n\,m$.

# %% tags=["nbval-check-output"]
from helpers.training import count_trainable

trainable = count_trainable(model)
trainable

# %% [markdown] lang="en"
# The count grows in step with the rank. The memory of training grows by more than the matrices: each trained parameter
# also has a gradient, and two running averages of it in the *optimiser*, which makes the changes.

# %% tags=["nbval-check-output"]
frozen = trainable.total - trainable.trainable
for rank in (4, 8, 16, 32, 64):
    count = trainable.trainable * rank // lora_settings["r"]
    print(f"r = {rank:2}: {count:>12,} trainable parameters, {100 * count / (frozen + count):5.2f} % of the model")

# %% [markdown] lang="en"
# ## It starts as the base model
#
# $B$ starts at zero, so the detour adds nothing and the first step begins exactly at the model that you loaded. Chapter
# 04 counts again after training: a matrix $B$ that is still zero would have learned nothing. $A$ starts with small
# random numbers. The seed `random_state` draws them: run the chapter again on the same machine, and they are the same.

# %% tags=["nbval-check-output"]
from helpers.training import count_changed_adapters

changed, adapters = count_changed_adapters(model)
print(f"{changed} of {adapters} matrices B differ from zero")
first = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
print("The first A begins with", [round(number, 3) for number in first[0, :4].tolist()])

# %% [markdown] lang="en"
# What the two steps cost. *Allocated* is what tensors hold, *reserved* what PyTorch has taken from the card; the
# *peak* of reserved memory is what has to fit, and *peak %* its share of the card's memory. Without a GPU all of them
# are about this process, which holds Python and the libraries too, and this machine.

# %%
stage_table([load, add_lora])

# %% [markdown] lang="en"
# ## Hand the settings on
#
# Chapter 04 loads the model again and adds LoRA with these settings, but for the checkpointing, which it plans anew. On
# Colab it runs on another machine and finds them only through `DRIVE_DIR`.

# %% tags=["handoff", "nbval-check-output"]
path = run.write_json("lora.json", {"lora": lora_settings}, base_model=profile.model_name)
print(path.read_text())

# %%
share = 100 * trainable.trainable / trainable.total
print(f"Result: {trainable.trainable:,} trainable parameters, {share:.1f} % of the model")

# %% [markdown] lang="en"
# ## Where you are
#
# You have `lora.json` in the run folder: nine settings, each with a reason.
#
# On your own: set `r=64` and look at the counts; leave out the three feed-forward modules and see how many of the
# parameters were theirs. Then set the values back and run the chapter once more, because chapter 04 trains with what
# was written last.
#
# {{next}}
