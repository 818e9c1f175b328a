"""Train on every GPU: the run of chapters 02 to 04 with one process a GPU. Chapter 08 prepares the folder, and starts it.

    torchrun --nproc_per_node=2 notebooks/scale_up.py runs/scaled
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.base import hash_files
from helpers.handoff import open_run
from helpers.handoff.run import library_versions
from helpers.ranks import meet_ranks, on_first, one_message, require_equal

RUN_DIR = sys.argv[1]  # holds dataset/ and settings.json


def main():
    # Every process waits for the others here. One with other libraries, settings or data is named.
    settings_file, dataset_files = Path(RUN_DIR, "settings.json"), hash_files(Path(RUN_DIR, "dataset"))
    state = meet_ranks(library_versions() | {"settings": settings_file.read_text()} | dataset_files)
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # one of them speaks
    settings = json.loads(settings_file.read_text())
    if state.is_main_process:
        run = open_run(RUN_DIR, chapter="04_train", base_model=settings["model"], drive=settings["drive"])

    os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
    from datasets import load_from_disk
    from unsloth import FastLanguageModel
    from unsloth.chat_templates import train_on_responses_only
    from transformers import AutoConfig, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from helpers.masking import check_masking
    from helpers.memory import fit_into_memory, plan_batch, track_memory
    from helpers.training import Checkpoints, check_evidence, held_out_losses, live_plot, stop_on_divergence, write_report
    from helpers.training.weights import adapter_checksum

    # What chapters 02 and 04 load, on this process's own GPU.
    dataset = load_from_disk(f"{RUN_DIR}/dataset")
    tokenizer = AutoTokenizer.from_pretrained(f"{RUN_DIR}/dataset/tokenizer")
    training, lora, max_length = settings["training"], settings["lora"], settings["training"]["max_length"]
    plan = plan_batch(
        AutoConfig.from_pretrained(settings["model"]),
        lengths=[len(ids) for ids in tokenizer(dataset["train"]["text"], truncation=True, max_length=max_length).input_ids],
        micro_batch=training["per_device_train_batch_size"],
        accumulation=training["gradient_accumulation_steps"],
        checkpointing=lora["use_gradient_checkpointing"],
        padding_free=training["padding_free"],
        lora_rank=lora["r"],
    )
    plan.raise_if_failed()
    model, _ = FastLanguageModel.from_pretrained(
        model_name=settings["model"], max_seq_length=max_length, load_in_4bit=True, device_map={"": str(state.device)}
    )
    model = FastLanguageModel.get_peft_model(model, **lora)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset["train"],
        eval_dataset=dataset["held_out"],
        args=SFTConfig(output_dir=f"{RUN_DIR}/checkpoints", **training),
    )
    trainer = train_on_responses_only(trainer)

    # Checked once, on all of the data, while the others wait.
    mask_report = on_first(lambda: check_masking(trainer.train_dataset, tokenizer=tokenizer))
    mask_report.raise_if_failed()
    before = on_first(lambda: held_out_losses(model, trainer.eval_dataset))
    print(f"{mask_report}\n{before}")

    plot = live_plot(folder=f"{RUN_DIR}/curves")
    plot.record(0, {"eval_loss": before.loss})
    if state.is_main_process:
        trainer.add_callback(plot)
    trainer.add_callback(stop_on_divergence())
    batches = mask_report.watch(trainer)
    checkpoints = Checkpoints(trainer, mirror=settings["drive"], every_seconds=300)
    fit = fit_into_memory(trainer, plan.checkpointed_layers)
    with track_memory("training") as stage, checkpoints as last_checkpoint, fit as fitting:
        trainer.train(resume_from_checkpoint=last_checkpoint)

    require_equal("an adapter", adapter_checksum(model), fix="train anew: the processes have drifted apart")
    if state.is_main_process:
        model.save_pretrained(f"{RUN_DIR}/new/adapter")
        tokenizer.save_pretrained(f"{RUN_DIR}/new/adapter")
        run.keep("adapter", template=run.facts("dataset")["template"])
        after = held_out_losses(model, trainer.eval_dataset)
        names = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "lr_scheduler_type")
        evidence = check_evidence(
            trainer,
            before=before,
            after=after,
            learning_rate=training["learning_rate"],
            settings={name: training[name] for name in names},
            rows=run.facts("dataset")["train_rows"],
            batches=batches,
            adapter=f"{RUN_DIR}/adapter",
        )
        write_report(
            run,
            trainer,
            stages=[fitting.rehearsal, fitting.first_step, stage],
            curves=plot.curves,
            mask_report=mask_report,
            held_out=(before, after),
            evidence=evidence,
            resumed_from=checkpoints.step,
        )
        print(evidence)
        checkpoints.hand_over()
        evidence.raise_if_failed()
    state.wait_for_everyone()


if __name__ == "__main__":
    with one_message():
        main()
