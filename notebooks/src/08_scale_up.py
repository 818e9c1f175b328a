# %% [markdown] lang="en"
# # Train on more than one GPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/08_scale_up.ipynb)
#
# At the end you have an [adapter](glossary.ipynb#adapter) that all your GPUs trained together, with the proofs of
# chapter 04.
#
# You can
# - start one script on any number of GPUs, by torchrun or by Accelerate,
# - say what GPUs send each other, and what that costs,
# - keep a [step](glossary.ipynb#step) as it was, or make it larger and change the [learning rate](glossary.ipynb#learning-rate) with it,
# - say what to do where a model does not fit into one GPU.
#
# You need `dataset/` from chapter 03. Colab lends one GPU, Kaggle two T4s. With one GPU all of this runs as well.
#
# Two GPUs of a larger kind have run this page, with a small model: they trained what one trains. Two T4s have not.
#
# {{budget}}

# %% [markdown] lang="zh"
# # 在多块 GPU 上训练
#
# [![在 Colab 中打开](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/zh-CN/08_scale_up.ipynb)
#
# 学完这一章，你会有一个由全部 GPU 一起训练出来的[适配器](glossary.ipynb#adapter)，还会有和第 04 章一样的证据。
#
# 学完后你能
# - 用 torchrun 或 Accelerate，在任意多块 GPU 上启动同一个脚本；
# - 说出 GPU 之间传送什么，以及代价有多大；
# - 让一[步](glossary.ipynb#step)的大小保持不变，或者把它变大，并相应地调整[学习率](glossary.ipynb#learning-rate)；
# - 说出一块 GPU 放不下模型时该怎么办。
#
# 你需要第 03 章的 `dataset/`。Colab 提供一块 GPU，Kaggle 提供两块 T4。即使只有一块 GPU，这里的一切也都能运行。
#
# 这一页用一个小模型，在两块更大的 GPU 上运行过：训练的结果和用一块时相同。它还没有在两块 T4 上运行过。
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `PROCESSES` is how many GPUs train, 0 for all that are here. `MICRO_BATCH` × `ACCUMULATION` conversations are a step,
# as in chapter 04, and the GPUs share them out. With `GROW_BATCH` each GPU takes that many of its own.
#
# `SCALED_DIR` is the run folder that is made here. `RUN_DIR`, which holds the data, stays as it is.
#
# `START_AFRESH` begins anew instead of going on. `MAX_STEPS`, `LEARNING_RATE`, `CHECKPOINTING` and `PADDING_FREE` are
# as in chapter 04, `MODEL_NAME`, `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and `USE_MODELSCOPE` as in chapter 02.

# %% [markdown] lang="zh"
# `PROCESSES` 是参与训练的 GPU 数量，0 表示用上这里所有的 GPU。
# 和第 04 章一样，`MICRO_BATCH` × `ACCUMULATION` 段对话构成一步，由各块 GPU 分担。
# 打开 `GROW_BATCH` 后，每块 GPU 就不再分担，而是各自处理同样多段对话。
#
# `SCALED_DIR` 是这一章新建的运行文件夹。存放数据的 `RUN_DIR` 保持不变。
#
# 打开 `START_AFRESH` 就会从头开始，而不是接着训练。
# `MAX_STEPS`、`LEARNING_RATE`、`CHECKPOINTING` 和 `PADDING_FREE` 与第 04 章相同，
# `MODEL_NAME`、`MAX_SEQ_LENGTH`、`HF_ENDPOINT` 和 `USE_MODELSCOPE` 与第 02 章相同。

# %% tags=["parameters"]
# @title Choices · 选项
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
# all average their [gradients](glossary.ipynb#gradient), which is called [*all-reduce*](glossary.ipynb#all-reduce), and
# make the same change.
#
# Only [LoRA](glossary.ipynb#lora)'s gradients travel: at 3B 24 million numbers, at most 97 MB for each step. This is
# what they take, by calculation. Computing a step of eight conversations takes 1.5 s with a T4's arithmetic, and longer
# on a real one.
#
# | between the GPUs | 2 GPUs | 8 GPUs |
# |---|---|---|
# | NVLink, NVIDIA's own cable, 300 GB/s | under 1 ms | under 1 ms |
# | PCIe 3, the slots of a computer, 10 GB/s | 10 ms | 17 ms |
# | a network of 10 Gbit/s between machines | 78 ms | 137 ms |
# | a network of 1 Gbit/s | 0.8 s | 1.4 s |

# %% [markdown] lang="zh"
# ## 每块 GPU 做什么
#
# 每块 GPU 都有自己的**进程**（process），里面装着整个模型。在每一步里，每个进程只处理分给自己的那些对话。
# 然后，所有进程一起对[梯度](glossary.ipynb#gradient)求平均，这叫作[**全归约**](glossary.ipynb#all-reduce)（all-reduce）；最后各自做同样的更新。
#
# 需要传送的只有 [LoRA](glossary.ipynb#lora) 的梯度：3B 模型每一步传 2400 万个数，最多 97 MB。
# 下表是计算得出的传送时间。作为对比，按 T4 的算力测得，一步的八段对话要算 1.5 秒；真正的显卡还要更久。
#
# | GPU 之间的连接 | 2 块 GPU | 8 块 GPU |
# |---|---|---|
# | NVLink，NVIDIA 自家的连接，300 GB/s | 不到 1 ms | 不到 1 ms |
# | PCIe 3，电脑里的插槽，10 GB/s | 10 ms | 17 ms |
# | 机器之间 10 Gbit/s 的网络 | 78 ms | 137 ms |
# | 1 Gbit/s 的网络 | 0.8 s | 1.4 s |

# %% [markdown] lang="en"
# ## Share a step out
#
# Eight conversations on one GPU, or four on each of two: the step is the same, and so is what is learned. It takes
# about half the time, as long as each GPU still has enough to compute. With eight GPUs each would have one
# conversation.
#
# All wait for the GPU that has the most tokens. So the conversations of a step are dealt out evenly, the longest first.
# Measured with a T4's arithmetic, two GPUs trained the 3B 1.8 times as fast as
# one, and 2.0 times with `GROW_BATCH`.
#
# `GROW_BATCH` is for many GPUs: a step has more conversations, and there are fewer steps for the same data. Its
# gradients are less noisy, so each step may go further. With the [optimiser](glossary.ipynb#optimiser) Adam the rate
# grows with the [square root](https://arxiv.org/abs/2205.10287) of the step's size.

# %% [markdown] lang="zh"
# ## 分担一步
#
# 一块 GPU 处理八段对话，或者两块 GPU 各处理四段：这一步都是一样的，学到的东西也一样。
# 只要每块 GPU 还有足够多的计算可做，所需时间就大约减半。用到八块 GPU 时，每块就只剩一段对话了。
#
# 所有 GPU 都要等词元最多的那一块，所以一步里的对话会从最长的开始，尽量平均地分给各块 GPU。
# 按 T4 的算力实测，两块 GPU 训练 3B 的速度是一块的 1.8 倍，
# 打开 `GROW_BATCH` 后是 2.0 倍。
#
# GPU 很多时，可以用 `GROW_BATCH`：一步里的对话更多，同样的数据需要的步数更少。
# 这样，梯度的噪声更小，每一步也就可以走得更远。
# 用 Adam [优化器](glossary.ipynb#optimiser)时，学习率应当与一步大小的[平方根](https://arxiv.org/abs/2205.10287)成正比。

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

# %% [markdown] lang="zh"
# 和第 04 章一样，`plan_batch` 会告诉你一块 GPU 能不能放下分给它的那一份。

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

# %% [markdown] lang="zh"
# ## 准备文件夹
#
# 脚本在自己的进程里运行，看不到 notebook。所以，它需要的一切都要放进一个文件夹：数据，
# 以及 `get_peft_model` 和 `SFTConfig` 的参数，也就是第 04 章用过的那些参数。

# %% tags=["handoff"]
import shutil

os.makedirs(f"{SCALED_DIR}/new", exist_ok=True)
shutil.copytree(f"{RUN_DIR}/dataset", f"{SCALED_DIR}/new/dataset", dirs_exist_ok=True)

# %% tags=["handoff"]
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

# %% [markdown] lang="zh"
# ## 启动训练
#
# [`scale_up.py`](../scale_up.py) 是第 04 章的脚本版，一百来行。把它和“快速入门”一章对照着读：
# 里面的调用是一样的。
#
# 有两个程序可以启动它，每块 GPU 启动一次。`torchrun` 是 PyTorch 自带的。
# `accelerate launch` 来自 Transformers 训练时所用的那个库，所需的信息从一个文件里读取：

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
# Run again, it goes on from the last [checkpoint](glossary.ipynb#checkpoint). For another number of GPUs run this
# chapter again from its top, with another `PROCESSES` and without `GROW_BATCH`: then a step has as many conversations
# as before.

# %% [markdown] lang="zh"
# 两行命令任选一行，在这里或在终端里运行都可以。`start` 会像终端那样运行它。
# 你按下停止按钮时，停止信号也会传给训练进程，好让训练进度存下来；
# 如果有进程失败，最后显示的就是那个进程的消息。
#
# 再运行一次，训练会从最后一个[检查点](glossary.ipynb#checkpoint)继续。如果想改变 GPU 的数量，就修改 `PROCESSES`，
# 关掉 `GROW_BATCH`，再从头运行这一章：这样，一步里的对话数和之前相同。

# %%
scaled.start(by_accelerate)

# %% [markdown] lang="en"
# ## What came of it
#
# Each process has a number, its *rank*; LoRA's rank is something else. Rank 0 checked the [mask](glossary.ipynb#mask)
# and chapter 04's claims, and wrote. At the end all compared their adapters: had they not been equal, bit for bit, the
# run would have failed.

# %% [markdown] lang="zh"
# ## 结果如何
#
# 每个进程都有一个号码，叫作**进程编号**（rank）；它和 LoRA 的秩（rank）是两回事。
# 0 号进程检查了[掩码](glossary.ipynb#mask)和第 04 章的那些论断，并写出了结果。最后，各个进程互相比对了适配器：
# 只要有一个比特不同，这次训练就算失败。

# %%
from IPython.display import Image

report = scaled.read_json("report.json")
before, after = report["held_out_loss"]["before"], report["held_out_loss"]["after"]
speeds = [row["tokens_per_second"] for row in report["curves"]["rows"] if row["tokens_per_second"]]
print(f"{report['environment']['device']}, {sorted(speeds)[len(speeds) // 2]:,.0f} tokens a second")
trained_on = "1 process" if PROCESSES == 1 else f"{PROCESSES} processes"
print(f"Result: held-out loss {before:.2f} → {after:.2f} in {report['seconds']:.0f} s, {trained_on}")
Image(f"{SCALED_DIR}/curves/curves.png")

# %% [markdown] lang="en"
# ## Where to type what
#
# **Kaggle.** *File → Import Notebook → GitHub* takes this page. Under *Settings* choose *GPU T4 x2* and *Internet on*.
# The first message prints the command that makes the data there. Download `SCALED_DIR` before the session ends.
#
# **One machine with several GPUs.** This notebook as it is, or one of the two lines in a terminal of the same
# environment. `CUDA_VISIBLE_DEVICES=0,1` in front takes the first two alone.
#
# **Several machines.** They need the same install, the same series and a folder that all of them see. For two with
# eight GPUs each set `PROCESSES` to 16, `GROW_BATCH`, and `SCALED_DIR` to `/shared/scaled`.
#
# Run this chapter to the end of *Prepare the folder* on one of them. Then type on each its own line, within a minute.
# `FIRST` is the first machine's name or address.
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
# A T4 has room for 13.3 of its 14.7. By this formula the 8B fits, with conversations of up to 16,000 tokens; it was not
# run. For longer ones take `CHECKPOINTING = "unsloth"` or a larger card.
#
# The 70B needs a card of 80 GB, or its weights spread over several. Of its 45.1 GiB 41.9 are weights. PyTorch's
# [FSDP2](https://docs.pytorch.org/tutorials/intermediate/FSDP_tutorial.html) divides them: at least 13.7 on each of
# four GPUs, 8.4 on each of eight.
#
# Unsloth's own switch for it is `UNSLOTH_FSDP2=1` under `torchrun`. This series did not try it; see
# [Unsloth on several GPUs](https://docs.unsloth.ai/basics/multi-gpu-training-with-unsloth).

# %% [markdown] lang="zh"
# ## 各种环境怎么运行
#
# **Kaggle**：用 **File → Import Notebook → GitHub** 导入这一页。
# 在 **Settings** 里选择 **GPU T4 x2** 和 **Internet on**。运行下面的单元格，最先出现的那条消息会告诉你，用哪条命令在那里生成数据。
# 会话结束之前，把 `SCALED_DIR` 下载下来。
#
# **一台机器，多块 GPU**：直接运行这个 notebook，或者在同一环境的终端里运行那两行命令中的任意一行。
# 在命令前面加上 `CUDA_VISIBLE_DEVICES=0,1`，就只用前两块 GPU。
#
# **多台机器**：各台机器要装好同样的环境，有同样的本系列文件，还要有一个所有机器都能访问的文件夹。
# 如果有两台机器，每台八块 GPU，就把 `PROCESSES` 设为 16，打开 `GROW_BATCH`，
# 把 `SCALED_DIR` 设为 `/shared/scaled`。
#
# 先在其中一台机器上运行这一章，运行到“准备文件夹”一节结束。然后在每台机器上输入各自的那一行命令，
# 要在一分钟之内全部输入完。`FIRST` 是第一台机器的名称或地址。
#
# ```
# torchrun --nnodes=2 --node-rank=0 --nproc-per-node=8 --master-addr=FIRST --rdzv-conf=timeout=60 notebooks/scale_up.py /shared/scaled
# torchrun --nnodes=2 --node-rank=1 --nproc-per-node=8 --master-addr=FIRST --rdzv-conf=timeout=60 notebooks/scale_up.py /shared/scaled
# ```
#
# 如果某台机器上有一个进程失败，所有进程都会在一分钟之内结束。最后几行会写出它的进程编号和失败原因，
# 例如内存或显存不够、磁盘已满，或者版本和 0 号进程的不一致。
# 如果有一台机器没有启动，另一台机器上的 `torchrun` 会显示 `1/2 clients joined`。
# 排除问题后，再把这几行命令输入一遍。
#
# ## 放不下的模型
#
# 用这种方法，GPU 越多，训练越快。但每块 GPU 都要装下整个模型，所以增加 GPU 并不能放下更大的模型。
# 下表是一块 GPU 需要的显存（单位为 GiB），按第 04 章的公式算出，
# 条件是 `CHECKPOINTING = True`、4 位精度、LoRA 的秩为 16：
#
# | 模型 | 一段 2,048 个词元的对话 | 8,192 | 32,768 |
# |---|---|---|---|
# | Llama 3.2 3B | 3.2 | 4.7 | 11.0 |
# | Llama 3.1 8B | 7.2 | 9.7 | 19.3 |
# | Llama 3.3 70B | 45.1 | 54.5 | 92.1 |
#
# T4 有 14.7 GiB 显存，其中 13.3 GiB 可用。按这个公式，8B 模型放得下，对话最长可以有 16,000 个词元；这一点没有实际运行过。
# 对话更长时，用 `CHECKPOINTING = "unsloth"`，或者换一块显存更大的显卡。
#
# 70B 模型需要一块 80 GB 的显卡，或者把权重分散到几块显卡上。它的 45.1 GiB 里，41.9 GiB 是权重。
# PyTorch 的 [FSDP2](https://docs.pytorch.org/tutorials/intermediate/FSDP_tutorial.html) 可以切分这些权重：
# 分到四块 GPU 上，每块至少 13.7 GiB；分到八块上，每块至少 8.4 GiB。
#
# Unsloth 自己的开关是 `UNSLOTH_FSDP2=1`，在 `torchrun` 下使用。本系列没有试过它；
# 请看[在多块 GPU 上使用 Unsloth](https://docs.unsloth.ai/basics/multi-gpu-training-with-unsloth)。

# %% [markdown] lang="en"
# ## Where you are
#
# You have `adapter/`, `report.json` and `report.html` in `SCALED_DIR`. Chapters 05 and 06 read them from there with
# `RUN_DIR = "runs/scaled"`.
#
# On your own: how long do your adapter's gradients take over a network of 1 Gbit/s?
#
# <details><summary>Solution</summary>
#
# ```python
# from safetensors.torch import load_file
# adapter = load_file(f"{SCALED_DIR}/adapter/adapter_model.safetensors")
# size = 4 * sum(matrix.numel() for matrix in adapter.values())
# for gpus in (2, 8):
#     seconds = size * 2 * (gpus - 1) / gpus / (1e9 / 8)
#     print(f"{gpus} GPUs: {size / 1e6:.0f} MB, {seconds:.2f} s a step")
# ```
#
# SmolLM2's 20 MB take 0.16 s between 2 GPUs, and 0.27 s between 8. The table above has those of Llama 3.2 3B.
#
# </details>
#
# In practice: one larger card is simpler than two small ones. First see whether a smaller `MAX_SEQ_LENGTH` or fewer
# steps do.
#
# {{next}}

# %% [markdown] lang="zh"
# ## 到这里为止
#
# `SCALED_DIR` 里已经有 `adapter/`、`report.json` 和 `report.html`。
# 在第 05 章和第 06 章设置 `RUN_DIR = "runs/scaled"`，这两章就会从那里读取。
#
# 自己动手：你的适配器的梯度，经过 1 Gbit/s 的网络要传多久？
#
# <details><summary>参考答案</summary>
#
# ```python
# from safetensors.torch import load_file
# adapter = load_file(f"{SCALED_DIR}/adapter/adapter_model.safetensors")
# size = 4 * sum(matrix.numel() for matrix in adapter.values())
# for gpus in (2, 8):
#     seconds = size * 2 * (gpus - 1) / gpus / (1e9 / 8)
#     print(f"{gpus} GPUs: {size / 1e6:.0f} MB, {seconds:.2f} s a step")
# ```
#
# SmolLM2 的梯度有 20 MB：2 块 GPU 之间要 0.16 s，8 块之间要 0.27 s。上面的表里是 Llama 3.2 3B 的数字。
#
# </details>
#
# 实践中：一块大显卡用起来比两块小显卡简单。先看看把 `MAX_SEQ_LENGTH` 调小或者减少步数，是不是就够了。
#
# {{next}}
