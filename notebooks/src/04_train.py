# %% [markdown] lang="en"
# # Train on the answers only, and prove that it learned
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/04_train.ipynb)
#
# At the end you have an [adapter](glossary.ipynb#adapter), and proof from conversations it never saw that it changed
# the model for the better.
#
# You can
# - set up `SFTTrainer` and say what each setting does,
# - train on the assistant's words only, and prove for every row that nothing else is trained,
# - read memory and time of a run,
# - tell learning from a falling training [loss](glossary.ipynb#loss).
#
# You need `dataset/` from chapter 03, in the run folder or in `DRIVE_DIR`. Where it is in neither, a message prints the
# command that makes it here.
#
# {{budget}}

# %% [markdown] lang="zh"
# # 只训练回答部分，并证明模型学会了
#
# [![在 Colab 中打开](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/zh-CN/04_train.ipynb)
#
# 学完这一章，你会有一个[适配器](glossary.ipynb#adapter)，还会有证据表明：在从未见过的对话上，它让模型变好了。
#
# 学完后你能
# - 设置 `SFTTrainer`，并说出每项设置的作用；
# - 只用助手说的话来训练，并逐行证明别的内容都没有参与训练；
# - 看懂一次训练用了多少显存、多少时间；
# - 分清模型是真的学会了，还是仅仅训练[损失](glossary.ipynb#loss)在下降。
#
# 你需要第 03 章的 `dataset/`，它可以在运行文件夹里，也可以在 `DRIVE_DIR` 里。
# 如果两处都没有，会有一条消息告诉你用哪条命令在这里生成它。
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `MAX_STEPS` is how often the [weights](glossary.ipynb#weights) are changed. `EPOCHS`, unless 0, says instead how many
# [passes over the data](glossary.ipynb#epoch) are made: 3 for a small file, 1 for thousands. `LEARNING_RATE`, the
# [learning rate](glossary.ipynb#learning-rate), is how far each change goes: keep 2e-4 for Llama, small models need
# more.
#
# `KEEP_BEST` goes back to the lowest [held-out](glossary.ipynb#held-out-set) loss, and stops where it rises. A
# [step](glossary.ipynb#step) learns from `MICRO_BATCH` × `ACCUMULATION` conversations. `CHECKPOINTING` and
# `PADDING_FREE` are explained by the plan below.
#
# `START_AFRESH` begins anew where a training run was interrupted, instead of going on with it. `RUN_DIR` and
# `DRIVE_DIR` are as in chapter 03, `MODEL_NAME`, `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and `USE_MODELSCOPE` as in chapter 02.

# %% [markdown] lang="zh"
# `MAX_STEPS` 是[权重](glossary.ipynb#weights)更新的次数。`EPOCHS` 如果不是 0，就改由它规定用这些数据训练几[轮](glossary.ipynb#epoch)：
# 小文件用 3，几千段对话用 1。`LEARNING_RATE`（[学习率](glossary.ipynb#learning-rate)）决定每次更新走多远：训练 Llama 时保持 2e-4，小模型需要更大的值。
#
# 打开 `KEEP_BEST` 后，如果[留出](glossary.ipynb#held-out-set)集上的损失上升，就会停止训练，并恢复到损失最低时的状态。
# 每一[步](glossary.ipynb#step)从 `MICRO_BATCH` × `ACCUMULATION` 段对话中学习。`CHECKPOINTING` 和 `PADDING_FREE` 在下文的“规划”一节解释。
#
# 如果上次训练中断了，打开 `START_AFRESH` 就会从头开始，而不是接着训练。`RUN_DIR` 和 `DRIVE_DIR` 与第 03 章相同，
# `MODEL_NAME`、`MAX_SEQ_LENGTH`、`HF_ENDPOINT` 和 `USE_MODELSCOPE` 与第 02 章相同。

# %% tags=["parameters"]
# @title Choices · 选项
MODEL_NAME = "unsloth/Llama-3.2-3B-Instruct"  # @param {type:"string"}
MAX_SEQ_LENGTH = 2048  # @param {type:"integer"}
MAX_STEPS = 60  # @param {type:"integer"}
EPOCHS = 0  # @param {type:"number"}
KEEP_BEST = False  # @param {type:"boolean"}
LEARNING_RATE = 2e-4  # @param {type:"number"}
MICRO_BATCH = 8  # @param {type:"integer"}
ACCUMULATION = 1  # @param {type:"integer"}
CHECKPOINTING = True  # @param [False, True, "unsloth"] {type:"raw"}
PADDING_FREE = True  # @param {type:"boolean"}
START_AFRESH = False  # @param {type:"boolean"}
RUN_DIR = "runs/llama"  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.environment import check_choices, find_model
from helpers.handoff import open_run

check_choices(globals())
MODEL_NAME = find_model(MODEL_NAME, endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE)
run = open_run(RUN_DIR, chapter="04_train", base_model=MODEL_NAME, drive=DRIVE_DIR)

# %% [markdown] lang="en"
# ## Load the data
#
# The rows and the [tokenizer](glossary.ipynb#tokenizer) are those of chapter 03. `UNSLOTH_BLOCK_COMPILE` keeps Unsloth
# from compiling the layers: that takes most of a minute, and only [padded](glossary.ipynb#padding)
# [batches](glossary.ipynb#batch) become faster.

# %% [markdown] lang="zh"
# ## 加载数据
#
# 数据行和[分词器](glossary.ipynb#tokenizer)都来自第 03 章。设置 `UNSLOTH_BLOCK_COMPILE` 是为了不让 Unsloth 编译各层：
# 编译要花大半分钟，而且只有带[填充](glossary.ipynb#padding)的[批次](glossary.ipynb#batch)才会因此变快。

# %%
import os

os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
from datasets import load_from_disk
from unsloth import FastLanguageModel  # before transformers, peft and trl: it patches them
from transformers import AutoTokenizer

train_dataset = load_from_disk(f"{RUN_DIR}/dataset")["train"]
eval_dataset = load_from_disk(f"{RUN_DIR}/dataset")["held_out"]
tokenizer = AutoTokenizer.from_pretrained(f"{RUN_DIR}/dataset/tokenizer")
if EPOCHS:
    MAX_STEPS = max(1, round(EPOCHS * len(train_dataset) / (MICRO_BATCH * ACCUMULATION)))
times = MAX_STEPS * MICRO_BATCH * ACCUMULATION / len(train_dataset)
print(f"{len(train_dataset)} conversations, each trained about {times:.1f} times; {len(eval_dataset)} held out")

# %% [markdown] lang="en"
# ## Plan what fits
#
# A *step* changes the trained weights once, along the [gradients](glossary.ipynb#gradient) of all its conversations.
# They can go through the model all at once, a large [*micro-batch*](glossary.ipynb#micro-batch), or in turns whose
# gradients add up, [*accumulation*](glossary.ipynb#gradient-accumulation). The result is the same; memory and time are
# not.
#
# [*Checkpointing*](glossary.ipynb#checkpointing) keeps less in memory and computes it again. `False` keeps all, `True`
# drops only what does not fit, and `"unsloth"` keeps little, in the computer's main memory. *Padding-free* lays the
# conversations of a batch end to end, instead of filling the shorter ones up: less to compute, and more single calls.
#
# `plan_batch` predicts the time of every combination, and its memory with the longest of these conversations. The five
# fastest that fit are shown, and yours. Without a GPU the figures are a T4's.

# %% [markdown] lang="zh"
# ## 规划：怎样才放得下
#
# 每一**步**（step）会根据这一步里所有对话的[梯度](glossary.ipynb#gradient)，把要训练的权重更新一次。这些对话可以一次全部通过模型，
# 这就是用大的[**微批次**](glossary.ipynb#micro-batch)（micro-batch）；也可以分几次通过，再把梯度加起来，
# 这就是[**梯度累积**](glossary.ipynb#gradient-accumulation)（accumulation）。
# 两种做法结果相同，占用的显存和时间却不同。
#
# [**重算**](glossary.ipynb#checkpointing)（checkpointing）在显存里少存一些内容，用到时再算一遍。`False` 全部保留；`True` 只丢掉放不下的部分；
# `"unsloth"` 只保留很少的内容，并且放在电脑的内存里。**无填充**（padding-free）把一个批次里的对话首尾相接，
# 而不是把较短的对话填充到一样长：计算量更小，但单独的调用更多。
#
# `plan_batch` 会预测每种组合要花多少时间，以及处理其中最长的那些对话时要用多少显存。
# 它会列出放得下的组合里最快的五种，还有你选的那一种。没有 GPU 时，给出的是 T4 的数字。

# %%
from transformers import AutoConfig
from helpers.memory import plan_batch

lengths = [len(ids) for ids in tokenizer(train_dataset["text"], truncation=True, max_length=MAX_SEQ_LENGTH).input_ids]
plan = plan_batch(
    AutoConfig.from_pretrained(MODEL_NAME),
    lengths=lengths,
    micro_batch=MICRO_BATCH,
    accumulation=ACCUMULATION,
    checkpointing=CHECKPOINTING,
    padding_free=PADDING_FREE,
    lora_rank=16,
)
plan.raise_if_failed()
plan

# %% [markdown] lang="en"
# ## Load the model and add LoRA
#
# These are the two calls of chapter 02.

# %% [markdown] lang="zh"
# ## 加载模型，加上 LoRA
#
# 这就是第 02 章用过的那两个调用。

# %%
model, _ = FastLanguageModel.from_pretrained(
    model_name=MODEL_NAME, max_seq_length=MAX_SEQ_LENGTH, dtype=None, load_in_4bit=True
)

# %%
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing=CHECKPOINTING,
    random_state=3407,
)

# %% [markdown] lang="en"
# ## Ask before training
#
# The model answers some held-out questions now, and the same ones after training. `do_sample=False` takes the most
# likely [token](glossary.ipynb#token) each time, which makes the two comparable. `for_inference` and `for_training`
# switch Unsloth between asking and training.

# %% [markdown] lang="zh"
# ## 训练前先提问
#
# 现在先让模型回答几个留出集里的问题，训练后再回答同样的问题。`do_sample=False` 让模型每次都取概率最大的[词元](glossary.ipynb#token)，
# 这样前后两次的回复才能比较。`for_inference` 和 `for_training` 让 Unsloth 在提问和训练之间切换。


# %%
def ask(conversations):
    FastLanguageModel.for_inference(model)
    prompts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**inputs.to(model.device), max_new_tokens=64, do_sample=False)
    FastLanguageModel.for_training(model)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


reply_rows = eval_dataset.select(range(min(24, len(eval_dataset))))
questions = [turns[:-1] for turns in reply_rows["conversations"]]
replies_before = ask(questions)
print(f"{questions[0][-1]['content']}\n→ {replies_before[0]}")

# %% [markdown] lang="en"
# ## Set up the trainer
#
# `SFTTrainer` of the library TRL does *supervised [fine-tuning](glossary.ipynb#fine-tuning)*: it is shown questions
# with their answers. These are its settings.

# %% [markdown] lang="zh"
# ## 设置训练器
#
# TRL 库的 `SFTTrainer` 做的是**监督[微调](glossary.ipynb#fine-tuning)**（supervised fine-tuning）：给模型看问题，也给它看回答。
# 下面是训练器的各项设置。

# %%
from trl import SFTConfig, SFTTrainer
from unsloth import is_bfloat16_supported

settings = SFTConfig(
    output_dir=f"{RUN_DIR}/checkpoints",
    max_steps=MAX_STEPS,
    per_device_train_batch_size=MICRO_BATCH,
    gradient_accumulation_steps=ACCUMULATION,
    gradient_checkpointing=bool(CHECKPOINTING),
    padding_free=PADDING_FREE,
    train_sampling_strategy="random" if PADDING_FREE else "group_by_length",  # like lengths, so that less is padded
    learning_rate=LEARNING_RATE,  # 2e-4 is usual for LoRA
    lr_scheduler_type="linear",  # falls to 0 at the end
    warmup_steps=min(5, MAX_STEPS // 4),  # rises from 0 first, while the averages are poor
    optim="adamw_8bit",  # the usual optimiser, its averages in 8 bits
    weight_decay=0.01,  # pulls the matrices a little towards zero
    fp16=not is_bfloat16_supported(),  # a T4 has 16-bit numbers of this kind only
    bf16=is_bfloat16_supported(),
    max_length=MAX_SEQ_LENGTH,
    dataset_text_field="text",
    dataset_num_proc=1,
    per_device_eval_batch_size=8,
    eval_strategy="steps",  # the held-out loss in the middle and at the end, more often to keep the best
    eval_steps=max(1, MAX_STEPS // 8) if KEEP_BEST else MAX_STEPS // 2 + 1,
    logging_steps=1,
    include_num_input_tokens_seen="non_padding",  # for the speed in the picture
    save_strategy="no",  # saved by the clock instead, see Train
    report_to="none",  # "tensorboard" and "wandb" work too
    seed=3407,  # the order of the rows
)

# %%
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    args=settings,
)

# %% [markdown] lang="en"
# ## Train on the answers only
#
# Without this line the model would also learn to write the customer's questions. Each token of a row has a
# [*label*](glossary.ipynb#label), the token that is right in its place. `train_on_responses_only` finds the answers by
# the template's own markers and sets every other label to −100, which the loss ignores.

# %% [markdown] lang="zh"
# ## 只训练回答部分
#
# 没有下面这一行代码，模型还会去学怎样写客户的提问。每行数据里的每个词元都有一个[**标签**](glossary.ipynb#label)（label），
# 也就是这个位置上正确的词元。`train_on_responses_only` 靠模板自己的标记找到回答，
# 再把其他标签全部设为 −100，这些标签在计算损失时会被忽略。

# %%
from unsloth.chat_templates import train_on_responses_only

trainer = train_on_responses_only(trainer)
print(f"{len(train_dataset) - len(trainer.train_dataset)} rows dropped because nothing in them would be trained")

# %% [markdown] lang="en"
# One row, decoded: first all that the model reads, then only what it is trained to write. A second
# end token is the trainer's, untrained.

# %% [markdown] lang="zh"
# 下面把一行数据解码出来：先是模型读到的全部内容，然后是其中训练它去写的部分。
# 第二个结束词元是训练器加上的，没有参与训练。

# %% tags=["nbval-check-output"]
row = trainer.train_dataset[0]
print(tokenizer.decode(row["input_ids"]))
print("—" * 60)
print(tokenizer.decode([label for label in row.get("labels", []) if label != -100]))

# %% [markdown] lang="en"
# One row that looks right proves little. `check_masking` reads the turns of *every* row from the [chat
# template](glossary.ipynb#chat-template) and compares: nothing of a user trained, no answer left out, every answer's
# end trained.

# %% [markdown] lang="zh"
# 只看一行没有错，说明不了多少问题。`check_masking` 按照[对话模板](glossary.ipynb#chat-template)读出**每一行**的各个轮次，再逐一核对：
# 用户的话没有一处参与训练，回答一个都没有漏掉，每个回答的结尾也都参与了训练。

# %% tags=["nbval-check-output"]
from helpers.masking import check_masking, show_masking

mask_report = check_masking(trainer.train_dataset, tokenizer=tokenizer)
mask_report.raise_if_failed()
display(mask_report, show_masking(row, tokenizer=tokenizer))

# %% [markdown] lang="en"
# A check that cannot fail is none. Here every token is trained, as without the line above.

# %% [markdown] lang="zh"
# 永远不会失败的检查，等于没有检查。下面让每个词元都参与训练，就像没有上面那一行代码一样。

# %% tags=["nbval-check-output"]
unmasked = {"input_ids": row["input_ids"], "labels": row["input_ids"]}
try:
    check_masking([unmasked], tokenizer=tokenizer).raise_if_failed()
except ValueError as error:
    print(error)
show_masking(unmasked, tokenizer=tokenizer)

# %% [markdown] lang="en"
# ## Measure before training
#
# This is the loss on the held-out answers. A token's loss is −ln of the probability that the model gave to it: 0 if it
# was certain. [*Perplexity*](glossary.ipynb#perplexity) is e to the mean loss: at 100 the model is as unsure as between
# 100 equally likely tokens.
#
# The interval holds the mean of all such conversations, 95 times of 100.

# %% [markdown] lang="zh"
# ## 训练前先测量
#
# 下面测的是模型在留出集回答上的损失。一个词元的损失，就是对模型给它的概率取 −ln：如果模型完全确定，损失就是 0。
# [**困惑度**](glossary.ipynb#perplexity)（perplexity）是 e 的“平均损失”次幂：困惑度为 100 时，模型就像在 100 个同样可能的词元之间拿不定主意。
#
# 输出里还有一个区间。这样的区间，100 次里有 95 次会包含全部同类对话的平均损失。

# %%
from helpers.training import check_evidence, held_out_losses

held_out_before = held_out_losses(model, trainer.eval_dataset)
held_out_before

# %% [markdown] lang="en"
# ## Train
#
# The picture grows with each step. The training loss jumps from batch to batch; the held-out loss is what counts.
#
# Without helpers this cell would be the one line `trainer.train()`.
#
# `Checkpoints` saves the run every five minutes and when you press Stop, also to `DRIVE_DIR`; run
# the chapter again, and it goes on where it was. `stop_on_divergence` ends a run whose loss explodes, `watch` one
# whose batches are not the checked rows. `fit_into_memory` tries the longest conversations first: what is too long by
# itself fails now.

# %% [markdown] lang="zh"
# ## 训练
#
# 每训练一步，曲线就往前延伸一点。训练损失会随着批次上下跳动；真正要看的是留出集上的损失。
#
# 如果不用辅助函数，这个单元格就只有一行 `trainer.train()`。
#
# `Checkpoints` 每五分钟保存一次训练进度，你按下停止按钮时也会保存，并且同时存到 `DRIVE_DIR`。
# 再运行一遍这一章，训练就会从上次停下的地方继续。如果损失爆炸，`stop_on_divergence` 会结束训练；
# 如果批次里的内容不是检查过的那些行，`watch` 会结束训练。`fit_into_memory` 会先试最长的对话：
# 如果单独一段就已经太长，训练一开始就会失败。

# %%
from helpers.memory import fit_into_memory, track_memory
from helpers.training import Checkpoints, keep_best, live_plot, stop_on_divergence

plot = live_plot(folder=f"{RUN_DIR}/curves")
plot.record(0, {"eval_loss": held_out_before.loss})
trainer.add_callback(plot)
trainer.add_callback(stop_on_divergence())
batches = mask_report.watch(trainer)
best = keep_best(trainer) if KEEP_BEST else None
checkpoints = Checkpoints(trainer, mirror=run.mirror, every_seconds=300, start_afresh=START_AFRESH)
fit = fit_into_memory(trainer, plan.checkpointed_layers)
with track_memory("training") as training, checkpoints as last_checkpoint, fit as fitting:
    trainer.train(resume_from_checkpoint=last_checkpoint)
if best:
    best.restore()

# %% [markdown] lang="en"
# ## Save the adapter
#
# What was trained is saved before it is judged. `save_pretrained` writes the [LoRA](glossary.ipynb#lora) matrices
# alone, 10 to 100 MB; the [base model](glossary.ipynb#base-model) is loaded again beside them. The tokenizer goes with
# them, because it holds the chat template.

# %% [markdown] lang="zh"
# ## 保存适配器
#
# 训练的成果要先保存，再评判。`save_pretrained` 只写出 [LoRA](glossary.ipynb#lora) 矩阵，大小是 10 到 100 MB；
# 使用时，还要另外加载[基座模型](glossary.ipynb#base-model)。分词器也一起保存，因为对话模板就在分词器里。

# %% tags=["handoff"]
model.save_pretrained(f"{RUN_DIR}/new/adapter")
tokenizer.save_pretrained(f"{RUN_DIR}/new/adapter")
print(sorted(os.listdir(f"{RUN_DIR}/new/adapter")))

# %% tags=["handoff"]
run.keep("adapter", template=run.facts("dataset")["template"])

# %% [markdown] lang="en"
# ## Did it learn?
#
# The held-out loss again, on the same conversations as before. Then nine claims, each checked by a program.
# `check_evidence` is given what you chose, and compares that with what the trainer did. A run of less than one pass
# reaches some rows only, and judges those. The *gradient norm* is the size of a step's gradients, all taken together.
#
# Llama answers general questions such as FineTome's well before it is trained. With those data expect a far smaller
# fall.

# %% [markdown] lang="zh"
# ## 它学会了吗？
#
# 再测一次留出集上的损失，用的还是之前那些对话。然后是九条论断，每一条都由程序检查。
# `check_evidence` 会把你的选择和训练器实际做的事情对比。如果训练不到一轮，就只用到了一部分行，
# 所以也只评判那些行。**梯度范数**（gradient norm）是一步里所有梯度合在一起的大小。
#
# 像 FineTome 里那样的一般性问题，Llama 在训练之前就答得很好。用那样的数据训练，损失下降的幅度会小得多。

# %% tags=["nbval-check-output"]
held_out_after = held_out_losses(model, trainer.eval_dataset)
chosen = {"max_steps": MAX_STEPS, "per_device_train_batch_size": MICRO_BATCH, "lr_scheduler_type": "linear"}
chosen |= {"gradient_accumulation_steps": ACCUMULATION, "max_length": MAX_SEQ_LENGTH}
evidence = check_evidence(
    trainer,
    before=held_out_before,
    after=held_out_after,
    learning_rate=LEARNING_RATE,
    settings=chosen,
    rows=run.facts("dataset")["train_rows"],
    batches=batches,
    adapter=f"{RUN_DIR}/adapter",
)
evidence

# %% [markdown] lang="en"
# The same questions as before training. Only the last turn of each is shown; the model also read the turns before it,
# where the product may be named. Read what they advise: form is learned before help.

# %% [markdown] lang="zh"
# 下面还是训练前的那些问题。这里只显示每段对话的最后一个轮次；模型还读了前面的轮次，产品名可能就在那里。
# 读一读回复里给出的建议：模型先学会回复的形式，然后才学会真正帮上忙。

# %%
replies_after = ask(questions)
asked = [turns[-1]["content"] for turns in questions]
pairs = list(zip(asked, replies_before, replies_after))
for question, before, after in pairs[:4]:
    print(f"QUESTION  {question}\n\nBEFORE    {before}\n\nAFTER     {after}\n" + "—" * 60)

# %% [markdown] lang="en"
# ## Count it
#
# Reading four replies is an impression; counting all of them is a result. The support conversations say for each
# question which product it is about and what the right help contains. Other data do not, and are not counted.

# %% [markdown] lang="zh"
# ## 数一数
#
# 读四条回复，得到的是印象；把所有回复都数一遍，得到的才是结果。
# 客服对话为每个问题标明了问的是哪个产品，以及正确的帮助应该包含什么。别的数据没有标明这些，也就不计数。


# %%
def judge(reply, row):
    lines, product = reply.strip().split("\n"), row["product"]
    opening = lines[0].startswith((f"Re: {product}, ", f"关于：{product}，"))
    closing = lines[-1].endswith((" — Mossbell Care", " — Mossbell 客服"))
    house_style = len(lines) == 3 and opening and lines[1].startswith(("Next step: ", "下一步：")) and closing
    right_help = any(words.lower() in reply.lower() for words in row["right_help"][-1])
    return house_style, right_help


# %%
counted = {"house_style": {}, "right_help": {}} if "right_help" in reply_rows.column_names else {}
if counted and isinstance(reply_rows[0]["right_help"][-1], str):
    raise ValueError('right_help is a list of words. It must hold such a list for each answer: [["power", "plug"]].')
for when, replies in {"before": replies_before, "after": replies_after}.items():
    if counted:
        verdicts = [judge(reply, row) for reply, row in zip(replies, reply_rows)]
        counted["house_style"][when] = sum(style for style, _ in verdicts) / len(verdicts)
        counted["right_help"][when] = sum(right for _, right in verdicts) / len(verdicts)
print(counted)

# %% [markdown] lang="en"
# ## Write the report
#
# `report.html` is the whole run on one page: open it or send it. `report.json` holds the same for programs.

# %% [markdown] lang="zh"
# ## 写报告
#
# `report.html` 在一个页面里展示整次训练：你可以打开看，也可以发给别人。`report.json` 保存同样的内容，供程序读取。

# %% tags=["handoff"]
from helpers.training import write_report

report = write_report(
    run,
    trainer,
    stages=[fitting.rehearsal, fitting.first_step, training],
    curves=plot.curves,
    mask_report=mask_report,
    held_out=(held_out_before, held_out_after),
    evidence=evidence,
    replies=pairs[:4],
    counted=counted,
    resumed_from=checkpoints.step,
)

# %% [markdown] lang="en"
# A claim that does not hold stops the chapter here. The report names it, the adapter is saved either way, and
# [chapter 07](07_when_it_goes_wrong.ipynb) shows what to change. From here on, running this chapter again trains a new
# one, and keeps this one beside it as `adapter.previous-1`, which `from_pretrained` loads as well.

# %% [markdown] lang="zh"
# 只要有一条论断不成立，这一章就在这里停下。报告会指出是哪一条，适配器无论如何都已经保存，
# [第 07 章](07_when_it_goes_wrong.ipynb)会告诉你该改什么。过了这里，再运行这一章就会训练一个新的适配器；
# 现在这个会改名为 `adapter.previous-1`，保留在旁边，`from_pretrained` 同样能加载它。

# %%
checkpoints.hand_over()
evidence.raise_if_failed()

# %%
figure = f"held-out loss {held_out_before.loss:.2f} → {held_out_after.loss:.2f} in {report['seconds']:.0f} s"
for name, shares in counted.items():
    figure += f", {name.replace('_', ' ')} {shares['before']:.0%} → {shares['after']:.0%}"
print(f"Result: {figure}")

# %% [markdown] lang="en"
# ## Where you are
#
# You have `adapter/`, `report.json` and `report.html` in the run folder, and know that the adapter is better on text
# that it never saw. On Colab download the folder `adapter` now (the folder icon), unless you set `DRIVE_DIR`: it is the
# whole of your work.
#
# On your own: by how much did training lower the perplexity?
#
# <details><summary>Solution</summary>
#
# ```python
# import math
# for when, losses in {"before": held_out_before, "after": held_out_after}.items():
#     print(f"{when}: as unsure as between {math.exp(losses.loss):.1f} tokens")
# ```
#
# With SmolLM2 it falls from 129 to 1.3: after a few hundred conversations the answers hold few surprises.
#
# </details>
#
# On your own: halve the adapter's strength, measure the held-out loss and ask again.
#
# <details><summary>Solution</summary>
#
# ```python
# def scale(factor):
#     for module in model.modules():
#         if hasattr(module, "lora_A"):
#             module.scaling["default"] *= factor
# scale(0.5)
# print(f"Half the adapter: loss {held_out_losses(model, trainer.eval_dataset).loss:.2f}")
# print(ask(questions[:1])[0])
# scale(2)
# ```
#
# The loss lies between those before and after training. `lora_alpha` is this strength.
#
# </details>
#
# In practice: 1e-4 to 5e-4 suits Llama with LoRA, about [ten times](https://thinkingmachines.ai/blog/lora/) what
# training all weights takes. Where the losses hardly move, take three times the rate; where they rise, a third.
#
# Where the held-out loss rises again, set `KEEP_BEST`, or take more conversations. The loss that it keeps is a little
# too good, since it was chosen. [Chapter 07](07_when_it_goes_wrong.ipynb) shows each of these runs.
#
# {{next}}

# %% [markdown] lang="zh"
# ## 到这里为止
#
# 运行文件夹里已经有 `adapter/`、`report.json` 和 `report.html`。你也知道了：
# 在从未见过的文本上，这个适配器确实让模型变好了。在 Colab 上，如果没有设置 `DRIVE_DIR`，
# 请现在就下载文件夹 `adapter`（点文件夹图标）：你的全部成果都在这个文件夹里。
#
# 自己动手：训练让困惑度降低了多少？
#
# <details><summary>参考答案</summary>
#
# ```python
# import math
# for when, losses in {"before": held_out_before, "after": held_out_after}.items():
#     print(f"{when}: as unsure as between {math.exp(losses.loss):.1f} tokens")
# ```
#
# 用 SmolLM2 时，从 129 降到 1.3：学过几百段对话之后，回答里已经没有多少让模型意外的内容。
#
# </details>
#
# 自己动手：把适配器的强度减半，再测一次留出集上的损失，再提一次问。
#
# <details><summary>参考答案</summary>
#
# ```python
# def scale(factor):
#     for module in model.modules():
#         if hasattr(module, "lora_A"):
#             module.scaling["default"] *= factor
# scale(0.5)
# print(f"Half the adapter: loss {held_out_losses(model, trainer.eval_dataset).loss:.2f}")
# print(ask(questions[:1])[0])
# scale(2)
# ```
#
# 损失介于训练前和训练后之间。`lora_alpha` 调的就是这个强度。
#
# </details>
#
# 实践中：用 LoRA 训练 Llama，学习率取 1e-4 到 5e-4 比较合适，大约是训练全部权重时的[十倍](https://thinkingmachines.ai/blog/lora/)。
# 如果损失几乎不动，就把学习率提高到三倍；如果损失上升，就降到三分之一。
#
# 如果留出集上的损失后来又上升，就多用一些对话，或者打开 `KEEP_BEST`。后者保留下来的损失会显得比实际好一点，
# 因为那是挑选出来的。[第 07 章](07_when_it_goes_wrong.ipynb)会演示这里提到的每一种训练。
#
# {{next}}
