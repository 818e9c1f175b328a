# %% [markdown] lang="en"
# # Install Unsloth and check the machine
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/01_install.ipynb)
#
# At the end a language model answers you, on a machine that is known to be able to train it.
#
# You can
# - say in a sentence what a language model, [fine-tuning](glossary.ipynb#fine-tuning) and Unsloth are,
# - install exactly the versions that this series was tested with,
# - read what a machine lacks, and what to do about it.
#
# You need a browser and a Google account. In Colab choose *Runtime → Change runtime type → T4 GPU*: Google then lends
# you a computer with a T4, a graphics card that is made for such work. On a computer of your own, the README's two
# commands take its place.
#
# {{budget}}

# %% [markdown] lang="zh"
# # 安装 Unsloth，检查机器
#
# [![在 Colab 中打开](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/zh-CN/01_install.ipynb)
#
# 学完这一章，会有一个语言模型回答你的问题，运行它的机器也经过检查，确定能用来训练它。
#
# 学完后你能
# - 用一句话说清语言模型、[微调](glossary.ipynb#fine-tuning)和 Unsloth 是什么；
# - 装上和本系列测试时完全相同的版本；
# - 看出机器缺什么，并知道该怎么办。
#
# 你需要一个浏览器和一个 Google 账号。在 Colab 里选择 **Runtime → Change runtime type → T4 GPU**：
# Google 就会借给你一台带 T4 显卡的计算机，这种显卡正是为这类工作制造的。
# 如果用自己的计算机，就改为运行 README 里的两条命令。
#
# {{budget}}

# %% [markdown] lang="en"
# ## What you are about to do
#
# A **language model** reads text as a row of [*tokens*](glossary.ipynb#token), which are words and pieces of words, and
# predicts the next one. What it predicts depends on its [*weights*](glossary.ipynb#weights): billions of numbers that
# training changes a little at a time.
#
# Llama 3.2 knows a language and many facts from much of the internet. An *Instruct* model was then taught to answer. It
# does not know your products, your tone or your format.
#
# **Fine-tuning** goes on with that training on examples of your own, until the model answers the way they do. A few
# hundred conversations are often enough. Try a better [prompt](glossary.ipynb#prompt) first: it costs nothing to
# change. Fine-tune when the prompt gets long, or when you can show what you want more easily than say it.
#
# Training all weights does not fit into a T4's memory of 15 GiB. Two ideas make it fit. The weights are stored in **4
# bits** each and stay as they are. A few small tables of numbers beside them are trained:
# [**LoRA**](glossary.ipynb#lora), chapter 02.
#
# **Unsloth** is a library that does this in less memory and time than others; by how much,
# [the benchmarks](https://github.com/your-org/llama-3.2-unsloth-t4/blob/main/tests/benchmarks/README.md) say.

# %% [markdown] lang="zh"
# ## 你将要做什么
#
# **语言模型**（language model）把文本当作一串[**词元**](glossary.ipynb#token)（token）来读，并预测下一个词元。
# 词元是词，或者词的一部分。预测出什么，取决于它的[**权重**](glossary.ipynb#weights)（weights）：那是几十亿个数，
# 训练每次只把它们改动一点点。
#
# Llama 3.2 从互联网上很大一部分内容中学会了语言，也学到了许多事实。
# **Instruct** 模型在这之后还学过怎样回答。但它不了解你的产品，也不了解你要的语气和格式。
#
# **微调**（fine-tuning）用你自己的例子继续这种训练，直到模型像例子那样回答。
# 几百段对话往往就够了。不过，先试试更好的[提示词](glossary.ipynb#prompt)：改提示词不花钱。
# 等到提示词越写越长，或者你想要的效果举例比描述更容易时，再来微调。
#
# T4 有 15 GiB 显存，不够用来训练全部权重。有两个办法能让训练放得下：
# 一是每个权重只用 **4 位**（bit）存储，并且保持不变；二是只训练权重旁边的一些小型数字表，
# 这就是 [**LoRA**](glossary.ipynb#lora)，见第 02 章。
#
# **Unsloth** 是做这件事的一个库，比别的库更省显存，也更省时间；省多少，
# 见[基准测试](https://github.com/your-org/llama-3.2-unsloth-t4/blob/main/tests/benchmarks/README.md)。

# %% [markdown] lang="en"
# ## Set up
#
# On Colab every notebook gets a computer of its own, so each chapter begins with this cell. It installs the packages of
# `requirements-colab.txt`, each in the version that was tested, and shows what it changed. On your own computer it
# installs nothing, because `make setup` did.
#
# The outputs on this page were recorded before you opened it. Yours replace them as you run the cells.

# %% [markdown] lang="zh"
# ## 准备
#
# 在 Colab 上，每个 notebook 都有一台自己的计算机，所以每一章都从这个单元格开始。
# 它安装 `requirements-colab.txt` 里的软件包，每个都是测试过的版本，并显示改动了什么。
# 在你自己的计算机上，它什么也不装，因为 `make setup` 已经装好了。
#
# 这一页上的输出是事先录下的。你运行单元格后，它们会换成你自己的输出。

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# Choices are made in one cell. `MODEL_NAME` is a model on the Hugging Face Hub, where models and data are published,
# or a folder that holds one.
#
# `HF_ENDPOINT` is the address of a copy of the Hub, such as `"https://hf-mirror.com"`, for readers who cannot reach it.
# `USE_MODELSCOPE` takes the model of the same name from ModelScope, another such place; set one of the two.

# %% [markdown] lang="zh"
# 要做的选择都在一个单元格里。`MODEL_NAME` 是 Hugging Face Hub 上的一个模型，
# 或者一个存有模型的文件夹；Hub 是发布模型和数据的地方。
#
# `HF_ENDPOINT` 是 Hub 镜像站的地址，
# 例如 `"https://hf-mirror.com"`，给连不上 Hub 的读者用。`USE_MODELSCOPE` 改从 ModelScope（魔搭社区）下载同名的模型，
# 那是另一个同类平台。这两个选项设一个就够。

# %% tags=["parameters"]
# @title Choices · 选项
MODEL_NAME = "unsloth/Llama-3.2-3B-Instruct"  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %% [markdown] lang="en"
# ## Check the machine
#
# Each thing that the series depends on is tried, not assumed. A row appears where something needs attention, and its
# last column says what to do. A failed row stops here, with one line, rather than in the middle of a training run.

# %% [markdown] lang="zh"
# ## 检查机器
#
# 本系列依赖的每样东西都会实际试一遍，不靠假设。凡是需要你注意的，表里就有一行，
# 最后一列告诉你该怎么做。只要有一行失败，就停在这里，给出一行说明，而不是等到训练中途才停。

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

# %% [markdown] lang="zh"
# ## 加载模型
#
# Unsloth 在导入时会给其他库打补丁，所以每一章都先导入它。
# `load_in_4bit` 用 4 位存储权重；`max_seq_length` 是模型在这里能读的最长文本，以词元计。

# %%
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL_NAME,
    max_seq_length=2048,
    load_in_4bit=True,
)

# %% [markdown] lang="en"
# A T4 computes in float16, newer cards in bfloat16, a processor without either in 32 bits.

# %% [markdown] lang="zh"
# T4 用 float16 计算，较新的显卡用 bfloat16，两者都不支持的处理器用 32 位。

# %%
print(f"{model.device}, {model.dtype}, {model.get_memory_footprint() / 2**30:.2f} GiB of weights")

# %% [markdown] lang="en"
# ## Ask it a question
#
# A conversation is a list of messages, each with a `role` and its `content`. The
# [*tokenizer*](glossary.ipynb#tokenizer) writes it in the form that the model was taught, and turns it into tokens.

# %% [markdown] lang="zh"
# ## 问它一个问题
#
# 对话是一个消息列表，每条消息有 `role` 和 `content`。
# [**分词器**](glossary.ipynb#tokenizer)（tokenizer）把对话写成模型学过的形式，再转换成词元。

# %%
messages = [{"role": "user", "content": "My lamp does not switch on. What can I do?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(inputs["input_ids"][0]))

# %% [markdown] lang="en"
# `generate` adds the most likely token again and again, and `decode` turns tokens back into text.

# %% [markdown] lang="zh"
# `generate` 每次接上一个最可能的词元，如此反复；`decode` 把词元变回文本。

# %%
inputs = inputs.to(model.device)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)

# %% [markdown] lang="en"
# It answers politely and in general terms. It has never seen your lamps. In chapter 04 the same kind of question gets
# the answer that a support team would give.

# %% [markdown] lang="zh"
# 它答得很礼貌，也很笼统：它从来没见过你的灯。到了第 04 章，对同一类问题，模型会像客服团队那样回答。

# %%
print(f"Result: an answer of {len(answer.split())} words, from {model.device}")

# %% [markdown] lang="en"
# ## Where you are
#
# You have a machine that is known to work, and you have talked to an untouched model. Nothing is kept. Give
# this machine back first (*Runtime → Disconnect and delete runtime*), because free Colab
# lends one GPU at a time.
#
# On your own: print the five likeliest first tokens of the answer.
#
# <details><summary>Solution</summary>
#
# ```python
# import torch
# with torch.no_grad():
#     scores = model(**inputs).logits[0, -1].float()
# for share, token in zip(*scores.softmax(-1).topk(5)):
#     print(f"{share:6.1%}  {tokenizer.decode(token)!r}")
# ```
#
# The answer above begins with the first of the five, because `do_sample=False` takes it.
#
# </details>
#
# On your own: let the model draw its answer, twice.
#
# <details><summary>Solution</summary>
#
# ```python
# for _ in range(2):
#     output = model.generate(**inputs, max_new_tokens=32, do_sample=True, temperature=1.0)
#     print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), "—" * 60, sep="\n")
# ```
#
# The two answers differ: each token is drawn by its probability.
#
# </details>
#
# {{next}}

# %% [markdown] lang="zh"
# ## 到这里为止
#
# 你有了一台确定能用的机器，也和没有微调过的模型对过话了。这一章没有保存任何东西。
# 继续之前，先归还这台机器（**Runtime → Disconnect and delete runtime**），
# 因为免费的 Colab 同一时间只借给你一块 GPU。
#
# 自己动手：回答的第一个词元最可能是什么？打印出可能性最大的五个。
#
# <details><summary>参考答案</summary>
#
# ```python
# import torch
# with torch.no_grad():
#     scores = model(**inputs).logits[0, -1].float()
# for share, token in zip(*scores.softmax(-1).topk(5)):
#     print(f"{share:6.1%}  {tokenizer.decode(token)!r}")
# ```
#
# 上面的回答就以这五个里的第一个开头，因为 `do_sample=False` 总是取它。
#
# </details>
#
# 自己动手：让模型用采样的方式回答，问两次。
#
# <details><summary>参考答案</summary>
#
# ```python
# for _ in range(2):
#     output = model.generate(**inputs, max_new_tokens=32, do_sample=True, temperature=1.0)
#     print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), "—" * 60, sep="\n")
# ```
#
# 两次的回答不同，因为每个词元都是按概率抽出来的。
#
# </details>
#
# {{next}}
