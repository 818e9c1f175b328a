"""Train on every GPU, one process each: the run of chapters 02 to 04. Chapter 08 prepares the folder and starts this.

torchrun --nproc_per_node=2 notebooks/scale_up.py runs/scaled
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.base import InputError, hash_files
from helpers.environment.setup import hide_harmless_warnings
from helpers.handoff import open_run
from helpers.handoff.run import library_versions
from helpers.ranks import meet_ranks, on_first, one_message, rank_and_size, require_equal

os.environ |= {"UNSLOTH_BLOCK_COMPILE": "0", "TQDM_DISABLE": "1"}  # the bars of several processes would mix


def main(run_dir, start_afresh):
    hide_harmless_warnings()
    if rank_and_size()[0] > 0:
        sys.stdout = open(os.devnull, "w")  # the first process, rank 0, speaks and writes
    if not Path(run_dir, "settings.json").is_file():
        fix = "run chapter 08, and give the folder that it has as SCALED_DIR"
        raise InputError(run_dir, found="no settings.json", expected="a folder that chapter 08 has prepared", fix=fix)
    settings = open_run(run_dir).read_json("settings.json")
    training, lora, max_length = settings["training"], settings["lora"], settings["training"]["max_length"]

    # Every process waits here for the others. One with other libraries, settings or data is named.
    state = meet_ranks(library_versions() | hash_files(Path(run_dir, "dataset")) | settings)
    if state.is_main_process:
        run = open_run(run_dir, chapter="04_train", base_model=settings["model"])

    from datasets import load_from_disk
    from unsloth import FastLanguageModel, is_bfloat16_supported  # before transformers, peft and trl: it patches them
    from unsloth.chat_templates import train_on_responses_only
    from transformers import AutoConfig, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from helpers.masking import check_masking
    from helpers.memory import fit_into_memory, plan_batch, track_memory
    from helpers.training import Checkpoints, check_evidence, held_out_losses
    from helpers.training import live_plot, stop_on_divergence, write_report
    from helpers.training.weights import adapter_checksum

    dataset = load_from_disk(f"{run_dir}/dataset")
    tokenizer = AutoTokenizer.from_pretrained(f"{run_dir}/dataset/tokenizer")
    tokens = tokenizer(dataset["train"]["text"], truncation=True, max_length=max_length).input_ids
    config = AutoConfig.from_pretrained(settings["model"])
    plan = plan_batch(config, lengths=[len(ids) for ids in tokens], **settings["plan"])
    plan.raise_if_failed()
    # Each process loads the whole model, on its own GPU.
    model, _ = FastLanguageModel.from_pretrained(
        model_name=settings["model"], max_seq_length=max_length, load_in_4bit=True, device_map={"": str(state.device)}
    )
    model = FastLanguageModel.get_peft_model(model, **lora)
    kind = {"fp16": not is_bfloat16_supported(), "bf16": is_bfloat16_supported()}
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset["train"],
        eval_dataset=dataset["held_out"],
        args=SFTConfig(output_dir=f"{run_dir}/checkpoints", **kind, **training),
    )
    trainer = train_on_responses_only(trainer)

    # Checked once, on all of the data, while the others wait.
    mask_report = on_first(lambda: check_masking(trainer.train_dataset, tokenizer=tokenizer))
    mask_report.raise_if_failed()
    before = on_first(lambda: held_out_losses(model, trainer.eval_dataset))
    print(f"{mask_report}\n{before}")

    plot = live_plot(folder=f"{run_dir}/curves")
    plot.record(0, {"eval_loss": before.loss})
    if state.is_main_process:
        trainer.add_callback(plot)
    trainer.add_callback(stop_on_divergence())
    batches = mask_report.watch(trainer)
    checkpoints = Checkpoints(trainer, every_seconds=settings["every_seconds"], start_afresh=start_afresh)
    fit = fit_into_memory(trainer, plan.checkpointed_layers)
    with track_memory("training") as stage, checkpoints as last_checkpoint, fit as fitting:
        trainer.train(resume_from_checkpoint=last_checkpoint)

    require_equal("an adapter", adapter_checksum(model), fix="train anew: the processes have drifted apart")

    def finish():
        model.save_pretrained(f"{run_dir}/new/adapter")
        tokenizer.save_pretrained(f"{run_dir}/new/adapter")
        run.keep("adapter", template=run.facts("dataset")["template"])
        after = held_out_losses(model, trainer.eval_dataset)
        evidence = check_evidence(
            trainer,
            before=before,
            after=after,
            learning_rate=training["learning_rate"],
            settings={name: training[name] for name in ("max_steps", "max_length", "lr_scheduler_type")},
            rows=run.facts("dataset")["train_rows"],
            batches=batches,
            adapter=f"{run_dir}/adapter",
        )
        stages, held_out = [fitting.rehearsal, fitting.first_step, stage], (before, after)
        proofs = dict(mask_report=mask_report, held_out=held_out, evidence=evidence, resumed_from=checkpoints.step)
        write_report(run, trainer, stages=stages, curves=plot.curves, **proofs)
        print(evidence)
        checkpoints.hand_over()
        evidence.raise_if_failed()

    on_first(finish)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="a run folder that chapter 08 has prepared")
    parser.add_argument("--start-afresh", action="store_true", help="set an interrupted run aside, and begin anew")
    options = parser.parse_args()
    with one_message():
        main(**vars(options))
