# %% [markdown] lang="en"
# # Turn ShareGPT conversations into training text
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/03_data.ipynb)
#
# At the end you have a training set and a held-out set, written in the format in which the model learned to chat.
#
# You can
# - read a chat template and say which tokens open and end a turn,
# - convert ShareGPT (`from`/`value`) to `role`/`content`,
# - find broken conversations before they cost you a training run,
# - choose a sequence length from the data instead of guessing it.
#
# You need nothing from the chapters before. The model's weights are not loaded, only its *tokenizer*, which turns text
# into tokens and back.
#
# {{budget}}

# %%
# include: setup_cell.py

# %% [markdown] lang="en"
# `DATASET` takes the name of a data set on the Hugging Face Hub, or the path of a `.json` or `.jsonl` file of your own
# with one `{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}` a row. `MAX_STEPS` is
# how long chapter 04 will train, and so how many rows are prepared. `PROFILE`, `MODEL_NAME`, `MAX_SEQ_LENGTH`,
# `RUN_DIR` and `DRIVE_DIR` are as in chapter 02; empty means the profile's own value. `HF_ENDPOINT` and
# `USE_MODELSCOPE` choose the hub, as in chapter 01. Data sets never come from ModelScope.

# %% tags=["parameters"]
# @title Choices
PROFILE = "auto"  # @param ["auto", "t4", "cpu"]
MODEL_NAME = ""  # @param {type:"string"}
DATASET = ""  # @param {type:"string"}
MAX_SEQ_LENGTH = None  # @param {type:"raw"}
MAX_STEPS = None  # @param {type:"raw"}
RUN_DIR = ""  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.handoff import fingerprint, open_run
from helpers.environment import choose_hub
from helpers.profiles import choose_profile, choose_template, data_source, model_source

choose_hub(HF_ENDPOINT, modelscope=USE_MODELSCOPE)
choices = dict(model_name=MODEL_NAME, dataset=DATASET, max_seq_length=MAX_SEQ_LENGTH, max_steps=MAX_STEPS)
profile = choose_profile(PROFILE, **choices, run_dir=RUN_DIR)
run = open_run(profile.run_dir, drive=DRIVE_DIR)
profile

# %% [markdown] lang="en"
# ## Look at the chat template
#
# A chat model reads one long string. Its *chat template* writes the turns into it, between *special tokens*, which
# stand for no text but for the beginning and the end of a turn. Training must use the template that the model was
# taught, or it learns a second dialect. Llama 3.2 uses Llama 3.1's, which Unsloth knows by the name `llama-3.1`; a
# model of another family keeps its own. Llama's prints a date, and a server would print today's where you trained with
# another: `pin_date` writes one into the template.

# %%
import copy  # get_chat_template changes a tokenizer; the check below compares it with the untouched one

from unsloth.chat_templates import get_chat_template, standardize_sharegpt  # before transformers: it patches it
from transformers import AutoTokenizer

from helpers.template import pin_date

untouched = AutoTokenizer.from_pretrained(model_source(profile.model_name, weights=False))
tokenizer = copy.deepcopy(untouched)
template = choose_template(tokenizer)
if template.name:
    tokenizer = get_chat_template(tokenizer, chat_template=template.name)
tokenizer.chat_template = pin_date(tokenizer.chat_template)
print(f"Template: {template.name or 'the model’s own'}, known by {template.known_by}")

# %% [markdown] lang="en"
# This is one exchange, written out. In Llama's template a turn is `<|start_header_id|>user<|end_header_id|>`, an empty
# line, the text and `<|eot_id|>`, and `<|begin_of_text|>` opens the whole, once: the BOS, *beginning of sequence*. In
# ChatML, which SmolLM2 and Qwen use, a turn stands between `<|im_start|>user` and `<|im_end|>`, and nothing opens the
# whole. A system turn, which tells the model how to behave, comes first here, even if you gave none (Llama's names two
# dates).

# %% tags=["nbval-check-output"]
example = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
print(tokenizer.apply_chat_template(example, tokenize=False))

# %% [markdown] lang="en"
# Much can go wrong between a template and a tokenizer without a word: BOS twice, an end token (EOS, *end of sequence*)
# that generation does not stop on, a padding token (which fills short rows up) that looks like the end, special tokens
# that got another meaning. `check_template` tries each of them, and compares with the tokenizer as it was loaded.
# (SmolLM2 has no BOS of its own: its file names `<|im_start|>`, which the tokenizer does not add by itself.)

# %% tags=["nbval-check-output"]
from helpers.template import check_template, format_conversations

template_report = check_template(tokenizer, original=untouched)
template_report.raise_if_failed()
template_report

# %% [markdown] lang="en"
# Try it on a mistake: the template of another family. `get_chat_template` accepts it; at most it remarks which token it
# makes the end. Read the last row: the model learned that one id ends an answer, under one name, and now that id has
# another name; and the marks that open a turn are words that it never saw in this place. Put other names in, such as
# `"chatml"`, `"zephyr"` or `"llama-3.1"`, and see which of them fit.

# %% tags=["nbval-check-output"]
wrong_template = "gemma"
foreign = get_chat_template(copy.deepcopy(untouched), chat_template=wrong_template)
check_template(foreign, original=untouched)

# %% [markdown] lang="en"
# ## Load the conversations
#
# Of a Hub data set only the rows that will be trained are prepared, plus those that are held out: on a T4, 60 steps of
# 8 conversations need 480 rows, not all 100,000 of FineTome. It is downloaded whole, once; the slice in `split` spares
# the work on the other rows. A file of your own is read and checked whole, and what is not needed is left out at the
# end of this chapter.

# %%
from datasets import load_dataset

source = data_source(profile.dataset)
rows_needed = profile.train_rows + profile.eval_rows
split = "train" if source["path"] == "json" else f"train[:{rows_needed}]"
raw_dataset = load_dataset(**source, split=split)
print(
    f"Needed: {rows_needed} rows ({profile.max_steps} steps of {profile.effective_batch_size}, and held-out ones)"
)
raw_dataset

# %% [markdown] lang="en"
# One conversation as it comes. This is *ShareGPT*: a list of turns, each with `from` (`human` or `gpt`) and `value`.

# %% tags=["nbval-check-output"]
raw_dataset[0]["conversations"]

# %% [markdown] lang="en"
# ## Check every conversation
#
# Rows that cannot teach anything, or would teach something wrong (an empty answer, two user turns in a row, a special
# token inside the text, a conversation that was there before), are counted and left out.

# %% tags=["nbval-check-output"]
from helpers.conversations import validate_conversations

conversation_report = validate_conversations(raw_dataset, tokenizer=tokenizer)
raw_dataset = raw_dataset.select(conversation_report.valid_rows)
conversation_report

# %% [markdown] lang="en"
# Try it on a mistake. Here somebody swapped the roles of the second row, and the third has no answer. (The column
# `which` counts rows from 0.) Change the rows, run the cell again, and see what it finds.

# %% tags=["nbval-check-output"]
broken = [
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello! How can I help?"}]},
    {"conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Hello! How can I help?"}]},
    {"conversations": [{"from": "human", "value": "Is anybody there?"}, {"from": "gpt", "value": ""}]},
]
validate_conversations(broken)

# %% [markdown] lang="en"
# ## From ShareGPT to roles
#
# Templates want `role` (`user`, `assistant`) and `content`. `standardize_sharegpt` renames them and touches nothing
# else. One process (`num_proc=1`) is enough for so few rows.

# %% tags=["nbval-check-output"]
dataset = standardize_sharegpt(raw_dataset, num_proc=1)
dataset[0]["conversations"]

# %% [markdown] lang="en"
# ## From roles to text
#
# `format_conversations` calls `tokenizer.apply_chat_template` on each conversation. It drops a leading BOS where the
# tokenizer adds one by itself, or the model would see it twice, and it strips the white space around each message: a
# newline before an answer would melt into one token with the marker before it, and the answer would not be found.
# `batched=True` hands it a thousand conversations in one call.

# %%
dataset = dataset.map(format_conversations, fn_kwargs={"tokenizer": tokenizer}, batched=True, desc="Format")

# %% tags=["nbval-check-output"]
print(dataset[0]["text"])

# %% [markdown] lang="en"
# ## Choose the sequence length
#
# What is longer than `max_seq_length` would be cut off, and with it the end of the answer and its end token: the model
# would read answers that never end. So such rows are left out. The orange line is your setting.

# %%
from helpers.figures import draw_lengths

token_counts = [len(tokens) for tokens in tokenizer(dataset["text"])["input_ids"]]
draw_lengths(token_counts, max_seq_length=profile.max_seq_length)

# %%
fits = [count <= profile.max_seq_length for count in token_counts]
dataset = dataset.select([row for row, fit in enumerate(fits) if fit])
print(f"Longest: {max(token_counts)} tokens. Longer than {profile.max_seq_length}, left out: {fits.count(False)}.")

# %% [markdown] lang="en"
# ## Hold some back
#
# The *loss* says how badly the model predicts a text; on text that was trained on, a low one proves nothing. The
# held-out rows are never trained on; chapter 04 measures them before and after. The support conversations bring their
# own split, in which no held-out question occurs in training; other data are split at random, at most a fifth held out.
# Kept are as many conversations as the steps take when each is trained once; the rest of a larger file is not used.

# %%
from helpers.conversations import split_conversations

rows = dict(train_rows=profile.train_rows, eval_rows=profile.eval_rows)
train_dataset, eval_dataset = split_conversations(dataset, **rows)
print(f"{len(train_dataset)} conversations to train on, {len(eval_dataset)} held out")

# %% [markdown] lang="en"
# ## Hand the data on
#
# The tokenizer travels with the data, so that chapter 04 trains with the template that you looked at. The template's
# fingerprint lets later chapters notice if another one gets in between.

# %% tags=["handoff"]
from datasets import DatasetDict

markers = {"instruction_part": template.instruction_part, "response_part": template.response_part}
facts = dict(base_model=profile.model_name, template=fingerprint(tokenizer.chat_template), **markers)
with run.write("dataset", dataset=profile.dataset_name, **facts) as folder:
    DatasetDict(train=train_dataset, held_out=eval_dataset).save_to_disk(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
print(f"Template fingerprint: {facts['template']}")

# %%
print(f"Result: {len(train_dataset)} + {len(eval_dataset)} conversations, longest {max(token_counts)} tokens")

# %% [markdown] lang="en"
# ## Where you are
#
# You have `dataset/` in the run folder: two sets of checked conversations as text, and the tokenizer.
#
# On your own: put ten conversations of your own into a `.jsonl` file (on Colab, one on your Drive) and give its full
# path as `DATASET`, here and in chapter 04; set `MAX_SEQ_LENGTH` to 96 and see how many rows no longer fit.
#
# {{next}}
