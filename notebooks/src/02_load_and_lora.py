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
# - count what [LoRA](glossary.ipynb#lora) trains, and what another size would train,
# - show that an untrained [adapter](glossary.ipynb#adapter) changes nothing.
#
# You need nothing from chapter 01, and nothing is handed on: chapter 04 repeats the two calls.
#
# {{budget}}

# %% [markdown] lang="zh"
# # 以 4 位精度加载模型，再加上 LoRA
#
# [![在 Colab 中打开](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/zh-CN/02_load_and_lora.ipynb)
#
# 学完这一章，你会得到一个冻结的 4 位对话模型，旁边加好了可以开始训练的小矩阵。
#
# 学完后你能
# - 以 4 位精度加载模型，并看到这样省下多少；
# - 说出 `from_pretrained` 和 `get_peft_model` 的每个参数有什么作用；
# - 算出 [LoRA](glossary.ipynb#lora) 训练多少个数，换个大小又会训练多少；
# - 证明没有训练过的[适配器](glossary.ipynb#adapter)什么也不改变。
#
# 这一章不需要第 01 章的任何东西，也不向后面的章节交接任何东西：第 04 章会重复这两个调用。
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `MODEL_NAME`, `HF_ENDPOINT` and `USE_MODELSCOPE` are as in chapter 01. `MAX_SEQ_LENGTH` is the longest conversation
# that training will see, in [tokens](glossary.ipynb#token).

# %% [markdown] lang="zh"
# `MODEL_NAME`、`HF_ENDPOINT` 和 `USE_MODELSCOPE` 与第 01 章相同。
# `MAX_SEQ_LENGTH` 是训练时对话的最大长度，以[词元](glossary.ipynb#token)计。

# %% tags=["parameters"]
# @title Choices · 选项
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
# Fewer bits for a [weight](glossary.ipynb#weights) is called [quantisation](glossary.ipynb#quantisation). In 4 bits
# there are 16 values for a weight. NF4, the format of [QLoRA](https://arxiv.org/abs/2305.14314), places them where
# weights are dense, and gives every 64 weights a scale of their own. To compute with them, Unsloth turns them into 16
# bits for a moment.

# %% [markdown] lang="zh"
# ## 加载模型
#
# 下载 `unsloth/` 下的模型不需要账号。**受限**（gated）模型，例如 `meta-llama/…`，则需要 `token=`：
# 填上访问凭证（access token），凭证的持有者必须已经接受该模型的许可证。
#
# 用更少的位数存储[权重](glossary.ipynb#weights)，叫作[量化](glossary.ipynb#quantisation)（quantisation）。4 位精度下，
# 一个权重只有 16 种可能的取值。NF4 是 [QLoRA](https://arxiv.org/abs/2305.14314) 的格式，
# 它把这些取值放在权重密集的地方，并让每 64 个权重共用一个缩放系数。
# 要用权重计算时，Unsloth 会临时把它们转成 16 位。

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

# %% [markdown] lang="zh"
# 权重真的是 4 位吗？模型由许多结构相同的**块**（block）叠成，每个块有七个**线性层**（linear layer），
# 每个线性层就是一张权重表。其中四个属于**注意力**（attention），每个词元在这里从前面的词元收集信息；
# 另外三个属于**前馈**（feed-forward）部分，这部分对每个词元单独计算。
# 在下面的统计结果里，它们显示为 `Linear4bit`。

# %% tags=["nbval-check-output"]
from collections import Counter

kinds = Counter(type(module).__name__ for module in model.modules() if hasattr(module, "in_features"))
parameters = model.num_parameters()
print(f"{parameters:,} weights; linear layers: {dict(kinds)}")

# %% [markdown] lang="en"
# What did that save? The table through which tokens enter and leave stays in 16 bits.

# %% [markdown] lang="zh"
# 这样省下了多少？词元进出模型都要经过一张表，这张表仍然是 16 位。

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
# The picture shows the first `q_proj`, one of attention's four layers.

# %% [markdown] lang="zh"
# ## LoRA 加了什么
#
# 线性层计算 $y = Wx$。LoRA 就是**低秩适配**（low-rank adaptation）。
# 它不动 $W$，只加一条由两个细长矩阵组成的旁路：$y = Wx + \frac{\alpha}{r}\,B A x$。
# $A$ 把输入压缩成 $r$ 个数，$B$ 再把它们展开。训练的只有 $A$ 和 $B$。
# 两者合起来叫作**适配器**（adapter）。
#
# 下图画的是第一个 `q_proj`，它是注意力的四个层之一。

# %%
from helpers.figures import draw_lora

query = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
draw_lora(out_features=query.out_features, in_features=query.in_features, rank=16)

# %% [markdown] lang="en"
# ## Add LoRA
#
# Training first computes an answer, then in which direction to move each trained weight. These directions are the
# [*gradients*](glossary.ipynb#gradient). [Gradient checkpointing](glossary.ipynb#checkpointing) saves memory by
# computing some things twice; chapter 04 says when that pays.

# %% [markdown] lang="zh"
# ## 加上 LoRA
#
# 训练先算出一个回答，再算出每个要训练的权重该往哪个方向调整。这些方向就是[**梯度**](glossary.ipynb#gradient)（gradient）。
# [重算](glossary.ipynb#checkpointing)（gradient checkpointing）把一部分结果算两遍，以此节省显存；什么时候划算，见第 04 章。

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

# %% [markdown] lang="zh"
# ## 数一数训练多少个数
#
# 一个有 $n$ 个输入、$m$ 个输出的层，除了自己的 $n\,m$ 个数，还会得到 $r\,(n + m)$ 个要训练的数。

# %% tags=["nbval-check-output"]
trainable, total = model.get_nb_trainable_parameters()
print(f"{trainable:,} of {total:,} numbers are trained: {100 * trainable / total:.2f} %")

# %% [markdown] lang="en"
# The count grows in step with the [rank](glossary.ipynb#rank). Each trained number costs more than its own memory: it
# also has a gradient, and two running averages of it that say how far the next step goes.

# %% [markdown] lang="zh"
# 这个数量和[秩](glossary.ipynb#rank)（rank）成正比。每个要训练的数，占用的显存不止它自己那一份：它还有一个梯度，
# 以及这个梯度的两个滑动平均值，这两个平均值决定下一步走多远。

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

# %% [markdown] lang="zh"
# ## 训练从基座模型出发
#
# $B$ 的初值全是零，所以旁路一开始什么也不加，训练正好从你加载的模型出发。
# $A$ 的初值是较小的随机数，由 `random_state` 决定。

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

# %% [markdown] lang="zh"
# ## 选哪个秩，选哪个模型
#
# 从 `r=16` 和 `lora_alpha=16` 开始。如果到了第 04 章，模型学得太少，增加步数也没有用，就把两者都加倍；
# 只学一种形式或语气，[需要的并不多](https://arxiv.org/abs/2106.09685)。
#
# | | 1B | 3B |
# |---|---|---|
# | 通用知识，[MMLU](https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct) | 49% | 63% |
# | 每一步的用时 | 1 | 前者的 1.6 到 2 倍 |
# | 笔记本电脑上用的文件 | 0.8 GB | 2 GB |
#
# 先试 1B，回答太差时再换 3B。

# %% [markdown] lang="en"
# ## Where you are
#
# You have seen the two calls that every fine-tuning with Unsloth begins with.
#
# On your own: how many trained numbers belong to the three feed-forward modules?
#
# <details><summary>Solution</summary>
#
# ```python
# shares = Counter()
# for name, matrix in model.named_parameters():
#     if matrix.requires_grad:
#         shares["feed-forward" if ".mlp." in name else "attention"] += matrix.numel()
# for part, count in shares.items():
#     print(f"{part}: {count / trainable:.0%}")
# ```
#
# 62 %, with SmolLM2 as with Llama 3.2 3B.
#
# </details>
#
# On your own: what does the untrained adapter change in a prediction?
#
# <details><summary>Solution</summary>
#
# ```python
# import torch
# inputs = tokenizer("The lamp does not", return_tensors="pt").to(model.device)
# with torch.no_grad():
#     beside = model(**inputs).logits
#     with model.disable_adapter():
#         alone = model(**inputs).logits
# print("Largest difference:", (beside - alone).abs().max().item())
# ```
#
# 0.0: not one of the numbers differs.
#
# </details>
#
# {{next}}

# %% [markdown] lang="zh"
# ## 到这里为止
#
# 你已经认识了两个调用：用 Unsloth 做微调，每次都从它们开始。
#
# 自己动手：在要训练的数里，三个前馈模块占多大比例？
#
# <details><summary>参考答案</summary>
#
# ```python
# shares = Counter()
# for name, matrix in model.named_parameters():
#     if matrix.requires_grad:
#         shares["feed-forward" if ".mlp." in name else "attention"] += matrix.numel()
# for part, count in shares.items():
#     print(f"{part}: {count / trainable:.0%}")
# ```
#
# 62%：SmolLM2 和 Llama 3.2 3B 都是这样。
#
# </details>
#
# 自己动手：没有训练过的适配器会改变预测里的什么？
#
# <details><summary>参考答案</summary>
#
# ```python
# import torch
# inputs = tokenizer("The lamp does not", return_tensors="pt").to(model.device)
# with torch.no_grad():
#     beside = model(**inputs).logits
#     with model.disable_adapter():
#         alone = model(**inputs).logits
# print("Largest difference:", (beside - alone).abs().max().item())
# ```
#
# 0.0：没有一个数不同。
#
# </details>
#
# {{next}}
