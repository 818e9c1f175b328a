# %% [markdown] lang="en"
# # Read a run that did not work
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/07_when_it_goes_wrong.ipynb)
#
# At the end you have seen six ways in which a training run fails, each beside a run that works.
#
# You can
# - tell a [learning rate](glossary.ipynb#learning-rate) that is too low from one that is too high,
# - see that a model learns by heart, and stop it in time,
# - find out that the wrong words were trained, or in the wrong form,
# - measure what a model forgot, and keep it from forgetting.
#
# You need nothing from the chapters before. The runs are short, so that all of them take minutes.
#
# {{budget}}

# %% [markdown] lang="zh"
# # 读懂一次失败的训练
#
# [![在 Colab 中打开](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/zh-CN/07_when_it_goes_wrong.ipynb)
#
# 学完这一章，你就见识过训练失败的六种情形，每一种都和一次成功的训练对照过。
#
# 学完后你能
# - 分清[学习率](glossary.ipynb#learning-rate)是太低还是太高；
# - 看出模型在死记硬背，并及时停止训练；
# - 查出模型训练了不该训练的词，或者训练用的格式不对；
# - 测出模型忘了什么，并防止它遗忘。
#
# 这一章不需要前面几章的任何结果。每次训练都很短，全部做完只要几分钟。
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `DATASET` and `GENERAL` are files of this series; others need the same columns. `MAX_STEPS` and `LEARNING_RATE` are as
# in chapter 04, `CHAT_TEMPLATE` and `RUN_DIR` as in chapter 03, `MODEL_NAME`, `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and
# `USE_MODELSCOPE` as in chapter 02. Here the model is the 1B, which trains faster.

# %% [markdown] lang="zh"
# `DATASET` 和 `GENERAL` 是本系列自带的文件；如果换成别的文件，里面也要有同样的列。
# `MAX_STEPS` 和 `LEARNING_RATE` 的含义与第 04 章相同，`CHAT_TEMPLATE` 和 `RUN_DIR` 与第 03 章相同，
# `MODEL_NAME`、`MAX_SEQ_LENGTH`、`HF_ENDPOINT` 和 `USE_MODELSCOPE` 与第 02 章相同。
# 这里用的是 1B 模型，它训练得更快。

# %% tags=["parameters"]
# @title Choices · 选项
MODEL_NAME = "unsloth/Llama-3.2-1B-Instruct"  # @param {type:"string"}
CHAT_TEMPLATE = "llama-3.1"  # @param {type:"string"}
DATASET = "notebooks/data/support_conversations.jsonl"  # @param {type:"string"}
GENERAL = "notebooks/data/general_questions.jsonl"  # @param {type:"string"}
MAX_SEQ_LENGTH = 512  # @param {type:"integer"}
MAX_STEPS = 30  # @param {type:"integer"}
LEARNING_RATE = 2e-4  # @param {type:"number"}
RUN_DIR = "runs/llama"  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.environment import check_choices, find_model
from helpers.handoff import open_run

check_choices(globals())
MODEL_NAME = find_model(MODEL_NAME, endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE)
run = open_run(RUN_DIR)

# %% [markdown] lang="en"
# ## One model for all runs
#
# The small model has room in 16 bits, and trains faster so. `untrained` keeps a copy of the fresh
# [adapter](glossary.ipynb#adapter). Each run begins with it, so that nothing differs between two runs but the one thing
# that is changed.

# %% [markdown] lang="zh"
# ## 所有训练共用一个模型
#
# 这个小模型用 16 位也放得下，而且这样训练更快。`untrained` 保存全新[适配器](glossary.ipynb#adapter)的一份副本，
# 每次训练都从这份副本开始。这样，两次训练之间就只有特意改动的那一处不同。

# %%
import os

os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
from unsloth import FastLanguageModel  # before transformers, peft and trl: it patches them
from unsloth.chat_templates import get_chat_template, train_on_responses_only
from peft import get_peft_model_state_dict, set_peft_model_state_dict

model, tokenizer = FastLanguageModel.from_pretrained(MODEL_NAME, max_seq_length=MAX_SEQ_LENGTH, load_in_4bit=False)
if CHAT_TEMPLATE:
    tokenizer = get_chat_template(tokenizer, chat_template=CHAT_TEMPLATE)

# %%
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    use_gradient_checkpointing=False,
    random_state=3407,
)
untrained = {name: matrix.clone() for name, matrix in get_peft_model_state_dict(model).items()}

# %% [markdown] lang="en"
# ## Two sets of questions
#
# The first are the support conversations of one question and its answer. The others are 68 general questions, such as
# the capital of France. Of these, 20 are [held out](glossary.ipynb#held-out-set), each with a right and a wrong answer:
# they show what a model forgot.

# %% [markdown] lang="zh"
# ## 两组问题
#
# 第一组是客服对话，只取一问一答的那些。第二组是 68 个一般性问题，例如“法国的首都是哪里”。
# 其中 20 个是[留出](glossary.ipynb#held-out-set)的，每个都配有一个正确答案和一个错误答案：由此可以看出模型忘了什么。

# %% tags=["nbval-check-output"]
from datasets import load_dataset


def take_apart(row):
    question, answer = (turn["value"] for turn in row["conversations"])
    return {"question": question, "answer": answer}


support = load_dataset("json", data_files=DATASET, split="train").filter(lambda row: len(row["conversations"]) == 2)
support = support.map(take_apart, remove_columns="conversations")
general = load_dataset("json", data_files=GENERAL, split="train")
print(f"{len(support)} support questions and {len(general)} general ones, such as:")
general[0]

# %%
bos = tokenizer.bos_token if tokenizer("").input_ids else ""


def to_text(question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"text": tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(bos)}


support, general = (rows.map(lambda row: to_text(row["question"], row["answer"])) for rows in (support, general))
train_rows, general_rows = (rows.filter(lambda row: row["split"] == "train") for rows in (support, general))
support_held_out, right_answers = (rows.filter(lambda row: row["split"] == "held_out") for rows in (support, general))
wrong_answers = right_answers.map(lambda row: to_text(row["question"], row["wrong"]))
held_out_rows = {"support": support_held_out.select(range(12)), "right": right_answers, "wrong": wrong_answers}

# %% [markdown] lang="en"
# ## A run in one line
#
# These are chapter 04's calls in functions, so that a run is one line. The held-out [loss](glossary.ipynb#loss) is
# measured five times on the way. The held-out rows are [masked](glossary.ipynb#mask) once, and every run is measured on
# the same.

# %% [markdown] lang="zh"
# ## 一行代码，一次训练
#
# 这里把第 04 章的那些调用写成了函数，所以一次训练只要一行代码。训练途中，留出集上的[损失](glossary.ipynb#loss)会测量五次。
# 留出的数据只做一次[掩码](glossary.ipynb#mask)，每次训练都用这同一份数据来测量。

# %%
shared = dict(
    output_dir=f"{RUN_DIR}/tries",
    max_steps=MAX_STEPS,
    warmup_steps=min(5, MAX_STEPS // 4),
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    gradient_checkpointing=False,
    eval_strategy="steps",
    eval_steps=max(1, MAX_STEPS // 5),
    logging_steps=1,
    dataset_text_field="text",
    max_length=MAX_SEQ_LENGTH,
)

# %%
from trl import SFTConfig, SFTTrainer

runs = {}  # the trainer of every run, by its name


def new_trainer(rows, held_out, learning_rate=LEARNING_RATE, callbacks=(), **saving):
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=held_out,
        args=SFTConfig(learning_rate=learning_rate, **shared, **(saving or {"save_strategy": "no"})),
        callbacks=list(callbacks),
    )


# %%
trainer = train_on_responses_only(new_trainer(train_rows, held_out_rows))
held_out = trainer.eval_dataset
before = trainer.evaluate(held_out["support"])["eval_loss"]


def train(name, rows, masked=True, markers=None, **changes):
    set_peft_model_state_dict(model, untrained)  # begin at the base model again
    runs[name] = trainer = new_trainer(rows, rows.select(range(4)), **changes)  # held-out rows follow below
    if masked:
        train_on_responses_only(trainer, **(markers or {}))
    trainer.eval_dataset = held_out["support"]
    try:
        trainer.train()
    except ValueError as error:  # a run that stop_on_divergence ended
        print(error)


# %% [markdown] lang="en"
# Two more: one draws the losses of some runs, the other asks the model as it is now.

# %% [markdown] lang="zh"
# 还有两个函数：一个画出几次训练的损失，另一个向当前的模型提问。

# %%
import matplotlib.pyplot as plt


def draw(*names):
    _, panels = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    for panel, measure, first in zip(panels, ("loss", "eval_loss"), ([], [(0, before)])):
        for name in names:
            log = runs[name].state.log_history
            points = first + [(entry["step"], entry[measure]) for entry in log if measure in entry]
            panel.plot(*zip(*points), label=f"{name}: {points[-1][1]:.2f} at the end")
        panel.legend(frameon=False, fontsize=8)
        panel.set_xlabel("step")
    panels[0].set_title("training loss")
    panels[1].set_title("held-out loss")
    plt.show()


# %%
def ask(question):
    FastLanguageModel.for_inference(model)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(model.device), max_new_tokens=48, do_sample=False)
    FastLanguageModel.for_training(model)
    print(f"{question}\n→ {tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")


support_question = support_held_out[0]["question"]
ask(support_question)

# %% [markdown] lang="en"
# ## A run that works
#
# Both losses fall fast at first, then more slowly. The other runs are drawn beside this one.

# %% [markdown] lang="zh"
# ## 一次成功的训练
#
# 两个损失起初都下降得很快，之后慢了下来。后面的训练都会和这一次画在同一张图里。

# %%
train("works", train_rows)
draw("works")
ask(support_question)

# %% [markdown] lang="en"
# How much did it forget? A model knows an answer if it finds the right one likelier, token for token, than the wrong
# one; by guessing it would know 10 of 20. The loss of the right answers says how likely they are. For the base model
# the adapter is switched off.

# %% [markdown] lang="zh"
# 它忘了多少？按每个词元平均来算，如果模型觉得正确答案比错误答案更有可能，就算它知道这个答案。
# 光靠猜，20 个里也能“知道”10 个。正确答案的损失，说明模型觉得这些答案有多大可能。
# 测量基座模型时，适配器是关掉的。

# %%
import torch


def answer_loss(row):
    tensors = {name: torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels")}
    half = torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32)
    with torch.no_grad(), half:  # as in training
        return model(**tensors).loss.item()


def ask_general():
    right, wrong = ([answer_loss(row) for row in held_out[answers]] for answers in ("right", "wrong"))
    return {"known": sum(a < b for a, b in zip(right, wrong)), "loss": sum(right) / len(right)}


# %%
with model.disable_adapter():
    knowledge = {"untouched": ask_general()}
knowledge["works"] = ask_general()
ask(right_answers[0]["question"])
knowledge

# %% [markdown] lang="en"
# ## The rate is too low
#
# *Symptom*: both losses hardly move, by a few hundredths of what they were, and the replies are the base model's.
# *Cause*: the [steps](glossary.ipynb#step) go the right way and hardly get anywhere. *Change*: a rate three times as
# high, until a run is no better than the one before. More steps help too, and cost more.

# %% [markdown] lang="zh"
# ## 学习率太低
#
# **症状**：两个损失几乎不动，和开始时相比只变了百分之几，回答也和基座模型一样。
# **原因**：每一[步](glossary.ipynb#step)的方向都对，但几乎没有前进。
# **改法**：每次都把学习率提高到上一次的三倍，直到新的训练不再比上一次好。
# 增加步数也有用，但花费更多。

# %%
train("rate too low", train_rows, learning_rate=LEARNING_RATE / 100)
draw("works", "rate too low")
ask(support_question)

# %% [markdown] lang="en"
# ## The rate is too high
#
# *Symptom*: the loss rises above where it began, and stays there; the replies are nonsense, or one word again and
# again. *Cause*: each step goes too far, and the next one starts from somewhere worse. *Change*: a third of the rate,
# and again until it falls. A run that diverged is lost, so `stop_on_divergence` ends it.

# %% [markdown] lang="zh"
# ## 学习率太高
#
# **症状**：损失升到比开始时还高，并停在那里；回答不知所云，或者一个词重复个没完。
# **原因**：每一步都跨得太远，下一步又从更差的地方出发。
# **改法**：把学习率降到原来的三分之一，不行就再降，直到损失下降。
# 发散了的训练救不回来，所以 `stop_on_divergence` 会结束它。

# %%
from helpers.training import check_evidence, held_out_losses, stop_on_divergence

set_peft_model_state_dict(model, untrained)
untouched = held_out_losses(model, held_out["support"])
train("rate too high", train_rows, learning_rate=25 * LEARNING_RATE, callbacks=[stop_on_divergence()])
draw("works", "rate too high")
ask(support_question)
after = held_out_losses(model, held_out["support"])
check_evidence(runs["rate too high"], before=untouched, after=after, learning_rate=25 * LEARNING_RATE)

# %% [markdown] lang="en"
# ## Learned by heart
#
# Four conversations, seen again and again: [overfitting](glossary.ipynb#overfitting). *Symptom*: the training loss goes
# to almost nothing, the held-out loss stops falling and turns up. *Cause*: the model learns these four answers, not how
# answers are made. Ten passes over few rows are enough for that. In chapter 04 `KEEP_BEST` measures often enough for
# you to see it.

# %% [markdown] lang="zh"
# ## 死记硬背
#
# 四段对话，看了一遍又一遍，这就是[过拟合](glossary.ipynb#overfitting)（overfitting）。**症状**：训练损失降到几乎为零，留出集上的损失不再下降，反而上升。
# **原因**：模型学到的是这四个回答，而不是怎样写回答。数据很少时，训练十轮就足以造成这种结果。
# 在第 04 章，打开 `KEEP_BEST` 后会测量得足够频繁，让你看到这个现象。

# %%
train("by heart", train_rows.select(range(4)))
draw("works", "by heart")

# %%
after = held_out_losses(model, held_out["support"])
check_evidence(runs["by heart"], before=untouched, after=after, learning_rate=LEARNING_RATE)

# %% [markdown] lang="en"
# *Change*: more conversations, as in the run that works. Where there are none, stop in time.
# `EarlyStoppingCallback` ends a run whose held-out loss found no new lowest twice in a row, and
# `load_best_model_at_end` goes back to where it was lowest. In chapter 04 `KEEP_BEST` does both.

# %% [markdown] lang="zh"
# **改法**：用更多的对话，就像那次成功的训练一样。没有更多对话时，就及时停下。
# 如果留出集上的损失连续两次测量都没有创下新低，`EarlyStoppingCallback` 就会结束训练；
# `load_best_model_at_end` 会让模型回到损失最低的时候。在第 04 章，`KEEP_BEST` 把这两件事都做了。

# %%
from transformers import EarlyStoppingCallback

train(
    "best kept",
    train_rows.select(range(4)),
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    save_strategy="best",
    load_best_model_at_end=True,
)
runs["best kept"].evaluate()  # of the weights that it went back to
draw("works", "by heart", "best kept")

# %% [markdown] lang="en"
# ## The wrong words were trained
#
# Somebody left `train_on_responses_only` out. *Symptom*: hardly any. The losses look well, and the held-out one falls a
# little more slowly. *Cause*: every token is trained, so part of what is learned is how customers ask. Only a look at
# the [labels](glossary.ipynb#label) tells.

# %% [markdown] lang="zh"
# ## 训练了不该训练的词
#
# 有人漏掉了 `train_on_responses_only`。**症状**：几乎没有。损失看起来都正常，只是留出集上的损失降得稍慢一点。
# **原因**：每个词元都参与了训练，所以模型学到的东西里，有一部分是客户怎样提问。这个错误，只有查看[标签](glossary.ipynb#label)才能发现。

# %%
train("no mask", train_rows, masked=False)
draw("works", "no mask")

# %% [markdown] lang="en"
# *Change*: the line is put back, and the run is the one that works.
#
# ## The wrong form was trained
#
# Somebody wrote the conversations in a form of their own. *Symptom*: in a run of yours both losses fall, because the
# held-out rows have that form too; replies may run on, or miss the style. Here the held-out loss is measured in the
# form in which the model is asked, and falls less. *Cause*: two dialects.

# %% [markdown] lang="zh"
# **改法**：把这一行加回去，得到的就又是那次成功的训练。
#
# ## 训练用的格式不对
#
# 有人用自创的格式写对话。**症状**：在你自己的训练里，两个损失都会下降，因为留出的数据也是这种格式；
# 但回答可能停不下来，或者没有学到该有的风格。
# 而在这里，测量留出集上的损失时，用的是向模型提问的格式，所以它降得少一些。**原因**：训练和提问用了两种“方言”。


# %%
def to_own_form(row):
    return {"text": f"### Question:\n{row['question']}\n\n### Answer:\n{row['answer']}{tokenizer.eos_token}"}


markers = {"instruction_part": "### Question:\n", "response_part": "### Answer:\n"}
train("own form", train_rows.map(to_own_form), markers=markers)
draw("works", "own form")
ask(support_question)

# %% [markdown] lang="en"
# What `check_masking` says of these two runs, and of the one that works:

# %% [markdown] lang="zh"
# 对于这两次训练和那次成功的训练，`check_masking` 是这样说的：

# %%
from helpers.masking import check_masking

for name in ("works", "no mask", "own form"):
    try:
        check_masking(runs[name].train_dataset, tokenizer=tokenizer).raise_if_failed()
        print(f"{name}: no fault\n")
    except ValueError as error:
        print(f"{name}: {error}\n")

# %% [markdown] lang="en"
# *Change*: `apply_chat_template`, as in chapter 03.
#
# ## It forgot what it knew
#
# *Symptom*: the held-out loss is fine, and questions about anything else get a support reply, as the capital of France
# did above. *Cause*: nothing in the training said that other questions exist. *Change*: mix other conversations in.
# Here general questions are a tenth of all rows, then three tenths; none of them is one of the 20.

# %% [markdown] lang="zh"
# **改法**：用 `apply_chat_template`，和第 03 章一样。
#
# ## 它忘了原来会的
#
# **症状**：留出集上的损失很好，但问起别的事情，得到的也是客服式的回答，就像上面问法国首都时那样。
# **原因**：训练里没有任何东西告诉它，世上还有别的问题。
# **改法**：混入其他对话。这里，一般性问题先占全部数据的十分之一，再占十分之三；
# 留出的那 20 个问题，一个也不在里面。

# %%
from datasets import concatenate_datasets

for name, share in (("10 % general", 0.1), ("30 % general", 0.3)):
    count = round(len(train_rows) * share / (1 - share))
    mixed_in = concatenate_datasets([general_rows, general_rows]).select(range(count))  # 48 rows, some twice
    train(name, concatenate_datasets([train_rows, mixed_in]).shuffle(seed=3407))
    knowledge[name] = ask_general()
    ask(right_answers[0]["question"])

draw("works", "10 % general", "30 % general")
for name, result in knowledge.items():
    print(f"{name:12} {result['known']:2} of 20 answers known, loss of the right ones {result['loss']:.2f}")

# %% [markdown] lang="en"
# The general rows cost steps: with as many steps in all, fewer of them teach the support form. What is mixed in should
# look like what the model must not lose: add rows of FineTome to your file, or the model's own answers to questions of
# yours. Ask five such questions before and after.
#
# ## From symptom to change
#
# | what you see | the likely cause | what to change |
# |---|---|---|
# | both losses hardly move | rate too low | three times the rate; then more steps |
# | the loss rises above its start and stays there | rate too high | a third of the rate |
# | training loss near 0, held-out loss rises | learned by heart | more conversations; fewer steps; `KEEP_BEST` |
# | `check_masking` stops chapter 04: no labels, or a user's words trained | no mask | `train_on_responses_only` |
# | `check_masking` stops chapter 04: a BOS token, or other turns | wrong form | the chat template of chapter 03 |
# | other questions get your form as well | forgetting | 10 to 30 % other conversations |

# %% [markdown] lang="zh"
# 混入的一般性问题也要占用步数：总步数不变，用来学客服式回答的步数就少了。
# 模型不能忘掉什么，混入的内容就应当像什么：可以往你的文件里加入 FineTome 的数据，
# 也可以由你提问，把模型自己的回答加进去。挑五个这样的问题，训练前后各问一遍。
#
# ## 从症状到改法
#
# | 你看到的现象 | 可能的原因 | 怎样改 |
# |---|---|---|
# | 两个损失几乎不动 | 学习率太低 | 学习率提高到原来的三倍；然后增加步数 |
# | 损失升到比开始时还高，并停在那里 | 学习率太高 | 学习率降到原来的三分之一 |
# | 训练损失接近 0，留出集上的损失上升 | 死记硬背 | 增加对话；减少步数；`KEEP_BEST` |
# | `check_masking` 让第 04 章停下：没有标签，或者训练了用户的话 | 没有掩码 | `train_on_responses_only` |
# | `check_masking` 让第 04 章停下：BOS 词元有问题，或者轮次不同 | 格式不对 | 第 03 章的对话模板 |
# | 问别的问题，得到的也是你那种风格的回答 | 遗忘 | 混入 10% 到 30% 的其他对话 |

# %%
logs = {name: trainer.state.log_history for name, trainer in runs.items() if name != "rate too high"}  # it ended early
run.record(
    "07_when_it_goes_wrong",
    held_out_loss={
        name: [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1] for name, log in logs.items()
    },
    general_loss={name: result["loss"] for name, result in knowledge.items()},
    general_known={name: result["known"] for name, result in knowledge.items()},
)
known = [f"{knowledge[name]['known']} {name}" for name in ("untouched", "works", "10 % general")]
print(f"Result: of 20 general answers known: {', '.join(known)}")

# %% [markdown] lang="en"
# ## Where you are
#
# You have seen each fault once, and know what shows it.
#
# On your own: which run has the largest gap between its last two losses?
#
# <details><summary>Solution</summary>
#
# ```python
# gaps = {}
# for name, log in logs.items():
#     training, held = ([entry[key] for entry in log if key in entry][-1] for key in ("loss", "eval_loss"))
#     gaps[name] = held - training
#     print(f"{name:14} training {training:.2f}, held out {held:.2f}")
# print("Largest gap:", max(gaps, key=gaps.get))
# ```
#
# `by heart`: its training loss is the lowest of all, and its held-out loss did not follow.
#
# </details>
#
# In practice: change one thing at a time, and keep the held-out rows the same. LoRA forgets less than training all
# weights, and [learns less](https://arxiv.org/abs/2405.09673). A small share of
# [earlier data](https://arxiv.org/abs/2205.12393) keeps much of what was there.
#
# {{next}}

# %% [markdown] lang="zh"
# ## 到这里为止
#
# 每种错误你都见过一次了，也知道靠什么发现它。
#
# 自己动手：哪一次训练最后的两个损失相差最大？
#
# <details><summary>参考答案</summary>
#
# ```python
# gaps = {}
# for name, log in logs.items():
#     training, held = ([entry[key] for entry in log if key in entry][-1] for key in ("loss", "eval_loss"))
#     gaps[name] = held - training
#     print(f"{name:14} training {training:.2f}, held out {held:.2f}")
# print("Largest gap:", max(gaps, key=gaps.get))
# ```
#
# `by heart`：它的训练损失是这几次训练里最低的，留出集上的损失却没有跟着下降。
#
# </details>
#
# 实践中：一次只改一处，并保持留出的数据不变。和训练全部权重相比，LoRA 忘得少，
# [学得也少](https://arxiv.org/abs/2405.09673)。混入少量[以前的数据](https://arxiv.org/abs/2205.12393)，
# 就能保住许多原来会的东西。
#
# {{next}}
