# %% [markdown] lang="en"
# # Talk to the tuned model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/05_infer.ipynb)
#
# At the end you have had a conversation with your model, and know what each setting of `generate` does to its answers.
#
# You can
# - turn messages into the prompt that the model was trained on,
# - generate at once or word by word,
# - choose between greedy decoding and sampling,
# - ask the base model and the tuned model the same question without loading two models,
# - hold a conversation that does not outgrow the model, in a chat box.
#
# You need `dataset/`, `adapter/` and `report.json` from chapters 03 and 04, in the run folder or in `DRIVE_DIR`. Where
# they are in neither, a message prints the command that makes them here.
#
# {{budget}}

# %% cellView="form"
# include: setup_cell.py

# %% [markdown] lang="en"
# `MAX_NEW_TOKENS` is the longest reply, in tokens. `RUN_DIR` and `DRIVE_DIR` are as in chapter 03, `MODEL_NAME`,
# `MAX_SEQ_LENGTH`, `HF_ENDPOINT` and `USE_MODELSCOPE` as in chapter 02.

# %% tags=["parameters"]
# @title Choices
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
# Given a folder with an adapter, `from_pretrained` loads the base model that it was trained on and puts the adapter on
# top.

# %%
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=f"{RUN_DIR}/adapter", max_seq_length=MAX_SEQ_LENGTH, dtype=None, load_in_4bit=True
)
FastLanguageModel.for_inference(model)
print(f"Adapters on the model: {list(model.peft_config)}")

# %% [markdown] lang="en"
# A model that was loaded by halves, or is asked in another form than it was trained in, answers worse, and nothing says
# so. This check does. It holds matrices and tokenizer against their files, and the held-out loss against chapter 04's.

# %% tags=["nbval-check-output"]
from helpers.training import check_loaded

check_loaded(run, model, tokenizer)

# %% [markdown] lang="en"
# ## From messages to a prompt
#
# `add_generation_prompt=True` ends the prompt with the opening of an assistant's turn, so that the model answers
# instead of going on with the question. `return_dict=True` gives the *attention mask* too, which says what is prompt
# and what only fills a row up.

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

# %%
output = model.generate(
    **inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=1.5, min_p=0.1
)
print(tokenizer.decode(output[0]))

# %% [markdown] lang="en"
# It may look odd, and that is what fine-tuning on a narrow set does. A model that learned to write support replies
# writes support replies. The text begins with the prompt and shows the special tokens. Cut the one off, skip the
# others, and only the answer is left.

# %%
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# %% [markdown] lang="en"
# ## Watch it write
#
# A `TextStreamer` prints each word as soon as it is there.

# %%
from transformers import TextStreamer

messages = [{"role": "user", "content": "Describe a tall tower in the capital of France."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
output = model.generate(**inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, streamer=streamer)

# %% [markdown] lang="en"
# `stream_reply` streams too and takes the time. What a reader feels is the time to the first token, in which the whole
# prompt is read; after that, tokens per second. The merged model of [chapter 06](06_save.ipynb) writes two to three times
# as fast as an adapter beside 4-bit weights.

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
# object *is* the base model. Several questions at once are faster than one by one. They are padded on the left to one
# length, so that every answer begins right after its question.

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

# %%
conversation = [*questions[0], {"role": "assistant", "content": tuned[0]}]
conversation.append({"role": "user", "content": "Thank you. One more thing: how do I send it back?"})
print(ask([conversation])[0])

# %% [markdown] lang="en"
# Sooner or later it is longer than `max_seq_length`, for which the model was loaded. Then the oldest turns have to go,
# a question together with its answer. Half a turn would be text that the model never saw in training.

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
# On your own: set `temperature` to 0.3 and to 3 and sample again. Leave `min_p` out. Give the chat box a system prompt.
#
# In practice: [Transformers' guide](https://huggingface.co/docs/transformers/generation_strategies) lists the other
# ways to choose the next token. For answers that must not vary, greedy is the one.
#
# {{next}}
