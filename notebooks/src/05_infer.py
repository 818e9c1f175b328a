# %% [markdown] lang="en"
# # Talk to the tuned model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/05_infer.ipynb)
#
# At the end you have had a conversation with your model, and know what each setting of `generate` does to its answers.
#
# You can
# - turn messages into the [prompt](glossary.ipynb#prompt) that the model was trained on,
# - generate at once or word by word,
# - choose between [greedy](glossary.ipynb#greedy) decoding and [sampling](glossary.ipynb#sampling),
# - ask the [base model](glossary.ipynb#base-model) and the tuned model the same question without loading two models,
# - hold a conversation that does not outgrow the model, in a chat box.
#
# You need `dataset/`, `adapter/` and `report.json` from chapters 03 and 04, in the run folder or in `DRIVE_DIR`. Where
# they are in neither, a message prints the command that makes them here.
#
# {{budget}}

# %% [markdown] lang="zh"
# # 和微调后的模型对话
#
# [![在 Colab 中打开](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/zh-CN/05_infer.ipynb)
#
# 学完这一章，你会和自己的模型对上话，也会知道 `generate` 的每个设置怎样影响回答。
#
# 学完后你能
# - 把消息变成模型训练时见过的那种[提示词](glossary.ipynb#prompt)；
# - 一次得到全部文字，或者看着它逐词生成；
# - 在[贪心](glossary.ipynb#greedy)解码和[采样](glossary.ipynb#sampling)之间做选择；
# - 拿同一个问题问[基座模型](glossary.ipynb#base-model)和微调后的模型，而不必加载两个模型；
# - 在聊天框里对话，并且不让对话长到模型装不下。
#
# 你需要第 03 章和第 04 章的 `dataset/`、`adapter/` 和 `report.json`，它们在运行文件夹或 `DRIVE_DIR` 里。
# 如果两处都没有，会出现一条消息，里面的命令可以就地生成这些文件。
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `MAX_NEW_TOKENS` is the longest reply, in [tokens](glossary.ipynb#token). `RUN_DIR` and `DRIVE_DIR` are as in chapter
# 03, `MODEL_NAME`, `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and `USE_MODELSCOPE` as in chapter 02.

# %% [markdown] lang="zh"
# `MAX_NEW_TOKENS` 是回复的最大长度，以[词元](glossary.ipynb#token)计。`RUN_DIR` 和 `DRIVE_DIR` 与第 03 章相同，
# `MODEL_NAME`、`MAX_SEQ_LENGTH`、`HF_ENDPOINT` 和 `USE_MODELSCOPE` 与第 02 章相同。

# %% tags=["parameters"]
# @title Choices · 选项
MODEL_NAME = "unsloth/Llama-3.2-3B-Instruct"  # @param {type:"string"}
MAX_SEQ_LENGTH = 2048  # @param {type:"integer"}
MAX_NEW_TOKENS = 96  # @param {type:"integer"}
RUN_DIR = "runs/llama"  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.environment import check_choices, find_model
from helpers.handoff import open_run

check_choices(globals())
MODEL_NAME = find_model(MODEL_NAME, endpoint=HF_ENDPOINT, modelscope=USE_MODELSCOPE)
run = open_run(RUN_DIR, chapter="05_infer", base_model=MODEL_NAME, drive=DRIVE_DIR)

# %% [markdown] lang="en"
# ## Load the adapter
#
# Given a folder with an [adapter](glossary.ipynb#adapter), `from_pretrained` loads the base model that it was trained
# on and puts the adapter on top.

# %% [markdown] lang="zh"
# ## 加载适配器
#
# 给 `from_pretrained` 一个含有[适配器](glossary.ipynb#adapter)的文件夹，它就会加载这个适配器训练时所用的基座模型，再把适配器装上去。

# %%
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=f"{RUN_DIR}/adapter", max_seq_length=MAX_SEQ_LENGTH, dtype=None, load_in_4bit=True
)
FastLanguageModel.for_inference(model)
print(f"Adapters on the model: {list(model.peft_config)}")

# %% [markdown] lang="en"
# A model that was loaded by halves, or is asked in another form than it was trained in, answers worse, and nothing says
# so. This check does. It holds matrices and [tokenizer](glossary.ipynb#tokenizer) against their files, and the
# [held-out](glossary.ipynb#held-out-set) [loss](glossary.ipynb#loss) against chapter 04's.

# %% [markdown] lang="zh"
# 如果模型只加载了一半，或者提问的格式和训练时不同，回答就会变差，而且没有任何提示。下面的检查能发现这种情况：
# 它把矩阵和[分词器](glossary.ipynb#tokenizer)与各自的文件比对，
# 把[留出](glossary.ipynb#held-out-set)集上的[损失](glossary.ipynb#loss)与第 04 章的结果比对。

# %% tags=["nbval-check-output"]
from helpers.training import check_loaded

check_loaded(run, model, tokenizer)

# %% [markdown] lang="en"
# ## From messages to a prompt
#
# `add_generation_prompt=True` ends the prompt with the opening of an assistant's turn, so that the model answers
# instead of going on with the question. `return_dict=True` gives the *attention [mask](glossary.ipynb#mask)* too, which
# says what is prompt and what only fills a row up.

# %% [markdown] lang="zh"
# ## 从消息到提示词
#
# `add_generation_prompt=True` 让提示词以助手轮次的开头收尾，这样模型会回答问题，而不是接着往下写问题。
# `return_dict=True` 还会给出**注意力[掩码](glossary.ipynb#mask)**（attention mask），它标明哪些词元是提示词，哪些只是用来把一行填满的。

# %% tags=["nbval-check-output"]
messages = [{"role": "user", "content": "Continue the Fibonacci sequence: 1, 1, 2, 3, 5, 8,"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(inputs["input_ids"][0]))
print({name: tuple(tensor.shape) for name, tensor in inputs.items()})

# %% [markdown] lang="en"
# ## Sample a reply
#
# The model gives every token a probability. *Sampling* draws the next one by them, until an end token or
# `max_new_tokens`. `temperature=1.5` makes rarer words come up more often. `min_p=0.1` drops every token that is less
# than a tenth as likely as the best one, which keeps the worst nonsense out. Each run gives another answer.

# %% [markdown] lang="zh"
# ## 采样一个回复
#
# 模型给每个词元一个概率。**采样**（sampling）按这些概率抽出一个又一个词元，直到遇到结束词元，
# 或者达到 `max_new_tokens`。`temperature=1.5` 让少见的词更常出现。
# `min_p=0.1` 去掉概率不到最可能的词元十分之一的那些词元，这样就挡住了最离谱的胡话。每次运行都会得到不同的回答。

# %%
output = model.generate(
    **inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=1.5, min_p=0.1
)
print(tokenizer.decode(output[0]))

# %% [markdown] lang="en"
# It may look odd, and that is what fine-tuning on a narrow set does. A model that learned to write support replies
# writes support replies. The text begins with the prompt and shows the [special tokens](glossary.ipynb#special-token).
# Cut the one off, skip the others, and only the answer is left.

# %% [markdown] lang="zh"
# 结果可能看起来有点怪。在内容单一的数据集上微调，就会这样：模型学的是写客服回复，写出来的也就是客服回复。
# 这段文本以提示词开头，还带着[特殊词元](glossary.ipynb#special-token)。截掉提示词，跳过特殊词元，剩下的就只有回答。

# %%
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# %% [markdown] lang="en"
# ## Watch it write
#
# A `TextStreamer` prints each word as soon as it is there.

# %% [markdown] lang="zh"
# ## 看着它写
#
# 每生成一个词，`TextStreamer` 就立刻把它打印出来。

# %%
from transformers import TextStreamer

messages = [{"role": "user", "content": "Describe a tall tower in the capital of France."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
output = model.generate(**inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, streamer=streamer)

# %% [markdown] lang="en"
# `stream_reply` streams too and takes the time. What a reader feels is the time to the first token, in which the whole
# prompt is read; after that, tokens per second. The [merged](glossary.ipynb#merge) model of [chapter 06](06_save.ipynb)
# writes two to three times as fast as an adapter beside 4-bit [weights](glossary.ipynb#weights).

# %% [markdown] lang="zh"
# `stream_reply` 也是边生成边打印，同时还会计时。读回复的人先感受到的，是等待第一个词元的时间，
# 模型要在这段时间里读完整个提示词；之后感受到的，是每秒生成多少词元。
# [第 06 章](06_save.ipynb)里[合并](glossary.ipynb#merge)后的模型，生成速度是“适配器加 4 位[权重](glossary.ipynb#weights)”的两到三倍。

# %%
from helpers.chat import stream_reply

reply = stream_reply(model, tokenizer, messages, max_new_tokens=MAX_NEW_TOKENS)
reply

# %% [markdown] lang="en"
# ## Greedy or sampled
#
# *Greedy* decoding, `do_sample=False`, always takes the most likely token. The same prompt then gives the same answer,
# which is what you want for support replies and for tests. This is the first held-out question of chapter 03, asked
# both ways. Compare what the replies advise: sampling keeps the form, but the help becomes a draw of luck.

# %% [markdown] lang="zh"
# ## 贪心还是采样
#
# **贪心**（greedy）解码，也就是 `do_sample=False`，总是取概率最大的词元。
# 这样，同样的提示词会得到同样的回答，客服回复和测试要的正是这一点。
# 下面是第 03 章的第一个留出问题，两种方式各问一次。比较一下两个回复给出的建议：
# 采样的回复保持了格式，但给出什么帮助就要碰运气了。

# %%
from datasets import load_from_disk

held_out = load_from_disk(f"{RUN_DIR}/dataset")["held_out"]
questions = [turns[:-1] for turns in held_out["conversations"][:4]]
inputs = tokenizer.apply_chat_template(questions[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(questions[0][-1]["content"])
for name, options in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True, "temperature": 1.5})):
    output = model.generate(**inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, **options)
    print(f"\n[{name}]\n{tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")

# %% [markdown] lang="en"
# ## Base against tuned
#
# The adapter is a detour beside the frozen weights, so it can be switched off: inside `disable_adapter()` the same
# object *is* the base model. Several questions at once are faster than one by one. They are
# [padded](glossary.ipynb#padding) on the left to one length, so that every answer begins right after its question.

# %% [markdown] lang="zh"
# ## 基座模型与微调后的模型
#
# 适配器是冻结的权重旁边的一条旁路，所以可以关掉：在 `disable_adapter()` 里面，同一个对象**就是**基座模型。
# 几个问题一起问，比一个一个问更快。它们会在左侧[填充](glossary.ipynb#padding)到同一长度，这样每个回答都紧跟在自己的问题后面。

# %%
def ask(conversations):
    prompts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


tuned = ask(questions)
with model.disable_adapter():
    base = ask(questions)
for turns, base_reply, tuned_reply in zip(questions, base, tuned):
    print(f"QUESTION  {turns[-1]['content']}\n\nBASE      {base_reply}\n\nTUNED     {tuned_reply}\n" + "—" * 60)

# %% [markdown] lang="en"
# If no reply differs, you are talking to the base model: the adapter is not active, or it learned nothing.

# %% [markdown] lang="zh"
# 如果两边的回复全都相同，那么和你对话的就是基座模型：适配器没有生效，或者什么也没学到。

# %%
differing = sum(first != second for first, second in zip(base, tuned))
if differing == 0:
    raise RuntimeError(f"All {len(tuned)} replies are the base model's: it learned too little. Train longer.")
print(f"{differing} of {len(tuned)} replies differ from the base model's")

# %% [markdown] lang="en"
# ## A second turn
#
# The model remembers nothing between calls. A conversation is a list that grows: append its answer, then your next
# question, and render all of it again.

# %% [markdown] lang="zh"
# ## 第二个轮次
#
# 模型在两次调用之间什么都不记得。对话是一个不断变长的列表：
# 加上模型的回答，再加上你的下一个问题，然后把整个列表重新写成文本。

# %%
conversation = [*questions[0], {"role": "assistant", "content": tuned[0]}]
conversation.append({"role": "user", "content": "Thank you. One more thing: how do I send it back?"})
print(ask([conversation])[0])

# %% [markdown] lang="en"
# Sooner or later it is longer than `max_seq_length`, for which the model was loaded. Then the oldest turns have to go,
# a question together with its answer. Half a turn would be text that the model never saw in training.

# %% [markdown] lang="zh"
# 对话迟早会超过 `max_seq_length`，也就是加载模型时设定的长度。这时就得去掉最早的轮次，问题和它的回答要一起去掉。
# 如果只去掉其中之一，剩下的就成了模型在训练中从没见过的文本。

# %%
def count_tokens(turns):
    return len(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])


longer = [*questions[0], {"role": "assistant", "content": tuned[0]}] * 40 + questions[0]
while count_tokens(longer) + MAX_NEW_TOKENS > MAX_SEQ_LENGTH:
    longer = longer[2:]
print(f"The last {len(longer)} messages fit: {count_tokens(longer)} tokens")

# %% [markdown] lang="en"
# ## Talk to it
#
# Type a question and press Enter. *Stop* ends a reply, *Reset* begins anew, and *Ask* chooses who answers: the tuned
# model, the base model, or both, side by side. *Save transcript* writes the conversation to the run folder. What you
# correct in that file, you can train on.
#
# ![The chat box with a question, the tuned model's answer and the base model's](https://raw.githubusercontent.com/your-org/llama-3.2-unsloth-t4/v0.1.0/notebooks/images/chat.png)
#
# Where nobody can type, as when a program runs this notebook, two questions are asked instead.

# %% [markdown] lang="zh"
# ## 和它聊一聊
#
# 输入一个问题，然后按 Enter 键。**停止**（Stop）中止当前的回复，**重新开始**（Reset）清空对话，
# **由谁回答**（Ask）选择微调后的模型、基座模型，或者两者并排回答。**保存对话**（Save transcript）把对话写进运行文件夹。
# 你在那个文件里改好的对话，可以拿来训练。
#
# ![聊天框，里面有一个问题，以及微调后的模型和基座模型各自的回答](https://raw.githubusercontent.com/your-org/llama-3.2-unsloth-t4/v0.1.0/notebooks/images/chat.png)
#
# 如果没有人能输入，例如由程序来运行这个 notebook，就改为自动提出两个问题。

# %%
from helpers.chat import ChatBox

box = ChatBox(model, tokenizer, max_seq_length=MAX_SEQ_LENGTH, max_new_tokens=MAX_NEW_TOKENS)
box.show(script=[questions[1][-1]["content"], "Thank you!"], save_to=f"{RUN_DIR}/transcript.jsonl")
run.record("05_infer", replies=len(tuned), differing_replies=differing, tokens_per_second=reply.tokens_per_second)

# %%
print(f"Result: {differing} of {len(tuned)} held-out replies differ from the base model's")

# %% [markdown] lang="en"
# ## Where you are
#
# Nothing that a later chapter needs is new on disk. You know how your model talks.
#
# On your own: sample with a `temperature` of 0.3, 1 and 3, and leave `min_p` out.
#
# <details><summary>Solution</summary>
#
# ```python
# import torch
# torch.manual_seed(3407)
# prompts = tokenizer.apply_chat_template(questions, tokenize=False, add_generation_prompt=True)
# inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
# for temperature in (0.3, 1.0, 3.0):
#     output = model.generate(**inputs.to(model.device), max_new_tokens=48, do_sample=True, temperature=temperature)
#     replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
#     kept = sum("\nNext step: " in reply for reply in replies)
#     print(f"{temperature}: {kept} of {len(replies)} replies keep the form, such as\n{replies[0]}\n")
# ```
#
# At 0.3 the replies keep the form; at 3 they are no language any more.
#
# </details>
#
# In practice: [Transformers' guide](https://huggingface.co/docs/transformers/generation_strategies) lists the other
# ways to choose the next token. For answers that must not vary, greedy is the one.
#
# {{next}}

# %% [markdown] lang="zh"
# ## 到这里为止
#
# 这一章没有在磁盘上留下后面章节需要的东西。不过，你现在知道自己的模型怎样说话了。
#
# 自己动手：把 `temperature` 设为 0.3、1 和 3，各采样一次，并去掉 `min_p`。
#
# <details><summary>参考答案</summary>
#
# ```python
# import torch
# torch.manual_seed(3407)
# prompts = tokenizer.apply_chat_template(questions, tokenize=False, add_generation_prompt=True)
# inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
# for temperature in (0.3, 1.0, 3.0):
#     output = model.generate(**inputs.to(model.device), max_new_tokens=48, do_sample=True, temperature=temperature)
#     replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
#     kept = sum("\nNext step: " in reply for reply in replies)
#     print(f"{temperature}: {kept} of {len(replies)} replies keep the form, such as\n{replies[0]}\n")
# ```
#
# 温度为 0.3 时，回复保持格式；为 3 时，回复已经语无伦次。
#
# </details>
#
# 实践中：
# [Transformers 的指南](https://huggingface.co/docs/transformers/generation_strategies)列出了选择下一个词元的其他方法。
# 如果每次的回答必须相同，就用贪心解码。
#
# {{next}}
