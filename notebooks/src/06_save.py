# %% [markdown] lang="en"
# # Save, merge, export to GGUF, reload and verify
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/06_save.ipynb)
#
# At the end you have your model in every form that others can load, and a table that says how close each is to the
# model that you trained.
#
# You can
# - choose between an [adapter](glossary.ipynb#adapter), a [merged](glossary.ipynb#merge) model, and [GGUF](glossary.ipynb#gguf) files for a laptop,
# - merge without the rounding of 4 bits,
# - prove that the saved model answers like the one you trained,
# - use it from other programs, and publish it if you want to.
#
# You need `dataset/`, `adapter/` and `report.json` from chapters 03 and 04, in the run folder or in `DRIVE_DIR`. Where
# they are in neither, a message prints the command that makes them here.
#
# {{budget}}

# %% [markdown] lang="zh"
# # 保存、合并、导出为 GGUF，再重新加载并验证
#
# [![在 Colab 中打开](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/zh-CN/06_save.ipynb)
#
# 学完这一章，你的模型会有好几种形式，每一种别人都能加载；还会有一张表，说明每种形式与你训练的模型有多接近。
#
# 学完后你能
# - 在[适配器](glossary.ipynb#adapter)、[合并](glossary.ipynb#merge)后的模型和笔记本电脑用的 [GGUF](glossary.ipynb#gguf) 文件之间做出选择；
# - 合并模型时，不把 4 位量化的舍入误差带进去；
# - 证明保存下来的模型和你训练的模型回答得一样；
# - 在其他程序里使用它，如果愿意，还能把它发布出去。
#
# 你需要第 03 章和第 04 章的 `dataset/`、`adapter/` 和 `report.json`，它们可以在运行文件夹里，也可以在 `DRIVE_DIR` 里。
# 如果两处都没有，会有一条消息告诉你，用哪条命令可以在这里生成它们。
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `GGUF` names the GGUF files to write; `[]` writes none. `PUSH_TO` is empty, and nothing leaves this machine. With
# `"your-name/your-model"` the form in `PUSH_FORM` is published on the Hub at the end. `RUN_DIR` and `DRIVE_DIR` are as
# in chapter 03, `MODEL_NAME`, `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and `USE_MODELSCOPE` as in chapter 02.

# %% [markdown] lang="zh"
# `GGUF` 列出要写出的 GGUF 文件；`[]` 表示一个也不写。`PUSH_TO` 空着，就没有任何东西会离开这台机器。
# 如果填上 `"your-name/your-model"`，最后就会把 `PUSH_FORM` 选定的那种形式发布到 Hub。
# `RUN_DIR` 和 `DRIVE_DIR` 与第 03 章相同，`MODEL_NAME`、`MAX_SEQ_LENGTH`、`HF_ENDPOINT` 和 `USE_MODELSCOPE` 与第 02 章相同。

# %% tags=["parameters"]
# @title Choices · 选项
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
# Chapter 04 saved it with `save_pretrained`: the [LoRA](glossary.ipynb#lora) matrices, the name of the [base
# model](glossary.ipynb#base-model) that they belong to, and the [tokenizer](glossary.ipynb#tokenizer) with its [chat
# template](glossary.ipynb#chat-template). It is small, and needs its base model.

# %% [markdown] lang="zh"
# ## 适配器
#
# 第 04 章用 `save_pretrained` 保存了适配器：里面有 [LoRA](glossary.ipynb#lora) 矩阵、所属[基座模型](glossary.ipynb#base-model)的名称，
# 还有带[对话模板](glossary.ipynb#chat-template)的[分词器](glossary.ipynb#tokenizer)。
# 适配器很小，但离不开它的基座模型。

# %%
import os

for file in sorted(os.scandir(f"{RUN_DIR}/adapter"), key=lambda file: -file.stat().st_size):
    print(f"{file.stat().st_size / 2**20:9.2f} MiB  {file.name}")

# %% [markdown] lang="en"
# ## Does it fit?
#
# A free Colab machine has about 12 GB of memory, and ends without a word when it is used up. So ask before anything is
# loaded or written: what is needed must be less than what is free. The adapter is held against its base model too.

# %% [markdown] lang="zh"
# ## 放得下吗？
#
# 免费的 Colab 机器大约有 12 GB 内存，一旦用完，机器就会不声不响地停掉。所以在加载或写入任何东西之前，先算一算：
# 需要的空间必须小于空闲的空间。这里还会核对适配器与它的基座模型是否相符。

# %%
from helpers.export import plan_export

plan = plan_export(run, MODEL_NAME, gguf=GGUF, push_to=PUSH_TO)
plan.raise_if_failed()
plan

# %% [markdown] lang="en"
# ## Load it on 16-bit weights
#
# Merging adds $\frac{\alpha}{r} B A$ to each frozen $W$ and leaves one ordinary model. Training kept $W$ in 4 bits.
# Merge into those, and the rounding of every [weight](glossary.ipynb#weights) stays for good. So the base model is
# loaded anew, in 16 bits; for the 3B that is a download of over 6 GB.

# %% [markdown] lang="zh"
# ## 加载到 16 位权重上
#
# 合并就是把 $\frac{\alpha}{r} B A$ 加到每个冻结的 $W$ 上，最后得到一个普通的模型。训练时，$W$ 以 4 位保存。
# 如果合并到这样的[权重](glossary.ipynb#weights)里，每个权重的舍入误差就会永远留下来。所以要重新加载 16 位的基座模型；
# 3B 模型的下载量超过 6 GB。

# %%
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=f"{RUN_DIR}/adapter", max_seq_length=MAX_SEQ_LENGTH, dtype=None, load_in_4bit=False
)
FastLanguageModel.for_inference(model)
print(f"Loaded as {model.dtype}")

# %% [markdown] lang="en"
# Is it the model of chapter 04? Its [held-out](glossary.ipynb#held-out-set) [loss](glossary.ipynb#loss) may differ a
# little, because the 16-bit base is not rounded.

# %% [markdown] lang="zh"
# 这还是第 04 章的那个模型吗？它在[留出](glossary.ipynb#held-out-set)集上的[损失](glossary.ipynb#loss)可能略有不同，因为 16 位的基座模型没有经过舍入。

# %% tags=["nbval-check-output"]
from helpers.training import check_loaded

check_loaded(run, model, tokenizer)

# %% [markdown] lang="en"
# ## What the model in memory says
#
# Every saved form is held against these answers. They are [greedy](glossary.ipynb#greedy) replies to held-out questions, and how
# likely the model finds each [token](glossary.ipynb#token) of the right answers.
# [*Perplexity*](glossary.ipynb#perplexity) is between how many equally likely tokens it wavers at each of them; 1 would
# be certainty.

# %% [markdown] lang="zh"
# ## 已加载的模型怎样回答
#
# 保存下来的每一种形式，都要和这里的结果对照：一看它对留出集问题的[贪心](glossary.ipynb#greedy)回复，
# 二看它认为正确回答里的每个[词元](glossary.ipynb#token)有多大可能。[**困惑度**](glossary.ipynb#perplexity)（perplexity）表示：
# 在每个词元上，模型相当于在多少个同样可能的词元之间犹豫；1 就是完全确定。

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

# %% [markdown] lang="zh"
# ## 合并
#
# 这一步写出一个普通的 16 位模型。

# %% tags=["handoff"]
model.save_pretrained_merged(f"{RUN_DIR}/new/merged", tokenizer, save_method="merged_16bit")
template = run.facts("adapter")["template"]
run.keep("merged", template=template)

# %% [markdown] lang="en"
# ## Export to GGUF
#
# A GGUF file holds weights, tokenizer and chat template in one, for llama.cpp and Ollama, programs that run a model on
# a laptop. `q8_0` keeps about 8 bits a weight, `q4_k_m` about 5. It takes minutes.

# %% [markdown] lang="zh"
# ## 导出为 GGUF
#
# 一个 GGUF 文件里同时有权重、分词器和对话模板，供 llama.cpp 和 Ollama 使用；这两个程序能在笔记本电脑上运行模型。
# 用 `q8_0`，每个权重约占 8 位；用 `q4_k_m`，约占 5 位。导出要花几分钟。

# %% tags=["handoff"]
if GGUF:
    model.save_pretrained_gguf(f"{RUN_DIR}/new/gguf/model", tokenizer, quantization_method=GGUF)

# %% [markdown] lang="en"
# Unsloth writes a 16-bit file too; `keep_gguf` drops it and gives the others short names. The same helper writes a
# `Modelfile` for Ollama, whose template and stop words come from the tokenizer: a model that is asked in another form
# than it was trained in answers worse.

# %% [markdown] lang="zh"
# Unsloth 还会写一个 16 位的文件；`keep_gguf` 把它删掉，并给其余文件换上短名字。
# 这个辅助函数还会为 Ollama 写一个 `Modelfile`，其中的模板和停止词都来自分词器：
# 如果提问的格式和训练时不同，模型就会答得更差。

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

# %% [markdown] lang="zh"
# ## 在全新的进程里重新加载每一种形式
#
# 模型在这个 notebook 里能回答，并不能说明它的文件没问题：作答的是一直加载着的那个模型。现在把它清除，
# 再启动一个只拿得到文件的新进程，向每一种形式提问。适配器由 Unsloth 加载，合并后的模型只用 Transformers 加载，
# 每个 GGUF 文件则通过 `llama-server` 提问，和别的程序使用它时一样。

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

# %% [markdown] lang="zh"
# 适配器和合并后的模型必须给出逐字相同的回复；**近似并列**（near tie）是指这样的位置：
# 先前加载的那个模型自己也觉得，有两个词元几乎同样可能。GGUF 文件的权重经过舍入，所以回复的用词可以不同。
# 困惑度最多可以变化 1%，不到 8 位的文件最多可以变化 10%。
#
# 在第 05 章和你对话的，就是放在 4 位基座模型上的适配器；那个基座模型不是你的文件，所以不评判这种形式。
# 只要有一种形式超出限度，这一章就在这里停下，免得有人把它当成你的模型。

# %%
exports.raise_if_failed()

# %% [markdown] lang="en"
# ## Write the model card
#
# A model without a card is a riddle to whoever finds it, you included. This one is written from what the chapters
# recorded.

# %% [markdown] lang="zh"
# ## 写模型卡片
#
# 模型如果没有卡片，对找到它的人来说就是个谜，对你自己也一样。这张卡片根据各章的记录写成。

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

# %% [markdown] lang="zh"
# ## 想发布的话
#
# 只有在 `PUSH_TO` 里填了名称，才会发布。发布的正是验证过的那些文件，连同卡片一起，放进一个私有仓库。
# 访问凭证（access token）用的是 Colab 密钥（钥匙图标）里的 `HF_TOKEN`，或者 `hf auth login` 存下的那个。
# 由 Llama 3.2 衍生的模型受 Meta 的许可证约束，名称必须以“Llama”开头。

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

# %% [markdown] lang="zh"
# ## 在别处使用
#
# **Python**：合并后的模型只需要 Transformers，在 GPU 上也是这些形式里最快的。

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

# %% [markdown] lang="zh"
# 适配器还需要 PEFT 库，它会加载基座模型，再把适配器加在上面。

# %%
from peft import AutoPeftModelForCausalLM

adapted = AutoPeftModelForCausalLM.from_pretrained(f"{RUN_DIR}/adapter", dtype="auto", device_map="auto")
output = adapted.generate(**inputs.to(adapted.device), max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# %% [markdown] lang="en"
# **Any program that can ask OpenAI.** `llama-server -m model-q4_k_m.gguf` serves a GGUF file, and any OpenAI client
# asks it at the address that it prints, path `/v1`. Here `serve_gguf` starts and ends it.

# %% [markdown] lang="zh"
# **任何能调用 OpenAI 接口的程序**：`llama-server -m model-q4_k_m.gguf` 用一个 GGUF 文件提供服务，并显示一个地址。
# 任何 OpenAI 客户端都可以向这个地址提问，路径是 `/v1`。这里由 `serve_gguf` 启动和关闭这个服务。

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

# %% [markdown] lang="zh"
# **Ollama**：把文件夹 `gguf` 拷到装有 Ollama 的电脑上。同样的客户端也可以向它提问，端口是 11434，路径是 `/v1`。
# ```
# cd gguf
# ollama create my-model -f Modelfile
# ollama run my-model
# ```
# **vLLM**：适合同时为许多用户服务。它需要 GPU，这里没有运行过。在 T4 上要加 `--dtype half`。
# 客户端使用的模型名是 `my-model`。
# ```
# vllm serve unsloth/Llama-3.2-3B-Instruct --enable-lora --lora-modules my-model=adapter
# ```
#
# ## 继续训练
#
# 假设你有了新的对话。适配器像第 05 章那样加载，训练器在它的基础上接着训练，学习率降到原来的十分之一。
# 要用新对话，就换一个 `RUN_DIR` 运行第 03 章，再加载那个文件夹里的 `dataset`。
# 还要混入一些旧数据，否则模型会忘掉它们。这里用十六行旧数据代替新数据。

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
# The first loss is where chapter 04 ended, not where the base model begins: it goes on.

# %% [markdown] lang="zh"
# 第一步的损失就是第 04 章结束时的水平，而不是基座模型的起点：可见训练确实是接着进行的。

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
# On your own: how many bits does a weight take in each GGUF file?
#
# <details><summary>Solution</summary>
#
# ```python
# from pathlib import Path
# weights = sum(file.stat().st_size for file in Path(f"{RUN_DIR}/merged").glob("*.safetensors")) / 2
# for name in GGUF:
#     size = os.path.getsize(f"{RUN_DIR}/gguf/model-{name}.gguf")
#     print(f"{name}: {8 * size / weights:.1f} bits a weight")
# ```
#
# More than the names say: blocks of weights share a scale, and some tables keep more bits.
#
# </details>
#
# On your own: merge one layer by hand, and compare it with the merged model's.
#
# <details><summary>Solution</summary>
#
# ```python
# from safetensors.torch import load_file
# layer = "model.layers.0.self_attn.q_proj"
# adapter = load_file(f"{RUN_DIR}/adapter/adapter_model.safetensors")
# a, b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"].cpu().float() for side in "AB")
# frozen, merged = (
#     AutoModelForCausalLM.from_pretrained(path, dtype="auto").get_submodule(layer).weight.float()
#     for path in (MODEL_NAME, f"{RUN_DIR}/merged")
# )
# print(f"Change of a weight: {(b @ a).abs().max().item():.5f} at most")
# print(f"Difference of the two: {(frozen + b @ a - merged).abs().max().item():.5f} at most")
# ```
#
# Both are the same, up to the rounding to 16 bits.
#
# </details>
#
# In practice: keep the adapter. It is the whole of your work, and every other form can be made from it again.
#
# {{next}}

# %% [markdown] lang="zh"
# ## 到这里为止
#
# 运行文件夹里已经有 `adapter/`、`merged/`、带 `Modelfile` 的 `gguf/`，还有一张模型卡片。
# 你也知道了每种形式与你训练的模型有多接近。
#
# 自己动手：每个 GGUF 文件里，一个权重占多少位？
#
# <details><summary>参考答案</summary>
#
# ```python
# from pathlib import Path
# weights = sum(file.stat().st_size for file in Path(f"{RUN_DIR}/merged").glob("*.safetensors")) / 2
# for name in GGUF:
#     size = os.path.getsize(f"{RUN_DIR}/gguf/model-{name}.gguf")
#     print(f"{name}: {8 * size / weights:.1f} bits a weight")
# ```
#
# 比名称里写的多：每一小块权重共用一个缩放系数，有些权重表还保留了更多的位数。
#
# </details>
#
# 自己动手：手工合并一个层，再和合并后的模型比较。
#
# <details><summary>参考答案</summary>
#
# ```python
# from safetensors.torch import load_file
# layer = "model.layers.0.self_attn.q_proj"
# adapter = load_file(f"{RUN_DIR}/adapter/adapter_model.safetensors")
# a, b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"].cpu().float() for side in "AB")
# frozen, merged = (
#     AutoModelForCausalLM.from_pretrained(path, dtype="auto").get_submodule(layer).weight.float()
#     for path in (MODEL_NAME, f"{RUN_DIR}/merged")
# )
# print(f"Change of a weight: {(b @ a).abs().max().item():.5f} at most")
# print(f"Difference of the two: {(frozen + b @ a - merged).abs().max().item():.5f} at most")
# ```
#
# 两者相同，差别只是舍入到 16 位造成的。
#
# </details>
#
# 实践中：保管好适配器。你的全部成果都在里面，其他每种形式都可以由它重新做出来。
#
# {{next}}
