# %% [markdown] lang="en"
# # Fine-tune Llama 3.2 in one notebook
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/00_quickstart.ipynb)
#
# At the end you have a Llama 3.2 that was trained on conversations of your choice, in a file that runs on a laptop.
#
# You can
# - train a chat model on a file of your own,
# - compare its answers with those of the base model, which nobody tuned,
# - use it in other programs.
#
# You need Colab with a T4, its free GPU (*Runtime → Change runtime type*).
#
# {{budget}}

# %% [markdown] lang="zh"
# # 用一个 notebook 微调 Llama 3.2
#
# [![在 Colab 中打开](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/zh-CN/00_quickstart.ipynb)
#
# 学完这一章，你会得到一个 Llama 3.2，它是用你选的对话训练出来的。它存成一个文件，在笔记本电脑上就能运行。
#
# 学完后你能
# - 用自己的文件训练一个对话模型；
# - 把它的回答和没有微调过的基座模型的回答做比较；
# - 在其他程序里使用它。
#
# 你需要 Colab 和它的免费 GPU，也就是 T4（**Runtime → Change runtime type**）。
#
# {{budget}}

# %% [markdown] lang="en"
# `MODEL_NAME` is a model on the Hugging Face Hub, where models and data are published. `DATASET` is a data set there,
# or a `.jsonl`, `.json` or `.csv` file of yours: drop it on the folder icon at the left. `EVAL_ROWS`, a fifth of yours
# at most, are [*held out*](glossary.ipynb#held-out-set): never trained on.
#
# A [*token*](glossary.ipynb#token) is a word or a piece of one, and `MAX_SEQ_LENGTH` the most that a conversation may
# have. `GGUF` names files for Ollama; `[]` saves their download of 6 GB. `OUTPUT_DIR` is the folder for the results,
# `REQUIREMENTS` the list of packages.

# %% [markdown] lang="zh"
# `MODEL_NAME` 是 Hugging Face Hub 上的一个模型，Hub 是发布模型和数据的地方。
# `DATASET` 是 Hub 上的一个数据集，也可以是你自己的 `.jsonl`、`.json` 或 `.csv` 文件；
# 自己的文件要拖到左侧的文件夹图标上。`EVAL_ROWS` 是[**留出**](glossary.ipynb#held-out-set)（held out）的行数：这些行绝不用来训练。
# 用自己的文件时，留出的行不要超过五分之一。
#
# [**词元**](glossary.ipynb#token)（token）是一个词，或者词的一部分。`MAX_SEQ_LENGTH` 是一段对话最多可以有的词元数。
# `GGUF` 列出要给 Ollama 生成哪些文件；填 `[]` 就不生成，也省去为此所需的 6 GB 下载。
# `OUTPUT_DIR` 是存放结果的文件夹，`REQUIREMENTS` 是软件包清单。

# %% tags=["parameters"]
# @title Choices · 选项
MODEL_NAME = "unsloth/Llama-3.2-3B-Instruct"  # @param {type:"string"}
LOAD_IN_4BIT = True  # @param {type:"boolean"}
CHAT_TEMPLATE = "llama-3.1"  # @param {type:"string"}
DATASET = "mlabonne/FineTome-100k"  # @param {type:"string"}
EVAL_ROWS = 32  # @param {type:"integer"}
MAX_SEQ_LENGTH = 1024  # @param {type:"integer"}
MAX_STEPS = 60  # @param {type:"integer"}
LEARNING_RATE = 2e-4  # @param {type:"number"}
GGUF = ["q4_k_m"]  # @param {type:"raw"}
OUTPUT_DIR = "quickstart"  # @param {type:"string"}
REQUIREMENTS = "https://raw.githubusercontent.com/your-org/llama-3.2-unsloth-t4/v0.1.0/requirements-colab.txt"

# %% [markdown] lang="en"
# Each package comes in the one version that was tested. No restart is needed. Why, and how we know:
# [chapter 01](01_install.ipynb).

# %% [markdown] lang="zh"
# 每个软件包装的都是测试过的那个版本，装完不需要重启。原因和依据见[第 01 章](01_install.ipynb)。

# %%
# %pip install -q --no-deps -r {REQUIREMENTS}

# %% [markdown] lang="en"
# A model is made of [*weights*](glossary.ipynb#weights), billions of numbers. With 4 bits for each (`LOAD_IN_4BIT`), a
# T4 has room for training. Why, and how we know: [chapter 02](02_load_and_lora.ipynb).

# %% [markdown] lang="zh"
# 模型由[**权重**](glossary.ipynb#weights)（weights）组成，也就是几十亿个数。每个权重只用 4 位存储（`LOAD_IN_4BIT`），
# T4 上才有空间做训练。原因和依据见[第 02 章](02_load_and_lora.ipynb)。

# %%
from unsloth import FastLanguageModel  # before the other libraries, because it makes them faster

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL_NAME, max_seq_length=MAX_SEQ_LENGTH, load_in_4bit=LOAD_IN_4BIT
)

# %% [markdown] lang="en"
# The weights stay as they are. [LoRA](glossary.ipynb#lora) adds small matrices, the
# [*adapter*](glossary.ipynb#adapter), and only these are trained. Why, and how we know: [chapter
# 02](02_load_and_lora.ipynb).

# %% [markdown] lang="zh"
# 权重本身保持不变。[LoRA](glossary.ipynb#lora) 另外加上一些小矩阵，合称[**适配器**](glossary.ipynb#adapter)（adapter），训练的只有这些矩阵。
# 原因和依据见[第 02 章](02_load_and_lora.ipynb)。

# %% tags=["nbval-check-output"]
model = FastLanguageModel.get_peft_model(
    model,
    r=16,  # how much the adapter can hold: 8 to 64 are usual
    lora_alpha=16,  # how strong it is: lora_alpha / r, here 1
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    use_gradient_checkpointing=False,  # keep results in memory instead of computing them twice
)
model.print_trainable_parameters()

# %% [markdown] lang="en"
# A row of your file holds `conversations` of `from` and `value`, or `messages` of `role` and `content`, or a `question`
# and an `answer`. Why, and how we know: [chapter 03](03_data.ipynb).

# %% [markdown] lang="zh"
# 你的文件里，每一行要么是由 `from` 和 `value` 组成的 `conversations`，
# 要么是由 `role` 和 `content` 组成的 `messages`，要么是 `question` 和 `answer` 两列，也就是问题和回答。
# 原因和依据见[第 03 章](03_data.ipynb)。

# %%
ROLES = {"human": "user", "gpt": "assistant"}
QUESTION, ANSWER = "instruction input question prompt".split(), "output answer response completion".split()


def to_messages(row):
    turns = row.get("conversations") or row.get("messages")
    if not turns:  # then a question and its answer, each in a column
        texts = ["\n\n".join(str(row[name]) for name in names if row.get(name)) for names in (QUESTION, ANSWER)]
        turns = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    turns = [{"role": "system", "content": row.get("system")}, *turns]
    pairs = [(turn.get("role") or turn["from"], turn.get("content") or turn.get("value") or "") for turn in turns]
    messages = [{"role": ROLES.get(role, role), "content": text.strip()} for role, text in pairs if text.strip()]
    roles = {message["role"] for message in messages}
    return messages if {"user", "assistant"} <= roles <= {"system", "user", "assistant"} else []

# %% [markdown] lang="en"
# A [*chat template*](glossary.ipynb#chat-template) writes a conversation as one text, with marks around each turn. An
# empty `CHAT_TEMPLATE` keeps the model's own. Why, and how we know: [chapter 03](03_data.ipynb).

# %% [markdown] lang="zh"
# [**对话模板**](glossary.ipynb#chat-template)（chat template）把一段对话写成一整段文本，每个轮次前后都有标记。
# `CHAT_TEMPLATE` 留空，就用模型自带的模板。原因和依据见[第 03 章](03_data.ipynb)。

# %%
from unsloth.chat_templates import get_chat_template

if CHAT_TEMPLATE:
    tokenizer = get_chat_template(tokenizer, chat_template=CHAT_TEMPLATE)
bos = tokenizer.bos_token if tokenizer("").input_ids else ""  # the tokenizer adds this first mark itself


def to_text(row):
    messages = to_messages(row)
    text = tokenizer.apply_chat_template(messages, tokenize=False).removeprefix(bos).strip() if messages else ""
    return {"conversations": messages, "text": text, "tokens": len(tokenizer(text).input_ids)}

# %% [markdown] lang="en"
# A [*step*](glossary.ipynb#step) changes the adapter once, after 8 conversations, so `MAX_STEPS` says how many are
# needed. Rows that are too long or lack an answer are left out. Why, and how we know: [chapter 03](03_data.ipynb).

# %% [markdown] lang="zh"
# 每用完 8 段对话，适配器就更新一次，这叫一[**步**](glossary.ipynb#step)（step）。所以 `MAX_STEPS` 决定了需要多少段对话。
# 太长的行和没有回答的行会被去掉。原因和依据见[第 03 章](03_data.ipynb)。

# %% tags=["nbval-check-output"]
from datasets import load_dataset

kind = {"jsonl": "json", "json": "json", "csv": "csv"}.get(DATASET.rpartition(".")[2].lower())
rows = load_dataset(kind, data_files=DATASET, split="train") if kind else load_dataset(DATASET, split="train")
rows = rows.shuffle(seed=3407).select(range(min(len(rows), 8 * MAX_STEPS + EVAL_ROWS)))
dataset = rows.map(to_text, remove_columns=rows.column_names)
dataset = dataset.filter(lambda row: row["conversations"] and row["tokens"] <= MAX_SEQ_LENGTH)
if len(dataset) <= EVAL_ROWS:
    raise ValueError(f"Found {len(dataset)} usable rows. Fix: a lower EVAL_ROWS, or rows unlike {str(rows[0])[:200]}")
train_dataset, eval_dataset = dataset.train_test_split(test_size=EVAL_ROWS, seed=3407).values()
print(f"{len(train_dataset)} to train on, {len(eval_dataset)} held out, {len(rows) - len(dataset)} left out")

# %% [markdown] lang="en"
# These settings fit a T4: with 1,024 tokens they need about 12 of its 14.7 GiB, by calculation. `LEARNING_RATE` is how
# far a step goes. Why, and how we know: [chapter 04](04_train.ipynb).

# %% [markdown] lang="zh"
# 这些设置适合 T4：据计算，对话长 1,024 个词元时，14.7 GiB 显存大约会用掉 12 GiB。
# `LEARNING_RATE`（学习率）决定一步走多远。原因和依据见[第 04 章](04_train.ipynb)。

# %%
from trl import SFTConfig

settings = SFTConfig(
    output_dir=OUTPUT_DIR,
    max_steps=MAX_STEPS,
    learning_rate=LEARNING_RATE,
    warmup_steps=0.1,  # the first tenth of the steps goes less far
    per_device_train_batch_size=4,  # conversations at once
    gradient_accumulation_steps=2,  # times before a step: 4 × 2 = 8 conversations
    gradient_checkpointing=False,  # keep results in memory instead of computing them twice
    padding_free=True,  # conversations one behind the other, nothing filled up
    max_length=MAX_SEQ_LENGTH,  # in tokens
    optim="adamw_8bit",  # how a step is made from the gradients: the usual way, with less memory
    save_strategy="no",  # the adapter is saved below
)

# %% [markdown] lang="en"
# The model shall learn to answer, not to ask. Above the line is what it reads, below it what it learns to write. Why,
# and how we know: [chapter 04](04_train.ipynb).

# %% [markdown] lang="zh"
# 模型要学的是回答，不是问题。横线上方是它读到的内容，下方是它要学着写的内容。
# 原因和依据见[第 04 章](04_train.ipynb)。

# %% tags=["nbval-check-output"]
from trl import SFTTrainer
from unsloth.chat_templates import train_on_responses_only

trainer = SFTTrainer(
    model=model, processing_class=tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset, args=settings
)
trainer = train_on_responses_only(trainer)
row = trainer.train_dataset[0]
print("", tokenizer.decode(row["input_ids"]), "—" * 60, sep="\n")
print(tokenizer.decode([label for label in row["labels"] if label != -100]))

# %% [markdown] lang="en"
# The [*loss*](glossary.ipynb#loss) says how badly the model predicts the held-out answers. With FineTome expect a small
# fall: Llama answers such questions already. Why, and how we know: [chapter 04](04_train.ipynb).

# %% [markdown] lang="zh"
# [**损失**](glossary.ipynb#loss)（loss）衡量模型对留出的回答预测得有多差。用 FineTome 时，预计损失只会小幅下降：
# 这类问题 Llama 本来就会回答。原因和依据见[第 04 章](04_train.ipynb)。

# %%
import torch

before = trainer.evaluate()["eval_loss"]
seconds = trainer.train().metrics["train_runtime"]
after = trainer.evaluate()["eval_loss"]
print(f"Held-out loss: {before:.2f} before, {after:.2f} after")
print(f"Training: {seconds:.0f} s, GPU memory at the peak: {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")

# %% [markdown] lang="en"
# The model without its adapter is the base model. Both answer two held-out questions. Why, and how we know:
# [chapter 05](05_infer.ipynb).

# %% [markdown] lang="zh"
# 去掉适配器，模型就是基座模型。下面让两者回答同样的两个留出问题。
# 原因和依据见[第 05 章](05_infer.ipynb)。

# %%
def answer(messages):
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt.to(model.device), max_new_tokens=64, do_sample=False)  # the likeliest tokens
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


FastLanguageModel.for_inference(model)
for row in eval_dataset.select(range(2)):
    question = row["conversations"][:-1]
    with model.disable_adapter():
        print(f"QUESTION   {question[-1]['content']}\n\nUNTOUCHED  {answer(question)}\n")
    print(f"TRAINED    {answer(question)}\n" + "—" * 60)

# %% [markdown] lang="en"
# The adapter is a small folder that needs the base model beside it. Why, and how we know:
# [chapter 06](06_save.ipynb).

# %% [markdown] lang="zh"
# 适配器是一个小文件夹，使用时还需要基座模型。原因和依据见[第 06 章](06_save.ipynb)。

# %% tags=["handoff"]
tokenizer.save_pretrained(f"{OUTPUT_DIR}/adapter")
model.save_pretrained(f"{OUTPUT_DIR}/adapter")

# %% [markdown] lang="en"
# A [GGUF](glossary.ipynb#gguf) file is the whole model for programs such as Ollama. The adapter joins weights of 16
# bits, so that nothing is rounded twice. Why, and how we know: [chapter 06](06_save.ipynb).

# %% [markdown] lang="zh"
# [GGUF](glossary.ipynb#gguf) 文件是完整的模型，供 Ollama 这类程序使用。适配器合并到 16 位的权重里，这样权重就不会舍入两次。
# 原因和依据见[第 06 章](06_save.ipynb)。

# %% tags=["handoff"]
import gc

if GGUF:
    del model, trainer  # make room for the larger weights
    gc.collect()
    torch.cuda.empty_cache()
    model, tokenizer = FastLanguageModel.from_pretrained(f"{OUTPUT_DIR}/adapter", load_in_4bit=False)
    model.save_pretrained_gguf(f"{OUTPUT_DIR}/model", tokenizer, quantization_method=GGUF)

# %% [markdown] lang="en"
# Any Python loads the adapter:
# ```python
# from peft import AutoPeftModelForCausalLM
# model = AutoPeftModelForCausalLM.from_pretrained("quickstart/adapter")
# ```
# Ollama runs the GGUF file, with Unsloth's `Modelfile`:
# ```
# ollama create my-model -f Modelfile
# ollama run my-model
# ```
# After `pip install ollama`, Python asks it too:
# ```python
# from ollama import chat
# print(chat("my-model", messages=[{"role": "user", "content": "Hello!"}]).message.content)
# ```
# Why, and how we know: [chapter 06](06_save.ipynb).

# %% [markdown] lang="zh"
# 任何 Python 环境都能加载这个适配器：
# ```python
# from peft import AutoPeftModelForCausalLM
# model = AutoPeftModelForCausalLM.from_pretrained("quickstart/adapter")
# ```
# Ollama 按照 Unsloth 写好的 `Modelfile` 运行 GGUF 文件：
# ```
# ollama create my-model -f Modelfile
# ollama run my-model
# ```
# 运行 `pip install ollama` 之后，也可以用 Python 向它提问：
# ```python
# from ollama import chat
# print(chat("my-model", messages=[{"role": "user", "content": "Hello!"}]).message.content)
# ```
# 原因和依据见[第 06 章](06_save.ipynb)。

# %%
from pathlib import Path

print(*Path(OUTPUT_DIR).rglob("*.gguf"))
print(f"Result: held-out loss {before:.2f} → {after:.2f} in {seconds:.0f} s of training")

# %% [markdown] lang="en"
# Download both now: Colab takes its machines back.
#
# On your own: 50 conversations teach a form, hundreds better. `MAX_STEPS` times 8 rows are trained on, a small file
# several times over.
#
# {{next}}

# %% [markdown] lang="zh"
# 现在就把适配器和 GGUF 文件都下载下来：Colab 会收回这台机器。
#
# 自己动手：50 段对话就能教会模型一种形式，几百段效果更好。训练用到的行数是 `MAX_STEPS` 乘以 8；
# 文件小的话，同一行会用上好几遍。
#
# {{next}}
