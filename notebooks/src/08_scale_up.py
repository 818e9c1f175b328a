# %% [markdown] lang="en"
# # Train on more than one GPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/08_scale_up.ipynb)
#
# At the end you have an adapter that all your GPUs trained together, with the proofs of chapter 04.
#
# You can
# - start one script on any number of GPUs, by torchrun or by Accelerate,
# - say what GPUs send each other, and what that costs,
# - keep a step as it was, or make it larger and change the learning rate with it,
# - say what to do where a model does not fit into one GPU.
#
# You need `dataset/` from chapter 03. Colab lends one GPU, Kaggle two T4s. With one GPU all of this runs as well.
#
# Two GPUs have not run this page yet. Two processes on a CPU have: they trained what one process trains.
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `PROCESSES` is how many GPUs train, 0 for all that are here. `MICRO_BATCH` × `ACCUMULATION` conversations are a step, as
# in chapter 04, and the GPUs share them out. With `GROW_BATCH` each GPU takes that many of its own.
#
# `SCALED_DIR` is the run folder that is made here. `RUN_DIR`, which holds the data, stays as it is.
#
# `START_AFRESH` begins anew instead of going on. `MAX_STEPS`, `LEARNING_RATE`, `CHECKPOINTING` and `PADDING_FREE` are as
# in chapter 04, `MODEL_NAME`, `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and `USE_MODELSCOPE` as in chapter 02.

# %% tags=["parameters"]
# @title Choices
MODEL_NAME = "unsloth/Llama-3.2-3B-Instruct"  # @param {type:"string"}
MAX_SEQ_LENGTH = 2048  # @param {type:"integer"}
PROCESSES = 0  # @param {type:"integer"}
GROW_BATCH = False  # @param {type:"boolean"}
MAX_STEPS = 60  # @param {type:"integer"}
LEARNING_RATE = 2e-4  # @param {type:"number"}
MICRO_BATCH = 8  # @param {type:"integer"}
ACCUMULATION = 1  # @param {type:"integer"}
CHECKPOINTING = True  # @param [False, True, "unsloth"] {type:"raw"}
PADDING_FREE = True  # @param {type:"boolean"}
START_AFRESH = False  # @param {type:"boolean"}
RUN_DIR = "runs/llama"  # @param {type:"string"}
SCALED_DIR = "runs/scaled"  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.environment import check_choices, find_model
from helpers.handoff import open_run

check_choices(globals())
MODEL_NAME = find_model(MODEL_NAME, endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE)
if os.path.realpath(SCALED_DIR) == os.path.realpath(RUN_DIR):
    raise ValueError("SCALED_DIR is the folder of RUN_DIR. Name another one.")
run = open_run(RUN_DIR, chapter="08_scale_up")
scaled = open_run(SCALED_DIR, base_model=MODEL_NAME)

# %% [markdown] lang="en"
# ## What each GPU does
#
# Each GPU has a *process* of its own, which holds the whole model. It takes its share of a step's conversations. Then
# all average their gradients, which is called *all-reduce*, and make the same change.
#
# Only LoRA's gradients travel: at 3B 24 million numbers, at most 97 MB for each step. This is what they take, by
# calculation. Computing a step of eight conversations takes 1.5 s with a T4's arithmetic, and longer on a real one.
#
# | between the GPUs | 2 GPUs | 8 GPUs |
# |---|---|---|
# | NVLink, NVIDIA's own cable, 300 GB/s | under 1 ms | under 1 ms |
# | PCIe 3, the slots of a computer, 10 GB/s | 10 ms | 17 ms |
# | a network of 10 Gbit/s between machines | 78 ms | 137 ms |
# | a network of 1 Gbit/s | 0.8 s | 1.4 s |

# %% [markdown] lang="en"
# ## Share a step out
#
# Eight conversations on one GPU, or four on each of two: the step is the same, and so is what is learned. It takes about
# half the time, as long as each GPU still has enough to compute. From eight GPUs on each would have one conversation.
#
# `GROW_BATCH` is for many GPUs: a step has more conversations, and there are fewer steps for the same data. Its gradients
# are less noisy, so each step may go further. With the optimiser Adam the rate grows with the
# [square root](https://arxiv.org/abs/2205.10287) of the step's size.

# %%
import torch

PROCESSES = PROCESSES or max(1, torch.cuda.device_count())
conversations = MICRO_BATCH * ACCUMULATION  # a step of one GPU
if GROW_BATCH:
    conversations *= PROCESSES
    LEARNING_RATE, MAX_STEPS = LEARNING_RATE * PROCESSES**0.5, max(1, MAX_STEPS // PROCESSES)
elif conversations % PROCESSES:
    raise ValueError(f"Set MICRO_BATCH × ACCUMULATION to a multiple of {PROCESSES}, or GROW_BATCH = True.")
else:
    share = conversations // PROCESSES
    MICRO_BATCH = max(size for size in range(1, MICRO_BATCH + 1) if share % size == 0)
    ACCUMULATION = share // MICRO_BATCH
print(f"{MICRO_BATCH} × {ACCUMULATION} on each of {PROCESSES}: {conversations} conversations a step")
print(f"{MAX_STEPS} steps, learning rate {LEARNING_RATE:.3g}")

# %% [markdown] lang="en"
# `plan_batch`, as in chapter 04, says whether one GPU's share fits.

# %%
from datasets import load_from_disk
from transformers import AutoTokenizer

texts = load_from_disk(f"{RUN_DIR}/dataset")["train"]["text"]
tokenizer = AutoTokenizer.from_pretrained(f"{RUN_DIR}/dataset/tokenizer")
lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=MAX_SEQ_LENGTH).input_ids]

# %%
from transformers import AutoConfig
from helpers.memory import plan_batch

choice = dict(micro_batch=MICRO_BATCH, accumulation=ACCUMULATION, checkpointing=CHECKPOINTING)
choice |= dict(padding_free=PADDING_FREE, lora_rank=16)
plan = plan_batch(AutoConfig.from_pretrained(MODEL_NAME), lengths=lengths, **choice)
plan.raise_if_failed()
plan

# %% [markdown] lang="en"
# ## Prepare the folder
#
# A script in a process of its own sees no notebook. So all that it needs goes into one folder: the data, and the
# arguments of `get_peft_model` and `SFTConfig`, which are those of chapter 04.

# %% tags=["handoff"]
import shutil

os.makedirs(f"{SCALED_DIR}/new", exist_ok=True)
shutil.copytree(f"{RUN_DIR}/dataset", f"{SCALED_DIR}/new/dataset", dirs_exist_ok=True)
facts = run.facts("dataset")
scaled.keep("dataset", **{name: facts[name] for name in ("template", "source", "dataset", "train_rows")})

# %%
lora = dict(
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing=CHECKPOINTING,
    random_state=3407,
)

# %%
training = dict(
    max_steps=MAX_STEPS,
    per_device_train_batch_size=MICRO_BATCH,
    gradient_accumulation_steps=ACCUMULATION,
    gradient_checkpointing=bool(CHECKPOINTING),
    padding_free=PADDING_FREE,
    train_sampling_strategy="random" if PADDING_FREE else "group_by_length",
    learning_rate=LEARNING_RATE,
    lr_scheduler_type="linear",
    warmup_steps=min(5, MAX_STEPS // 4),
    optim="adamw_8bit",
    weight_decay=0.01,
    max_length=MAX_SEQ_LENGTH,
    dataset_text_field="text",
    per_device_eval_batch_size=MICRO_BATCH,
    eval_strategy="steps",
    eval_steps=MAX_STEPS // 2 + 1,
    logging_steps=1,
    include_num_input_tokens_seen="non_padding",
    save_strategy="no",
    report_to="none",
    seed=3407,
    ddp_find_unused_parameters=False,  # every LoRA matrix takes part in every step, so none has to be looked for
)

# %% tags=["handoff"]
settings = {"model": MODEL_NAME, "plan": choice, "lora": lora, "training": training, "every_seconds": 300}
scaled.write_json("settings.json", settings)

# %% [markdown] lang="en"
# ## Start it
#
# [`scale_up.py`](scale_up.py) is chapter 04 as a script, a hundred lines long. Read it beside the quickstart: the calls
# are the same.
#
# Two programs can start it, once for each GPU. `torchrun` comes with PyTorch. `accelerate launch`, of the library that
# Transformers trains with, reads what it needs from a file:

# %%
accelerate = f"""compute_environment: LOCAL_MACHINE
distributed_type: {"MULTI_GPU" if PROCESSES > 1 else "'NO'"}
mixed_precision: 'no'  # the script's own settings decide
num_machines: 1
num_processes: {PROCESSES}
"""
with open(f"{SCALED_DIR}/accelerate.yaml", "w", encoding="utf-8") as file:
    file.write(accelerate)
folder = os.path.relpath(SCALED_DIR)
script = f'notebooks/scale_up.py "{folder}"' + " --start-afresh" * START_AFRESH
by_accelerate = f'accelerate launch --config_file "{folder}/accelerate.yaml" {script}'
by_torchrun = f"torchrun --nproc_per_node={PROCESSES} {script}"
print(by_accelerate, by_torchrun, sep="\n")

# %% [markdown] lang="en"
# Either line does, here or in a terminal. `start` runs it as a terminal would. It passes Stop on, so that the run is
# saved, and ends with the message of the process that failed.
#
# Run again, it goes on from the last checkpoint. For another number of GPUs run this chapter again from its top, with
# another `PROCESSES` and without `GROW_BATCH`: then a step has as many conversations as before.

# %%
scaled.start(by_accelerate)

# %% [markdown] lang="en"
# ## What came of it
#
# Each process has a number, its *rank*; LoRA's rank is something else. Rank 0 checked the mask and chapter 04's claims,
# and wrote. At the end all compared their adapters: had they not been equal, bit for bit, the run would have failed.

# %%
from IPython.display import Image

report = scaled.read_json("report.json")
before, after = report["held_out_loss"]["before"], report["held_out_loss"]["after"]
speeds = [row["tokens_per_second"] for row in report["curves"]["rows"] if row["tokens_per_second"]]
print(f"{report['environment']['device']}, {sorted(speeds)[len(speeds) // 2]:,.0f} tokens a second")
Image(f"{SCALED_DIR}/curves/curves.png")

# %% [markdown] lang="en"
# ## Where to type what
#
# **Kaggle.** *File → Import Notebook → GitHub* takes this page. Under *Settings* choose *GPU T4 x2* and *Internet on*. The
# first message prints the command that makes the data there. Download `SCALED_DIR` before the session ends.
#
# **One machine with several GPUs.** This notebook as it is, or one of the two lines in a terminal of the same
# environment. `CUDA_VISIBLE_DEVICES=0,1` in front takes the first two alone.
#
# **Several machines.** They need the same install, the same series and a folder that all of them see. For two with eight
# GPUs each set `PROCESSES` to 16, `GROW_BATCH`, and `SCALED_DIR` to `/shared/scaled`.
#
# Run this chapter up to *Start it* on one of them. Then type on each its own line, within a minute. `FIRST` is the first
# machine's name or address.
#
# ```
# torchrun --nnodes=2 --node-rank=0 --nproc-per-node=8 --master-addr=FIRST --rdzv-conf=timeout=60 notebooks/scale_up.py /shared/scaled
# torchrun --nnodes=2 --node-rank=1 --nproc-per-node=8 --master-addr=FIRST --rdzv-conf=timeout=60 notebooks/scale_up.py /shared/scaled
# ```
#
# Where a process fails on one machine, all end within a minute. The last lines name its rank and the cause, such as
# memory, a full disk, or other versions than those of rank 0. If a machine does not start, `torchrun` on the other one
# says `1/2 clients joined`. Mend it and type the lines again.
#
# ## What does not fit
#
# More GPUs are faster this way, but each holds the whole model, so no larger one fits. This is what a GPU needs, in GiB
# by chapter 04's formula, with `CHECKPOINTING = True`, 4 bits and LoRA's rank 16:
#
# | model | a conversation of 2,048 tokens | 8,192 | 32,768 |
# |---|---|---|---|
# | Llama 3.2 3B | 3.2 | 4.7 | 11.0 |
# | Llama 3.1 8B | 7.2 | 9.7 | 19.3 |
# | Llama 3.3 70B | 45.1 | 54.5 | 92.1 |
#
# A T4 has room for 13.3 of its 14.7. So the 8B fits, with conversations of up to 16,000 tokens. For longer ones take
# `CHECKPOINTING = "unsloth"` or a larger card.
#
# The 70B needs a card of 80 GB, or its weights spread over several. Of its 45.1 GiB 41.9 are weights. PyTorch's
# [FSDP2](https://docs.pytorch.org/tutorials/intermediate/FSDP_tutorial.html) divides them: at least 13.7 on each of four
# GPUs, 8.4 on each of eight.
#
# Unsloth's own switch for it is `UNSLOTH_FSDP2=1` under `torchrun`. This series did not try it; see
# [Unsloth on several GPUs](https://docs.unsloth.ai/basics/multi-gpu-training-with-unsloth).

# %%
trained_on = "1 process" if PROCESSES == 1 else f"{PROCESSES} processes"
print(f"Result: held-out loss {before:.2f} → {after:.2f} in {report['seconds']:.0f} s, {trained_on}")

# %% [markdown] lang="en"
# ## Where you are
#
# You have `adapter/`, `report.json` and `report.html` in `SCALED_DIR`. Chapters 05 and 06 read them from there with
# `RUN_DIR = "runs/scaled"`.
#
# On your own: set `GROW_BATCH`, and compare the held-out losses after the same data.
#
# In practice: one larger card is simpler than two small ones. First see whether a smaller `MAX_SEQ_LENGTH` or fewer
# steps do.
#
# {{next}}
