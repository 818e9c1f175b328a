"""A process that has imported everything and trains in forks of itself: a tiny Llama, or SmolLM2 with Unsloth.

Importing costs many seconds and a tiny training one, so that a test of twenty kills can afford real processes. A line
on standard input is a job in JSON (the arguments of `run`); two lines come back: the fork's process id at once, and its
exit code when it has ended (0, 1 for an error, 130 for a KeyboardInterrupt, -9 for SIGKILL).
"""

import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS = 12
TEXTS = [f"Question {n}: what is {n} and {n + 1}?" + " Please think about it." * (n % 5) for n in range(20)]
COMMON = dict(
    train_sampling_strategy="group_by_length",
    learning_rate=1e-2,
    eval_strategy="steps",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    seed=3407,
)


def small_tokenizer():
    """One token for each word of `TEXTS`: with a real vocabulary a tiny Llama computes little but its last layer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=list(special.values())))
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def make_trainer(folder, tokenizer, *, rank=4, texts=TEXTS, micro_batch=2, base_name="", **arguments):
    """The chapter's kind of trainer on a tiny Llama: LoRA, here with dropout; accumulation to 4 rows a step; rows
    grouped by length; an evaluation in the middle; more than two epochs of 5 steps."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(1)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer)))
    base.name_or_path = base_name
    lora = LoraConfig(r=rank, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"input_ids": tokenizer(text).input_ids} for text in texts])
    batch = dict(per_device_train_batch_size=micro_batch, gradient_accumulation_steps=4 // micro_batch)
    steps = dict(max_steps=STEPS, warmup_steps=3, eval_steps=7, use_cpu=True, bf16=False)
    args = SFTConfig(output_dir=folder, **(COMMON | batch | steps | arguments))
    evaluation = rows.select(range(4))
    return SFTTrainer(
        model=get_peft_model(base, lora),
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=evaluation,
        args=args,
    )


def shallow_smollm2(folder, layers=6):
    """SmolLM2 without its upper layers, in a new folder: all that is Unsloth's own, in a fraction of the time."""
    from safetensors.torch import load_file, save_file

    from tests.maintain.smollm2 import prepare_smollm2

    source, upper = prepare_smollm2(), tuple(f"model.layers.{number}." for number in range(layers, 30))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    weights = load_file(source / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(upper)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def make_chapter_trainer(folder, tokenizer, *, checkpointing=False):
    """The calls of chapter 04, on a few of its conversations and with SmolLM2's lowest layers."""
    from unsloth import FastLanguageModel
    from unsloth.chat_templates import standardize_sharegpt, train_on_responses_only

    # isort: split
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    from helpers.template.check import training_text

    model_folder = Path(folder).parent / "shallow"
    if not model_folder.exists():
        shallow_smollm2(model_folder)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(model_folder), max_seq_length=256, dtype=None, load_in_4bit=True
    )
    modules = ["q_proj", "v_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, target_modules=modules, use_gradient_checkpointing=checkpointing, random_state=3407
    )
    file = str(ROOT / "notebooks" / "data" / "support_conversations.jsonl")
    rows = standardize_sharegpt(load_dataset("json", data_files=file, split="train[:20]"), num_proc=1)
    rows = rows.map(lambda row: {"text": training_text(tokenizer, row["conversations"])})
    batch = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=checkpointing)
    data = dict(max_length=256, dataset_text_field="text", dataset_num_proc=1)
    steps = dict(max_steps=4, eval_steps=3, warmup_steps=1, optim="adamw_8bit")
    args = SFTConfig(output_dir=folder, **(COMMON | batch | data | steps))
    evaluation = rows.select(range(4))
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=rows, eval_dataset=evaluation, args=args
    )
    parts = dict(instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n")
    return train_on_responses_only(trainer, **parts)


def digest_of(model) -> str:
    """A sha256 over every bit that is trained."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run(
    make,
    tokenizer,
    *,
    folder,
    result,
    progress,
    checkpoints,
    settings=None,
    interrupt_at=None,
    fill_at=None,
    room=20_000,
    again=None,
    hand_over=False,
    as_nobody=False,
    resume_from="last",
):
    """Train as the chapter does.

    Args:
        folder: where the checkpoints go.
        result: a JSON file, written at the end: weights (a digest), step, losses by step.
        progress: a file that gets a line when a step is done, before it is saved.
        checkpoints: arguments of `Checkpoints`.
        settings: arguments of the function that makes the trainer.
        interrupt_at: press Ctrl-C while this step is computed.
        fill_at: from this step on no file may be longer than `room` bytes, as on a disk that is full. 0: from before
            the checkpoints are looked for.
        again: arguments of `Checkpoints` for a second `train` with the same trainer.
        hand_over: call it at the end.
        as_nobody: train as a user who may write nothing here.
        resume_from: what to give to `train` instead of what `Checkpoints` gave.
    """
    import torch
    from transformers import TrainerCallback

    from helpers.training.checkpoints import CheckpointError, Checkpoints

    class Happenings(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if interrupt_at == state.global_step + 1:
                os.kill(os.getpid(), signal.SIGINT)
            if fill_at == state.global_step + 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

        def on_step_end(self, args, state, control, **kwargs):
            with open(progress, "a") as file:
                file.write(f"{state.global_step}\n")

    trainer = make(folder, tokenizer, **(settings or {}))
    torch.randn(os.getpid() % 100 + 1)  # as after cells that an earlier session did not run
    trainer.add_callback(Happenings())
    keeper = Checkpoints(trainer, **checkpoints)
    if fill_at == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    if as_nobody and os.geteuid() == 0:
        os.setuid(65534)
    try:
        with keeper as last:
            trainer.train(resume_from_checkpoint=last if resume_from == "last" else resume_from)
    except (KeyboardInterrupt, CheckpointError) as error:
        if again is None:
            raise
        print(error)
    if again is not None:
        interrupt_at = None
        keeper = Checkpoints(trainer, **again)
        with keeper as last:
            trainer.train(resume_from_checkpoint=last)
    if hand_over:
        keeper.hand_over()
    losses = {str(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    held_out = trainer.evaluate()["eval_loss"]
    content = dict(weights=digest_of(trainer.model), step=trainer.state.global_step, losses=losses, held_out=held_out)
    Path(result).write_text(json.dumps(content))


def serve(make, tokenizer, replies):
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            output = os.open(job.pop("output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = 1
            try:
                run(make, tokenizer, **job)
                code = 0
            except KeyboardInterrupt as error:
                print(error)
                code = 130
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(child, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they are imported
    unsloth = "--unsloth" in sys.argv
    if unsloth:
        import unsloth  # noqa: F401
    import filelock  # noqa: F401
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401

    torch.set_num_threads(1)  # a fork cannot use its parent's threads
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if unsloth:
        from transformers import AutoTokenizer

        from tests.maintain.smollm2 import prepare_smollm2

        tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2())
    else:
        tokenizer = small_tokenizer()
        with tempfile.TemporaryDirectory() as folder:  # it imports what forks would otherwise import each
            make_trainer(folder, tokenizer)
    gc.freeze()  # else each fork searches, and so copies, all that was imported
    serve(make_chapter_trainer if unsloth else make_trainer, tokenizer, replies)


if __name__ == "__main__":
    main()
