# %% [markdown] lang="en"
# # Turn your conversations into training text
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/03_data.ipynb)
#
# At the end you have a training set and a [held-out](glossary.ipynb#held-out-set) set, written in the form in which the
# model learned to chat.
#
# You can
# - read a [chat template](glossary.ipynb#chat-template) and say which [tokens](glossary.ipynb#token) open and end a turn,
# - read conversations of any common form,
# - find broken conversations before they cost you a training run,
# - choose a sequence length from the data instead of guessing it.
#
# You need nothing from the chapters before. Only the model's [tokenizer](glossary.ipynb#tokenizer) is loaded.
#
# {{budget}}

# %% [markdown] lang="zh"
# # 把你的对话变成训练文本
#
# [![在 Colab 中打开](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/zh-CN/03_data.ipynb)
#
# 学完这一章，你会有一个训练集和一个[留出](glossary.ipynb#held-out-set)集。两者的写法，都和模型当初学习对话时见到的一样。
#
# 学完后你能
# - 读懂[对话模板](glossary.ipynb#chat-template)，说出哪些[词元](glossary.ipynb#token)开始一个轮次，哪些词元结束一个轮次；
# - 读取各种常见格式的对话；
# - 提前找出不合格的对话，免得白白浪费一次训练；
# - 根据数据来选序列长度，而不是靠猜。
#
# 这一章不需要前面几章的任何结果，只会加载模型的[分词器](glossary.ipynb#tokenizer)。
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `DATASET` is a file of your own, a folder, or the name of a data set on the Hub. The default is a file of 528 short
# support conversations of an invented company. On them you will *see* what training does: almost every answer has the
# same three lines. `"mlabonne/FineTome-100k"`, general questions and answers, is another choice.
#
# `"notebooks/data/support_conversations_zh.jsonl"` has 60 support conversations in Chinese, for which `EVAL_ROWS` is 12.
#
# `COLUMNS` stays empty until a message asks for it, as for `"Frage, Antwort"`. `ROWS` conversations are read, and
# `EVAL_ROWS` of them held out. `CHAT_TEMPLATE` is a name that Unsloth knows; empty means the model's own. `MODEL_NAME`,
# `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and `USE_MODELSCOPE` are as in chapter 02.
#
# `RUN_DIR` is the folder through which chapters hand their results on. It ends with a Colab machine, unless
# `DRIVE_DIR` names a folder on your Google Drive that gets a copy.

# %% [markdown] lang="zh"
# `DATASET` 可以是你自己的文件、一个文件夹，或者 Hub 上一个数据集的名字。
# 默认值是一个文件，里面有一家虚构公司的 528 段简短客服对话。通过这些对话，你能亲眼**看到**训练的作用：
# 几乎每个回答都是同样的三行格式。另一个选择是 `"mlabonne/FineTome-100k"`，里面是一般性问题和回答。
#
# `"notebooks/data/support_conversations_zh.jsonl"` 里有 60 段中文客服对话，用它时把 `EVAL_ROWS` 设为 12。
#
# `COLUMNS` 先留空，等看到消息要求填写时再填，例如 `"Frage, Antwort"`。
# 一共读取 `ROWS` 段对话，其中 `EVAL_ROWS` 段留出。`CHAT_TEMPLATE` 是 Unsloth 认识的模板名；
# 留空就用模型自带的模板。`MODEL_NAME`、`MAX_SEQ_LENGTH`、`HF_ENDPOINT` 和 `USE_MODELSCOPE` 与第 02 章相同。
#
# `RUN_DIR` 是各章交接结果用的文件夹。它会随 Colab 机器一起消失，
# 除非你用 `DRIVE_DIR` 指定自己 Google Drive 里的一个文件夹，另存一份副本。

# %% tags=["parameters"]
# @title Choices · 选项
MODEL_NAME = "unsloth/Llama-3.2-3B-Instruct"  # @param {type:"string"}
CHAT_TEMPLATE = "llama-3.1"  # @param {type:"string"}
DATASET = "notebooks/data/support_conversations.jsonl"  # @param {type:"string"}
COLUMNS = ""  # @param {type:"string"}
ROWS = 2000  # @param {type:"integer"}
EVAL_ROWS = 48  # @param {type:"integer"}
MAX_SEQ_LENGTH = 2048  # @param {type:"integer"}
RUN_DIR = "runs/llama"  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.environment import check_choices, find_model
from helpers.handoff import open_run

check_choices(globals())
MODEL_NAME = find_model(MODEL_NAME, endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE, weights=False)
run = open_run(RUN_DIR, chapter="03_data", base_model=MODEL_NAME, drive=DRIVE_DIR)

# %% [markdown] lang="en"
# ## Choose the chat template
#
# A chat model reads one long string. Its *chat template* writes the turns into it, between [*special
# tokens*](glossary.ipynb#special-token) that stand for no text but for the beginning or the end of a turn. Training
# must use the template that the model was taught, or it learns a second dialect. Llama 3.2 uses that of Llama 3.1.
#
# Llama's template prints a date, and a server would print today's. The last line pins the one that Unsloth's training
# prints, so that the model is later asked as it was trained.

# %% [markdown] lang="zh"
# ## 选择对话模板
#
# 对话模型读到的是一个长字符串。**对话模板**（chat template）把各个轮次写进这个字符串，
# 并在轮次之间插入[**特殊词元**](glossary.ipynb#special-token)（special token）。特殊词元不代表任何文字，只表示一个轮次的开始或结束。
# 训练时必须用模型当初学过的模板，否则模型就会学到第二种“方言”。Llama 3.2 用的是 Llama 3.1 的模板。
#
# Llama 的模板会写入一个日期，而服务器会写入当天的日期。下面代码的最后一行把日期固定为 Unsloth 训练时写入的那一个。
# 这样，以后提问时写出的文本就和训练时一致。

# %%
from unsloth.chat_templates import get_chat_template  # before transformers: it patches it
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL_NAME)
if CHAT_TEMPLATE:
    tokenizer = get_chat_template(tokenizer, chat_template=CHAT_TEMPLATE)
if "date_string" in tokenizer.chat_template:
    tokenizer.chat_template = '{%- set date_string = "26 July 2024" %}' + tokenizer.chat_template

# %% [markdown] lang="en"
# This is one exchange, written out. In Llama's template a turn is `<|start_header_id|>user<|end_header_id|>`, an empty
# line, the text and `<|eot_id|>`. In ChatML, which SmolLM2 and Qwen use, it stands between `<|im_start|>user` and
# `<|im_end|>`. A system turn, which tells the model how to behave, comes first even if you gave none.

# %% [markdown] lang="zh"
# 下面是按模板写出来的一问一答。在 Llama 的模板里，
# 一个轮次依次是 `<|start_header_id|>user<|end_header_id|>`、一个空行、正文和 `<|eot_id|>`。
# 在 SmolLM2 和 Qwen 使用的 ChatML 里，一个轮次写在 `<|im_start|>user` 和 `<|im_end|>` 之间。
# 系统轮次规定模型该如何表现。即使你没有写，它也会出现在最前面。

# %% tags=["nbval-check-output"]
example = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
print(tokenizer.apply_chat_template(example, tokenize=False))

# %% [markdown] lang="en"
# Much can go wrong here without a word: an end token that generation does not stop on, or a special token that got
# another meaning. `check_template` tries it, and compares with the tokenizer as it was loaded. *BOS* opens a text,
# *EOS* ends it, and *pad* fills a short row up.

# %% [markdown] lang="zh"
# 这里有很多地方会悄悄出错：例如生成时遇到结束词元却停不下来，或者某个特殊词元换了含义。
# `check_template` 会实际试一遍，并与刚加载时的分词器比较。
# **BOS** 表示一段文本的开头，**EOS** 表示结尾，**pad** 用来填充较短的行。

# %% tags=["nbval-check-output"]
from helpers.template import check_template

untouched = AutoTokenizer.from_pretrained(MODEL_NAME)
template_report = check_template(tokenizer, original=untouched)
template_report.raise_if_failed()
template_report

# %% [markdown] lang="en"
# Try it on a mistake: the template of another family. `get_chat_template` takes it; at most it remarks which token it
# makes the end. Read the rows that say *problem*: an id that the model knows by one name now has another.

# %% [markdown] lang="zh"
# 故意弄错一次试试：换成另一个模型家族的模板。`get_chat_template` 会照样接受，最多提一句它把哪个词元当作结尾。
# 请看标着 **problem** 的那几行：模型学到的词元名字，和现在这个编号对应的名字不一样。

# %% tags=["nbval-check-output"]
foreign = get_chat_template(AutoTokenizer.from_pretrained(MODEL_NAME), chat_template="gemma")
check_template(foreign, original=untouched)

# %% [markdown] lang="en"
# ## Read the conversations
#
# Rows may have any of these forms:
#
# | form | a row |
# |---|---|
# | ShareGPT | `{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}` |
# | messages | `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}` |
# | Alpaca | `{"instruction": "…", "input": "…", "output": "…"}` |
# | table | two columns, such as `question` and `answer` |
# | one turn a row | `{"conversation_id": 7, "role": "user", "content": "…"}` |

# %% [markdown] lang="zh"
# ## 读取对话
#
# 数据里的一行可以是下面任意一种格式：
#
# | 格式 | 一行数据 |
# |---|---|
# | ShareGPT | `{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}` |
# | messages | `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}` |
# | Alpaca | `{"instruction": "…", "input": "…", "output": "…"}` |
# | 表格 | 两列，例如 `question` 和 `answer` |
# | 每行一个轮次 | `{"conversation_id": 7, "role": "user", "content": "…"}` |

# %%
import os

if os.path.isfile(DATASET):  # the first line, as it stands in the file
    with open(DATASET, encoding="utf-8", errors="replace") as file:
        print(file.readline()[:500])

# %% [markdown] lang="en"
# `read_conversations` finds the form by looking, and says which. Files may be `.jsonl`, `.json`, `.csv`, `.tsv`
# or `.parquet`. Every row becomes a list of turns with `role` and `content`.
#
# Some rows would teach nothing, or something wrong: an empty answer, two questions in a row, a special token inside a
# text, a copy of an earlier row. A row of more than `MAX_SEQ_LENGTH` tokens would lose its end, and teach answers that
# never end. All are counted and left out.

# %% [markdown] lang="zh"
# `read_conversations` 会查看数据，自动识别格式，并告诉你是哪一种。
# 文件可以是 `.jsonl`、`.json`、`.csv`、`.tsv` 或 `.parquet`。
# 每一行都会变成一个轮次列表，每个轮次有 `role` 和 `content`。
#
# 有些行教不了模型什么，或者会把模型教错：空的回答、连续两个问题、文本里夹着特殊词元、与前面某一行重复。
# 超过 `MAX_SEQ_LENGTH` 个词元的行会被截掉结尾，模型就会学着没完没了地回答。这些行都会被计数并排除。

# %% tags=["nbval-check-output"]
from helpers.conversations import read_conversations

dataset, conversation_report = read_conversations(
    DATASET,
    columns=COLUMNS,
    keep_columns=["split", "product", "right_help"],  # what the support conversations bring besides
    rows=ROWS,
    tokenizer=tokenizer,
    max_tokens=MAX_SEQ_LENGTH,
)
conversation_report.raise_if_failed()
conversation_report

# %% [markdown] lang="en"
# One conversation, as read:

# %% [markdown] lang="zh"
# 读进来的一段对话：

# %% tags=["nbval-check-output"]
dataset[0]["conversations"]

# %% [markdown] lang="en"
# Try it on a mistake. Somebody swapped the roles in row 1, counted from 0, and row 2 has no answer.

# %% [markdown] lang="zh"
# 再故意弄错一次试试。从 0 数起，第 1 行的角色写反了，第 2 行没有回答。

# %% tags=["nbval-check-output"]
broken = [
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello! How can I help?"}]},
    {"conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Hello! How can I help?"}]},
    {"conversations": [{"from": "human", "value": "Is anybody there?"}, {"from": "gpt", "value": ""}]},
]
_, broken_report = read_conversations(broken)
broken_report

# %% [markdown] lang="en"
# ## From roles to text
#
# Llama's template writes a BOS token, and its tokenizer puts one in front of every text as well. The model would see
# two, so one is removed. Spaces and line breaks around a message go too: one in front of an answer would melt into the
# marker before it.

# %% [markdown] lang="zh"
# ## 从角色到文本
#
# Llama 的模板会写一个 BOS 词元，它的分词器也会在每段文本前面加一个。这样模型就会看到两个，所以要去掉一个。
# 消息前后的空格和换行也要去掉：如果回答以空格或换行开头，它就会和前面的标记粘在一起。

# %%
bos = tokenizer.bos_token if tokenizer("").input_ids else ""  # what the tokenizer adds by itself


def to_text(row):
    turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in row["conversations"]]
    return {"text": tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(bos)}


# %% tags=["nbval-check-output"]
dataset = dataset.map(to_text)
print(dataset[0]["text"])

# %% [markdown] lang="en"
# ## Look at the lengths
#
# The longest conversations decide how much memory training takes. Where a few are much longer than all others, a
# smaller `MAX_SEQ_LENGTH` makes training faster and costs only those.

# %% [markdown] lang="zh"
# ## 看一看长度
#
# 训练要占多少显存，由最长的对话决定。如果少数几段对话比其他的长得多，就可以把 `MAX_SEQ_LENGTH` 调小。
# 这样训练更快，失去的也只是这几段对话。

# %%
import matplotlib.pyplot as plt

lengths = [len(ids) for ids in tokenizer(dataset["text"]).input_ids]
plt.figure(figsize=(7, 2.2))
plt.hist(lengths, bins=40)
plt.xlabel(f"tokens in a conversation, the longest {max(lengths)}")
plt.ylabel("conversations")
plt.show()

# %% [markdown] lang="en"
# ## Hold some back
#
# The [*loss*](glossary.ipynb#loss) says how badly a model predicts a text. On text that it was trained on, a low loss
# proves nothing. The held-out rows are never trained on; chapter 04 measures them before and after.
#
# The support conversations bring their own split: no held-out question occurs in training. Other data are split
# at random, at most a fifth held out.

# %% [markdown] lang="zh"
# ## 留出一部分
#
# [**损失**](glossary.ipynb#loss)（loss）表示模型对一段文本预测得有多差。如果这段文本训练时用过，损失再低也说明不了什么。
# 留出的行从不参与训练；第 04 章会在训练前后各测一次模型在这些行上的损失。
#
# 客服对话自带划分：留出的问题都没有在训练数据里出现过。其他数据则随机划分，最多留出五分之一。

# %%
if "split" in dataset.column_names and {"train", "held_out"} == set(dataset["split"]):
    train_dataset = dataset.filter(lambda row: row["split"] == "train")
    eval_dataset = dataset.filter(lambda row: row["split"] == "held_out")
    eval_dataset = eval_dataset.select(range(min(EVAL_ROWS, len(eval_dataset))))
else:
    parts = dataset.train_test_split(test_size=min(EVAL_ROWS, len(dataset) // 5), seed=3407)
    train_dataset, eval_dataset = parts["train"], parts["test"]
print(f"{len(train_dataset)} conversations to train on, {len(eval_dataset)} held out")

# %% [markdown] lang="en"
# ## How many are enough?
#
# | you want | conversations |
# |---|---|
# | one form, one tone | [50](https://platform.openai.com/docs/guides/supervised-fine-tuning) to 500, differently worded |
# | tasks of many kinds | [1,000](https://arxiv.org/abs/2305.11206) and more |
# | new facts | write them into the prompt: training [teaches them badly](https://arxiv.org/abs/2405.05904) |
#
# Hold back 20 or more. Where 10 of 20 replies are right, the true share may be 30 to 70 %; with 50 of 100, 40 to 60 %.
#
# Of 5,000 rows, `ROWS` reads 2,000, and chapter 04's 60 [steps](glossary.ipynb#step) train on 480: raise `ROWS`, and
# set its `EPOCHS`. Chapter 07 measures what a model forgets, and mixes general rows in.

# %% [markdown] lang="zh"
# ## 多少数据才够？
#
# | 你想要 | 对话数 |
# |---|---|
# | 一种格式、一种语气 | [50](https://platform.openai.com/docs/guides/supervised-fine-tuning) 到 500 段，措辞各不相同 |
# | 多种多样的任务 | [1,000](https://arxiv.org/abs/2305.11206) 段以上 |
# | 新的事实 | 写进提示词：靠训练[教不好](https://arxiv.org/abs/2405.05904) |
#
# 至少留出 20 段。如果 20 条回复里有 10 条正确，真实的比例可能在 30% 到 70% 之间；
# 如果 100 条里有 50 条正确，则在 40% 到 60% 之间。
#
# 假如你有 5,000 行数据，`ROWS` 只会读取 2,000 行，而第 04 章的 60 [步](glossary.ipynb#step)只用其中 480 行来训练。
# 所以请调大 `ROWS`，并设置那一章的 `EPOCHS`。第 07 章会测量模型忘掉了什么，并在训练时混入一般性的数据行。

# %% [markdown] lang="en"
# ## Hand the data on
#
# The tokenizer travels with the data, so that chapter 04 trains with the template that you looked at.

# %% [markdown] lang="zh"
# ## 交接数据
#
# 分词器和数据一起交接。这样，第 04 章训练时用的就是你刚才看过的模板。

# %% tags=["handoff"]
from datasets import DatasetDict

DatasetDict(train=train_dataset, held_out=eval_dataset).save_to_disk(f"{RUN_DIR}/new/dataset")
tokenizer.save_pretrained(f"{RUN_DIR}/new/dataset/tokenizer")

# %% [markdown] lang="en"
# What lies in `new` counts once it is whole: `run.keep` moves it into the run folder, notes a checksum of every file,
# and copies it to `DRIVE_DIR`. The template's *fingerprint* tells later chapters if another one gets in between.

# %% [markdown] lang="zh"
# `new` 里的内容要齐全了才算数：`run.keep` 会把它移进运行文件夹，记下每个文件的校验和，再复制到 `DRIVE_DIR`。
# 如果中途换成了别的模板，后面的章节能从模板的**指纹**（fingerprint）看出来。

# %% tags=["handoff"]
name = os.path.basename(DATASET) if os.path.isfile(DATASET) else DATASET
source = conversation_report.source  # a checksum of the file: chapter 04 notices where you changed it since
rows = {"dataset": name, "train_rows": len(train_dataset)}
run.keep("dataset", chat_template=tokenizer.chat_template, source=source, **rows)
run.record("03_data", train_rows=len(train_dataset), eval_rows=len(eval_dataset), longest_tokens=max(lengths))

# %%
print(f"Result: {len(train_dataset)} + {len(eval_dataset)} conversations, longest {max(lengths)} tokens")

# %% [markdown] lang="en"
# ## Where you are
#
# You have `dataset/` in the run folder: two sets of checked conversations as text, and the tokenizer.
#
# On your own: how many conversations would `MAX_SEQ_LENGTH = 96` leave out?
#
# <details><summary>Solution</summary>
#
# ```python
# too_long = [length for length in lengths if length > 96]
# print(f"{len(too_long)} of {len(lengths)} are longer than 96 tokens")
# ```
#
# 79 of the 528 support conversations, with SmolLM2's tokenizer.
#
# </details>
#
# On your own: write questions and answers into a `.csv` file, one without an answer, and read it.
#
# <details><summary>Solution</summary>
#
# ```python
# import csv
# import tempfile
# path = f"{tempfile.mkdtemp()}/mine.csv"
# table = [("question", "answer"), ("Do you ship abroad?", "Yes, to all of Europe."), ("May I pay later?", "")]
# with open(path, "w", newline="", encoding="utf-8") as file:
#     csv.writer(file).writerows(table)
# mine, mine_report = read_conversations(path, tokenizer=tokenizer, max_tokens=MAX_SEQ_LENGTH)
# print(mine_report)
# print(len(mine), "kept:", mine[0]["conversations"])
# ```
#
# The columns are found by their names, and the row without an answer is left out.
#
# </details>
#
# {{next}}

# %% [markdown] lang="zh"
# ## 到这里为止
#
# 运行文件夹里已经有 `dataset/`，里面是两组检查过并写成文本的对话，还有分词器。
#
# 自己动手：如果设置 `MAX_SEQ_LENGTH = 96`，会排除多少段对话？
#
# <details><summary>参考答案</summary>
#
# ```python
# too_long = [length for length in lengths if length > 96]
# print(f"{len(too_long)} of {len(lengths)} are longer than 96 tokens")
# ```
#
# 用 SmolLM2 的分词器，528 段客服对话里会排除 79 段。
#
# </details>
#
# 自己动手：把几组问题和回答写进 `.csv` 文件，其中一组没有回答，再读取这个文件。
#
# <details><summary>参考答案</summary>
#
# ```python
# import csv
# import tempfile
# path = f"{tempfile.mkdtemp()}/mine.csv"
# table = [("question", "answer"), ("Do you ship abroad?", "Yes, to all of Europe."), ("May I pay later?", "")]
# with open(path, "w", newline="", encoding="utf-8") as file:
#     csv.writer(file).writerows(table)
# mine, mine_report = read_conversations(path, tokenizer=tokenizer, max_tokens=MAX_SEQ_LENGTH)
# print(mine_report)
# print(len(mine), "kept:", mine[0]["conversations"])
# ```
#
# 程序根据列名认出两列，并排除了没有回答的那一行。
#
# </details>
#
# {{next}}
