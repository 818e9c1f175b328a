# %% [markdown] lang="en"
# # Turn your conversations into training text
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/03_data.ipynb)
#
# At the end you have a training set and a held-out set, written in the form in which the model learned to chat.
#
# You can
# - read a chat template and say which tokens open and end a turn,
# - read conversations of any common form,
# - find broken conversations before they cost you a training run,
# - choose a sequence length from the data instead of guessing it.
#
# You need nothing from the chapters before. Only the model's tokenizer is loaded.
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `DATASET` is a file of your own, a folder, or the name of a data set on the Hub. The default is a file of 528 short
# support conversations of an invented company. On them you will *see* what training does: almost every answer has the
# same three lines. `"mlabonne/FineTome-100k"`, general questions and answers, is another choice.
#
# `COLUMNS` stays empty until a message asks for it, as for `"Frage, Antwort"`. `ROWS` conversations are read, and
# `EVAL_ROWS` of them held out. `CHAT_TEMPLATE` is a name that Unsloth knows; empty means the model's own. `MODEL_NAME`,
# `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and `USE_MODELSCOPE` are as in chapter 02.
#
# `RUN_DIR` is the folder through which chapters hand their results on. It ends with a Colab machine, unless
# `DRIVE_DIR` names a folder on your Google Drive that gets a copy.

# %% tags=["parameters"]
# @title Choices
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
# A chat model reads one long string. Its *chat template* writes the turns into it, between *special tokens* that stand
# for no text but for the beginning or the end of a turn. Training must use the template that the model was taught, or
# it learns a second dialect. Llama 3.2 uses that of Llama 3.1.
#
# Llama's template prints a date, and a server would print today's. The last line pins the one that Unsloth's training
# prints, so that the model is later asked as it was trained.

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

# %% tags=["nbval-check-output"]
example = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
print(tokenizer.apply_chat_template(example, tokenize=False))

# %% [markdown] lang="en"
# Much can go wrong here without a word: an end token that generation does not stop on, or a special token that got
# another meaning. `check_template` tries it, and compares with the tokenizer as it was loaded. *BOS* opens a text, *EOS*
# ends it, and *pad* fills a short row up.

# %% tags=["nbval-check-output"]
from helpers.template import check_template

untouched = AutoTokenizer.from_pretrained(MODEL_NAME)
template_report = check_template(tokenizer, original=untouched)
template_report.raise_if_failed()
template_report

# %% [markdown] lang="en"
# Try it on a mistake: the template of another family. `get_chat_template` takes it; at most it remarks which token it
# makes the end. Read the rows that say *problem*: an id that the model knows by one name now has another.

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

# %% tags=["nbval-check-output"]
dataset[0]["conversations"]

# %% [markdown] lang="en"
# Try it on a mistake. Somebody swapped the roles in row 1, counted from 0, and row 2 has no answer. Change them, run the
# cell again, and see what it finds.

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
# The *loss* says how badly a model predicts a text. On text that it was trained on, a low loss proves nothing. The
# held-out rows are never trained on; chapter 04 measures them before and after.
#
# The support conversations bring their own split: no held-out question occurs in training. Other data are split
# at random, at most a fifth held out.

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
# Of 5,000 rows, `ROWS` reads 2,000, and chapter 04's 60 steps train on 480: raise `ROWS`, and set its `EPOCHS`.
# Chapter 07 measures what a model forgets, and mixes general rows in.

# %% [markdown] lang="en"
# ## Hand the data on
#
# The tokenizer travels with the data, so that chapter 04 trains with the template that you looked at.

# %% tags=["handoff"]
from datasets import DatasetDict

DatasetDict(train=train_dataset, held_out=eval_dataset).save_to_disk(f"{RUN_DIR}/new/dataset")
tokenizer.save_pretrained(f"{RUN_DIR}/new/dataset/tokenizer")

# %% [markdown] lang="en"
# What lies in `new` counts once it is whole: `run.keep` moves it into the run folder, notes a checksum of every file,
# and copies it to `DRIVE_DIR`. The template's *fingerprint* tells later chapters if another one gets in between.

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
# On your own, with another `RUN_DIR`: write ten questions and answers into a table, save it as `.csv` with the columns
# `question` and `answer`, and give its path as `DATASET`. Set `MAX_SEQ_LENGTH` to 96 and see how many rows no longer fit.
#
# {{next}}
