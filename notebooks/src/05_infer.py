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
# You need `adapter/` from chapter 04. If it is neither in the run folder nor in `DRIVE_DIR`, this chapter first runs
# chapters 02 to 04, training included.
#
# {{budget}}

# %%
# include: setup_cell.py

# %% [markdown] lang="en"
# Empty means: the profile's own value. `MAX_NEW_TOKENS` is the longest reply, in tokens. `RUN_DIR`, `DRIVE_DIR` and
# `HUB_REPO` say where the adapter is found, as in chapter 04. `PROFILE`, `MODEL_NAME`, `DATASET`, `MAX_SEQ_LENGTH` and
# `MAX_STEPS` say how to train it, should it have to be trained first. `HF_ENDPOINT` and `USE_MODELSCOPE` choose the
# hub, as in chapter 01.

# %% tags=["parameters"]
# @title Choices
PROFILE = "auto"  # @param ["auto", "t4", "cpu"]
MODEL_NAME = ""  # @param {type:"string"}
DATASET = ""  # @param {type:"string"}
MAX_SEQ_LENGTH = None  # @param {type:"raw"}
MAX_STEPS = None  # @param {type:"raw"}
MAX_NEW_TOKENS = 96  # @param {type:"integer"}
RUN_DIR = ""  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HUB_REPO = ""  # @param {type:"string"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.handoff import open_run
from helpers.environment import choose_hub
from helpers.profiles import choose_profile, model_source

choose_hub(HF_ENDPOINT, modelscope=USE_MODELSCOPE)
choices = dict(model_name=MODEL_NAME, dataset=DATASET, max_seq_length=MAX_SEQ_LENGTH, max_steps=MAX_STEPS)
profile = choose_profile(PROFILE, **choices, run_dir=RUN_DIR)
given = {name.upper(): value for name, value in choices.items()} | {"PROFILE": PROFILE}
run = open_run(profile.run_dir, needs=("adapter",), drive=DRIVE_DIR, hub=HUB_REPO, parameters=given)

# %% [markdown] lang="en"
# ## Load the adapter
#
# Given a folder with an adapter, `from_pretrained` loads the base model that it was trained on and puts the adapter on
# top. `require_template` makes sure that its tokenizer came with the chat template that it was trained in, and
# `for_inference` switches Unsloth to its faster generation.

# %%
from unsloth import FastLanguageModel

from helpers.template import require_template

model_source(profile.model_name)  # the base model has to be there, or the Hub has to answer
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=str(run.artefact("adapter", base_model=profile.model_name)),
    max_seq_length=profile.max_seq_length,
    dtype=None,
    load_in_4bit=True,
)
require_template(tokenizer, expected=run.facts("adapter")["template"], model=model)
FastLanguageModel.for_inference(model)
print(f"Adapters on the model: {list(model.peft_config)}")

# %% [markdown] lang="en"
# ## From messages to a prompt
#
# `add_generation_prompt=True` ends the prompt with the opening of an assistant's turn, so that the model answers
# instead of going on with the question. `return_dict=True` gives the *attention mask* as well, which says what is
# prompt and what is padding; without it `generate` has to guess.

# %% tags=["nbval-check-output"]
messages = [{"role": "user", "content": "Continue the Fibonacci sequence: 1, 1, 2, 3, 5, 8,"}]
prompt_options = dict(add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True)
prompt = tokenizer.apply_chat_template(messages, **prompt_options)
print(tokenizer.decode(prompt["input_ids"][0]))
print({name: tuple(tensor.shape) for name, tensor in prompt.items()})

# %% [markdown] lang="en"
# ## Sample a reply
#
# The model gives every token a probability. *Sampling* draws the next token by them, and so on, until an end token
# (`eos_token_id`) or `MAX_NEW_TOKENS`. `use_cache=True` keeps what was computed for the tokens before.
# `temperature=1.5` flattens the distribution, so that rarer words come up more often; `min_p=0.1` then drops every
# token that is less than a tenth as likely as the best one, which keeps out the worst of the nonsense. `pad_token_id`
# is what would fill up a shorter reply beside a longer one; named, so that `generate` need not guess. Each run of the
# cell gives another answer.

# %%
from helpers.chat import stop_tokens

limits = dict(max_new_tokens=MAX_NEW_TOKENS, eos_token_id=stop_tokens(tokenizer, model), use_cache=True)
sampling = dict(do_sample=True, temperature=1.5, min_p=0.1)
output = model.generate(**prompt.to(model.device), **limits, **sampling, pad_token_id=tokenizer.pad_token_id)
print(tokenizer.batch_decode(output)[0])

# %% [markdown] lang="en"
# It may look odd, and that is what fine-tuning on a narrow set does: a small model that learned to write support
# replies writes support replies. (On a T4 your model was trained on general conversations, and should answer the
# question.)
#
# The decoded output begins with the prompt and shows the special tokens. Cut the one off, skip the others, and only the
# answer is left.

# %%
reply = output[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))

# %% [markdown] lang="en"
# ## Watch it write
#
# A `TextStreamer` prints each word as soon as it is there, instead of the whole answer at the end.

# %%
from transformers import TextStreamer

messages = [{"role": "user", "content": "Describe a tall tower in the capital of France."}]
prompt = tokenizer.apply_chat_template(messages, **prompt_options).to(model.device)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
output = model.generate(**prompt, **limits, **sampling, pad_token_id=tokenizer.pad_token_id, streamer=streamer)

# %% [markdown] lang="en"
# `stream_reply` streams too and takes the time; unless you give it a `temperature`, it takes the most likely token each
# time (*greedy*, below). What a reader feels is the time to the first token, in which the whole prompt is read; after
# that, tokens per second.

# %%
from helpers.chat import print_text, stream_reply

stream_reply(model, tokenizer, messages, on_text=print_text, max_new_tokens=MAX_NEW_TOKENS)

# %% [markdown] lang="en"
# ## Greedy or sampled
#
# *Greedy* decoding (`do_sample=False`) always takes the most likely token: the same prompt, asked in the same way on
# the same machine, gives the same answer, which is what you want for support replies and for tests. This is the first
# held-out question of chapter 03, asked both ways. Compare what each reply advises: sampling keeps the style, but at a
# temperature of 1.5 the help becomes a draw of luck.

# %%
from datasets import load_from_disk

held_out = load_from_disk(run.artefact("dataset", base_model=profile.model_name))["held_out"]
question = held_out[0]["conversations"][:-1]
prompt = tokenizer.apply_chat_template(question, **prompt_options).to(model.device)
print(question[-1]["content"])
for name, options in (("greedy", dict(do_sample=False)), ("sampled", sampling), ("sampled again", sampling)):
    output = model.generate(**prompt, **limits, **options, pad_token_id=tokenizer.pad_token_id)
    reply = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"\n[{name}]\n{reply}")

# %% [markdown] lang="en"
# ## Base against tuned
#
# The adapter is a detour beside the frozen weights, so it can be switched off: inside `disable_adapter()` the same
# object *is* the base model. Several questions at once are faster than one by one. They are padded on the left to one
# length, so that every answer begins right after its question, and the attention mask hides the padding. The table
# shows the last turn of each question alone. The base model's words may not be those of chapter 04: other batches round
# in other ways, and where two tokens are almost equally likely, that decides.

# %%
from helpers.chat import batch_replies, compare_replies

questions = [turns[:-1] for turns in held_out["conversations"][:4]]
tuned = batch_replies(model, tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS)
with model.disable_adapter():
    base = batch_replies(model, tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS)
compare_replies(questions, base, tuned, names=("base", "tuned"))

# %% [markdown] lang="en"
# If no reply differs, you are talking to the base model: the adapter is not active, or it learned nothing.

# %%
differing = sum(first != second for first, second in zip(base, tuned, strict=True))
if differing == 0:
    raise RuntimeError(f"All {len(tuned)} replies are the base model's. Run chapter 04 again, then this one.")
print(f"{differing} of {len(tuned)} replies differ from the base model's")

# %% [markdown] lang="en"
# ## A second turn
#
# The model remembers nothing between calls. A conversation is a list that grows: append its answer, then your next
# question, and render all of it again.

# %%
conversation = [*questions[0], {"role": "assistant", "content": tuned[0]}]
conversation.append({"role": "user", "content": "Thank you. One more thing: how do I send it back?"})
reply = stream_reply(model, tokenizer, conversation, on_text=print_text, max_new_tokens=MAX_NEW_TOKENS)

# %% [markdown] lang="en"
# Sooner or later it is longer than `max_seq_length`, for which the model was loaded. Then the oldest turns have to go,
# a question together with its answer; half a turn would be text that the model never saw in training. The system
# message and the last question stay.

# %%
from helpers.chat import count_tokens, trim_conversation

for turn in range(2, 40):
    conversation.append({"role": "assistant", "content": reply.text})
    conversation.append({"role": "user", "content": f"And what is step {turn}?"})
room = dict(max_seq_length=profile.max_seq_length, max_new_tokens=MAX_NEW_TOKENS)
kept, left_out = trim_conversation(tokenizer, conversation, **room)
print(f"{len(conversation)} messages, {count_tokens(tokenizer, conversation)} tokens")
print(f"{left_out} left out, the other {len(kept)} have {count_tokens(tokenizer, kept)} tokens")

# %% [markdown] lang="en"
# ## Talk to it
#
# Type a question and press Enter. *Stop* ends a reply, *Reset* begins anew, and *Ask* chooses who answers: the tuned
# model, the base model, or both, side by side. *Save transcript* writes the conversation to the run folder in ShareGPT
# format: what you correct in that file, you can train on. (Where nobody can type, as when the program papermill runs
# this notebook, the questions in `script` are asked instead.)

# %%
from helpers.chat import ChatBox

box = ChatBox(model, tokenizer, max_seq_length=profile.max_seq_length, max_new_tokens=MAX_NEW_TOKENS)
script = [questions[1][-1]["content"], "Thank you!"]
box.show(script=script, save_to=run.path / "transcript.jsonl")

# %%
speed = f"{reply.tokens_per_second:.0f} tokens/s"
print(f"Result: {differing} of {len(tuned)} held-out replies differ from the base model's, {speed}")

# %% [markdown] lang="en"
# ## Where you are
#
# Nothing new is on disk, unless you saved a transcript; you know how your model talks.
#
# On your own: set `temperature` to 0.3 and to 3 and sample again; leave out `min_p`; give the chat box a system prompt.
#
# {{next}}
