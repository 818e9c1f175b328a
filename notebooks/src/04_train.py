# %% [markdown] lang="en"
# # Train on the answers only, and prove that it learned
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-org/llama-3.2-unsloth-t4/blob/main/notebooks/04_train.ipynb)
#
# At the end you have an adapter, and proof from conversations it never saw that it changed the model for the better.
#
# You can
# - set up `SFTTrainer` and say what each setting does,
# - train on the assistant's words only, and prove for every row that nothing else is trained,
# - read memory and time of a run,
# - tell learning from a falling training loss.
#
# You need `lora.json` and `dataset/` from chapters 02 and 03. If they are neither in the run folder nor in `DRIVE_DIR`,
# this chapter runs those first.
#
# {{budget}}

# %%
# include: setup_cell.py

# %% [markdown] lang="en"
# Empty means: the profile's own value. `PROFILE`, `MODEL_NAME`, `DATASET` and `MAX_SEQ_LENGTH` are as in chapters 02
# and 03; `MAX_STEPS` and `LEARNING_RATE` say how long and how boldly to train. `RUN_DIR` is the folder through which
# the chapters hand their results on, and `DRIVE_DIR` a copy of it on your Google Drive (on Colab, such as
# `"/content/drive/MyDrive/llama"`). `HUB_REPO` is a repository on the Hub to which you uploaded a whole run folder
# (`hf upload your-name/my-run runs/t4`), to take from it what neither of them has; what chapter 06 publishes is not
# one. `START_AFRESH` deletes an interrupted training run instead of going on with it. `HF_ENDPOINT` and
# `USE_MODELSCOPE` choose the hub, as in chapter 01.

# %% tags=["parameters"]
# @title Choices
PROFILE = "auto"  # @param ["auto", "t4", "cpu"]
MODEL_NAME = ""  # @param {type:"string"}
DATASET = ""  # @param {type:"string"}
MAX_SEQ_LENGTH = None  # @param {type:"raw"}
MAX_STEPS = None  # @param {type:"raw"}
LEARNING_RATE = None  # @param {type:"raw"}
RUN_DIR = ""  # @param {type:"string"}
DRIVE_DIR = ""  # @param {type:"string"}
HUB_REPO = ""  # @param {type:"string"}
START_AFRESH = False  # @param {type:"boolean"}
HF_ENDPOINT = ""  # @param {type:"string"}
USE_MODELSCOPE = False  # @param {type:"boolean"}

# %%
from helpers.handoff import open_run
from helpers.environment import choose_hub
from helpers.profiles import choose_profile, model_source

choose_hub(HF_ENDPOINT, modelscope=USE_MODELSCOPE)
choices = dict(model_name=MODEL_NAME, dataset=DATASET, max_seq_length=MAX_SEQ_LENGTH, max_steps=MAX_STEPS)
profile = choose_profile(PROFILE, **choices, learning_rate=LEARNING_RATE, run_dir=RUN_DIR)
given = {name.upper(): value for name, value in choices.items()} | {"PROFILE": PROFILE}
needs = ("lora.json", "dataset")
run = open_run(profile.run_dir, needs=needs, drive=DRIVE_DIR, hub=HUB_REPO, parameters=given)
profile

# %% [markdown] lang="en"
# ## Set two switches, and load the data
#
# The rows are those of chapter 03. Before Unsloth is imported, two of its switches are set. On a GPU it would first
# compile the layers (for padded batches) and kernels for the loss: on an H100 that made the first step about 40 s
# longer, and the later ones no faster. For a run of thousands of steps, measure it on your card. Without a GPU they
# change nothing. `gc.freeze` tells Python not to search what was imported for garbage again and again, which Unsloth
# asks for ten times: on an H200's host the 3B then loads in 3 s instead of 7.

# %%
import gc
import os

os.environ.update(UNSLOTH_BLOCK_COMPILE="0", UNSLOTH_FUSED_LINEAR_TRITON="0")  # a long run? Measure it without
from datasets import load_from_disk
from unsloth import FastLanguageModel  # before transformers, peft and trl: it patches them

gc.freeze()
dataset_folder = run.artefact("dataset", base_model=profile.model_name, dataset=profile.dataset_name)
train_dataset = load_from_disk(dataset_folder)["train"]
eval_dataset = load_from_disk(dataset_folder)["held_out"]
times = profile.train_rows / len(train_dataset)
print(
    f"{len(train_dataset)} conversations to train on, each about {times:.1f} times; {len(eval_dataset)} held out"
)

# %% [markdown] lang="en"
# ## What fits, and what is fastest
#
# A *step* changes the trained weights once, along their *gradients* (in which direction, and how steeply, each lowers
# the *loss*, the measure of the model's mistakes), averaged over all answer tokens of `effective_batch_size`
# conversations. These can go through the model all at once (a large *micro-batch*) or in turns whose gradients add up
# (*accumulation*): the result is the same, the memory and the time are not. *Gradient checkpointing* is the second
# choice: keep all intermediate results that the gradients need (`False`), keep each block's input and recompute the
# rest (`True`), do so only in as many blocks as a micro-batch's length makes necessary (`as needed`, listed where not
# all can be kept), or move those inputs to main memory too (`"unsloth"`). The third is *padding*: conversations of a
# batch side by side, the shorter ones filled up to a common width (a multiple of so many tokens), or one after the
# other in one long row (`none`), which computes nothing in vain and gives the processor more to do. `plan_batch`
# predicts the peak of each option from the model's configuration and from the longest conversations of *these* data,
# and takes the fastest that leaves a tenth of the memory free. The seconds are for comparing options. Without a GPU,
# memory and seconds are those of a T4, not of your machine.

# %%
from transformers import AutoConfig, AutoTokenizer

from helpers.memory import plan_batch

tokenizer = AutoTokenizer.from_pretrained(dataset_folder / "tokenizer")
lora_settings = run.read_json("lora.json", base_model=profile.model_name)["lora"]
model_folder = model_source(profile.model_name)
token_ids = tokenizer(train_dataset["text"], truncation=True, max_length=profile.max_seq_length)["input_ids"]
asked = dict(effective_batch_size=profile.effective_batch_size, lora_rank=lora_settings["r"])
plan = plan_batch(AutoConfig.from_pretrained(model_folder), lengths=[len(ids) for ids in token_ids], **asked)
plan

# %% [markdown] lang="en"
# ## Load the model and add LoRA
#
# The calls of chapter 02 with the settings that it handed on, but for the checkpointing, which the plan decides.

# %%
from helpers.memory import stage_table, track_memory

with track_memory("load in 4-bit") as load:
    model, _ = FastLanguageModel.from_pretrained(
        model_name=model_folder,
        max_seq_length=profile.max_seq_length,
        dtype=None,
        load_in_4bit=True,
    )
with track_memory("add LoRA") as add_lora:
    lora_settings |= {"use_gradient_checkpointing": plan.chosen.use_gradient_checkpointing}
    model = FastLanguageModel.get_peft_model(model, **lora_settings)

# %% [markdown] lang="en"
# ## Ask before training
#
# The model answers some held-out conversations now, and the same ones after training. Greedy decoding (always the most
# likely token) makes the two comparable. `for_inference` switches Unsloth to generating, `for_training` (below) back.

# %%
from helpers.chat import batch_replies, compare_replies

FastLanguageModel.for_inference(model)
reply_rows = eval_dataset.select(range(min(profile.reply_rows, len(eval_dataset))))
prompts = [turns[:-1] for turns in reply_rows["conversations"]]
replies_before = batch_replies(model, tokenizer, prompts, max_new_tokens=64)
print(f"{prompts[0][-1]['content']}\n→ {replies_before[0]}")

# %% [markdown] lang="en"
# ## Set up the trainer
#
# | setting | why |
# |---|---|
# | `per_device_train_batch_size` × `gradient_accumulation_steps` | The plan's micro-batch and accumulation. Evaluation keeps no gradients: 8 at once (`per_device_eval_batch_size`). |
# | `gradient_checkpointing` | As the plan has it. TRL's own value is `True`, whatever the model was loaded with. |
# | `train_sampling_strategy="group_by_length"` | Put conversations of similar length into one batch: less padding to compute. |
# | `padding_free`, `pad_to_multiple_of` | The plan's padding. There are only a few widths, because a GPU has to prepare for each of them once. |
# | `max_steps` | How often the weights are changed. To go through all rows instead, leave it out and set `num_train_epochs`. |
# | `warmup_steps` | The learning rate (how far a step goes) climbs from 0 over the first steps, while the optimiser's averages are still poor. |
# | `learning_rate`, `lr_scheduler_type` | The peak, and `linear` decay to 0 at the end. 2e-4 is usual for LoRA, and the `t4` profile's; the 135M model takes twenty times that. |
# | `optim="adamw_8bit"` | AdamW, the usual *optimiser*: it makes the change from the gradients' running averages, here kept in 8 bits (without a GPU Unsloth takes the 32-bit one). |
# | `weight_decay` | Pulls the LoRA matrices a little towards zero. |
# | `fp16`, `bf16` | 16-bit numbers, by what the device supports: a T4 has float16 only. There a *scaler* multiplies the loss, so that small gradients do not vanish; where they overflow, it skips the step and scales less. Expect a few skipped steps at the start. (Without a GPU and without bfloat16 Unsloth takes neither and computes in 32 bits; TRL turns LoRA into bfloat16 all the same, and `undo_emulated_bfloat16` turns it back.) |
# | `max_length`, `dataset_text_field`, `dataset_num_proc` | Where a row is cut off, the column that holds its text, and one process to prepare the rows. |
# | `logging_steps`, `eval_steps` | A training loss for each step; the held-out loss in the middle and at the end. |
# | `save_strategy="no"`, `report_to="none"` | Checkpoints are saved by the clock instead (see Train); no account anywhere. `"tensorboard"` or `"wandb"` work too. |
# | `include_num_input_tokens_seen` | Count the tokens, without padding, for the speed in the picture. |
# | `seed` | The order of the rows. |

# %% tags=["nbval-check-output"]
batch = plan.settings | dict(per_device_eval_batch_size=8)
steps = dict(max_steps=profile.max_steps, warmup_steps=min(5, profile.max_steps // 4))
schedule = dict(learning_rate=profile.learning_rate, lr_scheduler_type="linear")
optimiser = dict(optim="adamw_8bit", weight_decay=0.01)
data = dict(max_length=profile.max_seq_length, dataset_text_field="text", dataset_num_proc=1)
evaluation = dict(eval_strategy="steps", eval_steps=profile.max_steps // 2 + 1)
reporting = dict(logging_steps=1, save_strategy="no", report_to="none", seed=3407)
reporting |= dict(include_num_input_tokens_seen="non_padding")
settings = batch | steps | schedule | optimiser | data | evaluation | reporting
print(*(f"{name} = {value!r}" for name, value in settings.items()), sep="\n")

# %%
from trl import SFTConfig, SFTTrainer
from unsloth import is_bfloat16_supported

from helpers.training import undo_emulated_bfloat16

settings |= dict(fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported())
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    args=SFTConfig(output_dir=run.path / "checkpoints", **settings),
)
print(f"LoRA matrices turned back into 32 bits: {undo_emulated_bfloat16(model)}")

# %% [markdown] lang="en"
# ## Train on the answers only
#
# Without this the model would also learn to write the customer's questions. Each token of a row has a *label*, the
# token that the model should have predicted in its place. `train_on_responses_only` finds the answers between two
# markers, the strings that open a user's and an assistant's turn, and sets every other label to −100, which the loss
# ignores. It also replaces the *collator*, which makes a batch of rows, by one that does not know the planned widths:
# so it is told them again.

# %%
from unsloth.chat_templates import train_on_responses_only

facts = run.facts("dataset")
instruction_part, response_part = facts["instruction_part"], facts["response_part"]
trainer = train_on_responses_only(trainer, instruction_part=instruction_part, response_part=response_part)
trainer.data_collator.pad_to_multiple_of = plan.settings.get("pad_to_multiple_of")
print(f"instruction_part = {instruction_part!r}\nresponse_part = {response_part!r}")
dropped = len(train_dataset) - len(trainer.train_dataset)
print(f"Rows dropped because nothing in them would be trained: {dropped}")

# %% [markdown] lang="en"
# One row, decoded: first all that the model reads, then only what it is trained to write. (Where a text does not end
# with the end token, the trainer adds one, as the last `<|im_end|>` here. It follows no answer, so it is not trained.)
# Above it the shape of one micro-batch: rows, and tokens in each with what fills them up.

# %% tags=["nbval-check-output"]
micro_batch = trainer.data_collator([trainer.train_dataset[number] for number in range(plan.chosen.micro_batch)])
print(f"One micro-batch: {tuple(micro_batch['input_ids'].shape)}\n")
row = trainer.train_dataset[0]
print(tokenizer.decode(row["input_ids"]))
print("—" * 60)
print(tokenizer.decode([label for label in row["labels"] if label != -100]))

# %% [markdown] lang="en"
# One row that looks right proves little. `check_masking` reads the turns of *every* row from the chat template itself,
# not from the markers above, and compares: nothing of a user trained, no answer left out, every answer's end trained.

# %% tags=["nbval-check-output"]
from helpers.masking import check_masking, show_masking

mask_report = check_masking(trainer.train_dataset, tokenizer=tokenizer)
mask_report.raise_if_failed()
mask_report

# %% tags=["nbval-check-output"]
show_masking(row, tokenizer=tokenizer)

# %% [markdown] lang="en"
# A check that cannot fail is none. Here the two markers are swapped, so that the model would learn to be the customer.
# (`return_function=True` gives the masking function itself, to try on one row.) The message quotes the first fault and
# counts the others. Try other mistakes: a marker without its newline, or labels that are all of `row["input_ids"]`.

# %% tags=["nbval-check-output"]
swapped = dict(instruction_part=response_part, response_part=instruction_part)
mask_wrongly = train_on_responses_only(None, tokenizer=tokenizer, return_function=True, **swapped)
wrong_labels = mask_wrongly({"input_ids": [row["input_ids"]]})["labels"][0]
wrong_row = {"input_ids": row["input_ids"], "labels": wrong_labels}
try:
    check_masking([wrong_row], tokenizer=tokenizer).raise_if_failed()
except ValueError as error:
    print(error)
show_masking(wrong_row, tokenizer=tokenizer)

# %% [markdown] lang="en"
# ## Measure before training
#
# The held-out loss, on answers that are never trained. A token's loss is −ln of the probability that the model gave to
# it, in *nats*: 0 if it was certain. *Perplexity* is e to the mean loss: between how many equally likely tokens it
# wavers. The interval says how much the mean might differ had other conversations been held out. And a checksum over
# all frozen weights: training must not touch them.

# %%
from helpers.training import check_evidence, frozen_checksum, held_out_losses, live_plot

FastLanguageModel.for_training(model)
held_out_before = held_out_losses(model, trainer.eval_dataset)
frozen_before = frozen_checksum(model)
held_out_before

# %% [markdown] lang="en"
# ## Train
#
# The picture grows with each step. The training loss jumps from batch to batch; the held-out loss is what counts. (In
# the trainer's own table it is called *Validation Loss*, and an *epoch* is one pass through all rows.)
#
# A free Colab machine may be taken away at any time, and its disk with it. `Checkpoints` saves the run every five
# minutes (`every_seconds`), and when you press Stop; with `DRIVE_DIR` set it also copies what it saved to your Drive,
# without which a run can go on only on the machine that it started on. Run the chapter again: an interrupted run goes
# on at the step where it was, and a complete one is loaded and not trained further. Once its results are saved (below),
# running the chapter again trains a new one.
#
# `stop_on_divergence` ends a run whose loss explodes or is not a number. `fit_into_memory` trains and evaluates on the
# longest conversations once before the first step, without effect, so that a run that is too large fails now and not at
# step 57; it recomputes as many blocks as planned; and where memory does run out, it recomputes them all, then splits
# the micro-batch, loses no step, and says so.

# %%
from helpers.training import Checkpoints
from helpers.training import stop_on_divergence
from helpers.memory import fit_into_memory

plot = live_plot(folder=run.path / "curves")
plot.record(0, {"eval_loss": held_out_before.loss})
trainer.add_callback(plot)
trainer.add_callback(stop_on_divergence())
checkpoints = Checkpoints(trainer, mirror=run.mirror, every_seconds=300, start_afresh=START_AFRESH)
fit = fit_into_memory(trainer, plan.checkpointed_layers)
with track_memory("training") as training, checkpoints as last_checkpoint, fit as fitting:
    trainer.train(resume_from_checkpoint=last_checkpoint)

# %% [markdown] lang="en"
# Time and memory of the training, then of every stage against the size of the card. *Reserved* is what PyTorch has
# taken from it, and what has to fit. On a GPU compare the training's peak with the plan's prediction; without one the
# figures are those of this process, Python and its libraries included. The training's row contains the two before it.
# (After a resume they are this session's; the report has the seconds of all sessions.)

# %%
from helpers.figures import draw_stages
from helpers.memory import MemoryReport

stages = [load, add_lora, fitting.rehearsal, fitting.first_step, training]
print(MemoryReport(training))
display(stage_table(stages), draw_stages(stages))

# %% [markdown] lang="en"
# ## Did it learn?
#
# The held-out loss again, on the same conversations as before training. The last point of the picture differs a little:
# the trainer averages over batches, this over the answers' tokens. Llama answers FineTome's general questions well
# before it is trained: on a T4 expect a far smaller fall than here.

# %%
held_out_after = held_out_losses(model, trainer.eval_dataset)
held_out_after

# %% [markdown] lang="en"
# Five claims, each checked by a program. (The *gradient norm* is the size of a step's gradients, all taken together.)
# One that does not hold stops the chapter here.

# %% tags=["nbval-check-output"]
log, losses = trainer.state.log_history, dict(before=held_out_before, after=held_out_after)
chosen_rate = dict(learning_rate=profile.learning_rate)
evidence = check_evidence(
    model, log=log, frozen_before=frozen_before, **losses, **chosen_rate, float16=trainer.args.fp16
)
evidence.raise_if_failed()
evidence

# %% [markdown] lang="en"
# The same conversations as before training, side by side. Only the last question of each is shown; the model also read
# the turns before it, where the product may be named.

# %%
FastLanguageModel.for_inference(model)
replies_after = batch_replies(model, tokenizer, prompts, max_new_tokens=64)
side_by_side = compare_replies(prompts[:4], replies_before[:4], replies_after[:4])
side_by_side

# %% [markdown] lang="en"
# ## Count it
#
# Reading four replies is an impression; counting all of them is a result. The support conversations say for each
# question what the right help contains, so that this function can judge a reply. (Other data sets have no such column:
# the cells then say so.)

# %%
import inspect

from helpers.chat import judge_reply

print(inspect.getsource(judge_reply))

# %%
styled, helped = {}, {}
judged = "right_help" in reply_rows.column_names
for name, replies in (("before", replies_before), ("after", replies_after)):
    if judged:
        asked = zip(replies, reply_rows["product"], reply_rows["right_help"], strict=True)
        verdicts = [judge_reply(reply, product=product, right_help=right[-1]) for reply, product, right in asked]
        styled[name] = sum(verdict.house_style for verdict in verdicts) / len(verdicts)
        helped[name] = sum(verdict.right_help for verdict in verdicts) / len(verdicts)
        print(f"{name}: {styled[name]:.0%} in house style, {helped[name]:.0%} with the right help")
if not judged:
    print("These conversations do not say what a right reply is: nothing to count.")

# %% [markdown] lang="en"
# ## Save the adapter and the report
#
# `save_pretrained` writes the LoRA matrices alone, 10 to 100 MB; the base model is loaded again beside them. The
# tokenizer goes with them, because it holds the chat template. `report.html` is the whole run on one page: open it or
# send it.

# %% tags=["handoff"]
with run.write("adapter", base_model=profile.model_name, template=facts["template"]) as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
print(sorted(path.name for path in run.artefact("adapter").iterdir()))

# %% tags=["handoff"]
from helpers.training import make_report, write_report

chosen = dict(base_model=profile.model_name, dataset=profile.dataset_name, settings=lora_settings | settings)
measured = dict(stages=stages, curves=plot.curves, mask_report=mask_report, evidence=evidence)
measured |= dict(resumed_from=checkpoints.step)
compared = dict(replies=side_by_side, counted={"house_style": styled, "right_help": helped})
report = make_report(trainer, **chosen, **measured, **compared, held_out=(held_out_before, held_out_after))
run.write_json("report.json", report, base_model=profile.model_name)
with run.write("report.html", base_model=profile.model_name) as page:
    write_report(report, page)
checkpoints.hand_over()  # from here on, running this chapter again trains anew

# %%
figure = f"held-out loss {held_out_before.loss:.2f} → {held_out_after.loss:.2f} in {report['seconds']:.0f} s"
if judged:
    figure += f", house style {styled['before']:.0%} → {styled['after']:.0%}, right help {helped['after']:.0%}"
print(f"Result: {figure}")

# %% [markdown] lang="en"
# ## Where you are
#
# You have `adapter/`, `report.json` and `report.html` in the run folder, and know that the adapter is better on text
# that it never saw. On Colab the run folder ends with this machine: unless you set `DRIVE_DIR`, chapters 05 and 06
# train the model again before they begin.
#
# On your own, with `RUN_DIR` set to another folder, so that your adapter stays: set `MAX_STEPS` to 5 and see which
# claims still hold; put `response_part = response_part.replace("assistant", "assistent")` before
# `train_on_responses_only` and see what stops the chapter; set `LEARNING_RATE` to 0.1.
#
# {{next}}
