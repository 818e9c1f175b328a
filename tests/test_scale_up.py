"""The run of chapter 04 on several processes: the same rows, the same result, and one message where a process fails.

Two processes on the CPU stand for two GPUs: gloo takes NCCL's place, all else is what runs there.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from helpers.base import ROOT
from helpers.handoff import open_run
from helpers.memory.fit import DoesNotFit, fit_into_memory
from helpers.memory.plan import T4_GIB, predict_peak
from helpers.ranks import RankError, _code, _gpu, cause_of, meet_ranks, one_message, rank_and_size
from helpers.training.checkpoints import compare_settings, settings_of
from helpers.training.order import even_shares, seeded_sampler, whole_rounds, with_empty

STEPS, ROWS, CONVERSATIONS = 20, 21, 4  # of 21 rows four steps of a pass take 4, and the sixth one: a rank has none
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# A network's address is asked for nowhere, and the tests beside this one need the other core.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "100000"}  # a tensor's memory is the system's again once it is gone


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a data set as chapter 03 writes it, of short support conversations."""
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    from helpers.conversations import read_conversations
    from tests.maintain.smollm2 import prepare_smollm2

    folder = tmp_path_factory.mktemp("data") / "dataset"
    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2())
    read, _ = read_conversations(str(ROOT / "notebooks/data/support_conversations.jsonl"), rows=200)
    texts = sorted((tokenizer.apply_chat_template(row["conversations"], tokenize=False) for row in read), key=len)
    train, held_out = texts[: 2 * ROWS : 2], texts[1:9:2]
    parts = {"train": Dataset.from_dict({"text": train}), "held_out": Dataset.from_dict({"text": held_out})}
    DatasetDict(parts).save_to_disk(str(folder))
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def prepare(folder, data, *, micro_batch, every_seconds=300.0, strategy="group_by_length", **others):
    """A run folder as chapter 08 prepares it."""
    from tests.maintain.smollm2 import prepare_smollm2

    model = str(prepare_smollm2())
    run = open_run(folder, base_model=model)
    shutil.copytree(data, folder / "new" / "dataset")
    run.keep("dataset", template="", source={}, dataset="support", train_rows=ROWS)
    training = dict(
        max_steps=STEPS,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        padding_free=False,
        train_sampling_strategy=strategy,
        learning_rate=4e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
        optim="adamw_8bit",
        max_length=256,
        dataset_text_field="text",
        eval_strategy="no",
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        report_to="none",
        seed=3407,
        ddp_find_unused_parameters=False,
    )
    lora = dict(r=16, target_modules=MODULES, lora_alpha=16, lora_dropout=0, bias="none", random_state=3407)
    lora |= {"use_gradient_checkpointing": False}
    plan = dict(micro_batch=micro_batch, accumulation=1, checkpointing=False, padding_free=False, lora_rank=16)
    run.write_json(
        "settings.json",
        {"model": model, "lora": lora, "training": training | others, "plan": plan, "every_seconds": every_seconds},
    )
    return folder


def start(folder, *, processes, environment):
    """The process of a run; `processes` of 1 is the script alone."""
    launch = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    command = [*launch, "notebooks/scale_up.py", str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def train(folder, *, processes=1, fault=None, after=0, environment=()):
    """(status, output, seconds from the fault on) of a run; behind step `after` `fault` gets {rank: process}."""
    lines, steps, began = [], 0, time.monotonic()
    with start(folder, processes=processes, environment=dict(environment)) as process:
        for line in process.stdout:
            lines.append(line)
            steps += "'loss'" in line
            if fault is not None and steps == after:
                ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
                fault({int(rank): child for rank, child in ranks.items() if rank})
                fault, began = None, time.monotonic()
    return process.returncode, "".join(lines), time.monotonic() - began


def log_of(folder, name):
    entries = json.loads((folder / "report.json").read_text())["log"]
    return [entry[name] for entry in entries if name in entry]


def weights(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def on_two(data, tmp_path_factory):
    """A run on two processes that nothing interrupts."""
    folder = prepare(tmp_path_factory.mktemp("two") / "run", data, micro_batch=CONVERSATIONS // 2)
    status, output, _ = train(folder, processes=2)
    assert status == 0, output
    return folder


@pytest.mark.slow
def test_two_processes_train_what_one_does(data, on_two, tmp_path):
    folder = prepare(tmp_path / "run", data, micro_batch=CONVERSATIONS)
    status, output, _ = train(folder)
    assert status == 0, output
    assert log_of(on_two, "loss") == pytest.approx(log_of(folder, "loss"), rel=1e-3)  # 0.5 % is asked for
    assert log_of(on_two, "grad_norm")[0] == pytest.approx(log_of(folder, "grad_norm")[0], rel=1e-3)
    assert len(log_of(folder, "loss")) == STEPS
    claims = {claim: seen for claim, seen, _ in json.loads((on_two / "report.json").read_text())["evidence"]["rows"]}
    assert "in this session 21 of 21 rows" in claims["only checked rows were trained, and no pass left any out"]
    # The hand-off is chapter 04's: the next chapter takes it.
    run = open_run(on_two, chapter="05_infer", base_model=open_run(on_two).read_json("settings.json")["model"])
    assert run.facts("adapter")["chapter"] == "04_train"
    assert (on_two / "curves" / "curves.png").is_file() and (on_two / "report.html").is_file()


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_goes_on(data, on_two, tmp_path):
    folder = prepare(tmp_path / "run", data, micro_batch=CONVERSATIONS // 2, every_seconds=0)
    status, output, seconds = train(folder, processes=2, fault=lambda ranks: ranks[1].kill(), after=15)
    assert status != 0 and seconds < 60
    cause = output[output.index("Root Cause") :]
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", cause) and "SIGKILL" in cause
    assert not (folder / "adapter").exists()
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    status, output, _ = train(folder, processes=2)
    assert status == 0 and re.search(r"Resumed from step 1[45] of 20", output), output
    assert weights(folder) == weights(on_two)  # bit for bit

    run = open_run(other)
    settings = run.read_json("settings.json")
    status, output, _ = train(other)  # two rows a step, on one process
    assert status != 0 and "effective batch was 4, is 2" in output and "Fix: set them back" in output
    settings["training"] |= {"per_device_train_batch_size": CONVERSATIONS}
    run.write_json("settings.json", settings)
    status, output, _ = train(other)
    assert status == 0 and re.search(r"Resumed from step 1[45] of 20", output), output
    assert log_of(other, "loss") == pytest.approx(log_of(on_two, "loss"), rel=1e-3)


@pytest.mark.slow
def test_memory_and_disk_that_run_out_are_named_and_the_run_goes_on(data, on_two, tmp_path):
    folder = prepare(tmp_path / "run", data, micro_batch=CONVERSATIONS // 2, every_seconds=0)

    def no_memory(ranks):
        used = ranks[1].memory_info().vms
        ranks[1].rlimit(psutil.RLIMIT_AS, (used, used))

    status, output, seconds = train(folder, processes=2, fault=no_memory, after=2, environment=RETURNS_MEMORY)
    assert status != 0 and seconds < 60
    assert re.search(r"rank 1 of 2 on \S+: .*(does not fit|alloc)", output[output.index("Root Cause") :]), output

    def full_disk(ranks):
        ranks[0].rlimit(psutil.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    status, output, seconds = train(folder, processes=2, fault=full_disk, after=2)
    assert "could not be saved (" in output and "training goes on, older checkpoints stay" in output
    assert status != 0 and re.search(r"rank 0 of 2 on \S+: .*[Tt]oo large", output[output.index("Root Cause") :]), (
        output
    )
    assert not (folder / "adapter").exists()
    status, output, _ = train(folder, processes=2)
    assert status == 0 and "Resumed from step" in output, output
    assert weights(folder) == weights(on_two)


@pytest.mark.slow
def test_a_host_with_another_version_is_named(data, tmp_path):
    folder = prepare(tmp_path / "run", data, micro_batch=2)
    other = tmp_path / "other" / "peft-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9.9\n")
    port = free_port()
    outputs = hosts(folder, port, environments=[{}, {"PYTHONPATH": str(other.parent)}])
    message = r"rank 1 on \S+: found peft 9.9.9, expected peft \S+, as rank 0 on \S+ has it. Fix: make the hosts alike"
    assert all(re.search(message, output) for output in outputs), outputs
    assert not (folder / "checkpoints").exists()


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def hosts(folder, port, *, environments):
    """The outputs of as many launchers as there are environments, each a host of two with one process."""
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--master-addr=localhost", f"--master-port={port}"]
    script = ["--rdzv-conf=timeout=10", "notebooks/scale_up.py", str(folder)]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = [
        subprocess.Popen([*command, f"--node-rank={number}", *script], env=ENVIRONMENT | environment, **options)
        for number, environment in enumerate(environments)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert all(process.returncode for process in started)
    return outputs


@pytest.mark.slow
def test_a_host_that_never_starts_ends_the_wait(tmp_path):
    [output] = hosts(tmp_path, free_port(), environments=[{}])
    assert "1/2 clients joined" in output


def run_ranks(tmp_path, body, *, processes=2):
    """What a small script prints and its status, on so many processes."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, time\nfrom helpers.ranks import *\nrank, size = rank_and_size()\n{textwrap.dedent(body)}"
    )
    command = [*TORCHRUN, f"--nproc_per_node={processes}", str(script)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_launcher_that_cannot_be_reached_and_a_gpu_that_is_not_there_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RankError, match=r"localhost:\d+: found .*, expected the first host's launcher. Fix: give each"):
        meet_ranks({}, seconds=1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RankError, match="found 2 GPUs for more processes, .* Fix: start 2 processes on this host"):
        _gpu()


def test_another_version_of_the_series_is_another_code(monkeypatch, tmp_path):
    for folder in ("helpers", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    here = _code()
    monkeypatch.setattr("helpers.ranks.ROOT", tmp_path)
    assert _code() == here
    with open(tmp_path / "helpers" / "base.py", "a", encoding="utf-8") as file:
        file.write("# changed")
    assert _code() != here


def test_a_rank_that_does_not_come_is_named(tmp_path):
    status, _, errors = run_ranks(
        tmp_path,
        """
        if rank == 1:
            time.sleep(100)
        with one_message():
            meet_ranks({}, seconds=2)
        """,
    )
    assert status and re.search(
        r"rank 0 of 2 on \S+: rank 1: found no sign of it within 2 s, expected all ranks", errors
    )


def test_ranks_agree(tmp_path):
    status, output, errors = run_ranks(
        tmp_path,
        """
        def fail():
            if rank == 1:
                raise OSError(28, "No space left on device")
        def computed():
            return "once" if rank == 0 else 1 / 0
        meet_ranks({})
        lines = [on_first(computed), on_all(rank), first_failure(fail), first_failure(lambda: None)]
        require_equal("a sum", 1, fix="-")
        print(f"{lines}\\n", end="", flush=True)
        with one_message():
            require_equal("a sum", rank, fix="train anew")
        """,
    )
    assert output.splitlines() == ["['once', [0, 1], 'No space left on device', '']"] * 2, errors
    assert status and "rank 1: found a sum 1, expected 0, as on rank 0. Fix: train anew." in errors


def test_the_rank_that_failed_first_is_the_cause(tmp_path):
    """The other one's next exchange fails too, at once."""
    status, _, errors = run_ranks(
        tmp_path,
        """
        meet_ranks({})
        with one_message():
            if rank == 1:
                raise MemoryError("no room")
            on_all(rank)
        """,
    )
    cause = errors[errors.index("Root Cause") :]
    assert status and re.search(r"rank 1 of 2 on \S+: MemoryError: no room", cause)


def test_one_process_is_as_ever():
    assert rank_and_size() == (0, 1)
    with pytest.raises(ZeroDivisionError), one_message():
        raise ZeroDivisionError
    child = "from helpers.ranks import *; from helpers.base import InputError\nwith one_message(): raise "
    error = 'InputError("X", found="1", expected="2", fix="set it")'
    done = subprocess.run([sys.executable, "-c", child + error], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "X: found 1, expected 2. Fix: set it.\n"


def start_here(tmp_path, command, *, interrupt=False):
    """(status, output, errors) of a process that starts a command as chapter 08 does, with a bare PATH."""
    code = f"from helpers.ranks import start\nstart({command!r})"
    environment = ENVIRONMENT | {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    options = dict(cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **options) as process:
        if interrupt:
            assert process.stdout.readline() == "step 3\n"
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_the_message_of_the_rank_that_failed_is_what_start_ends_with(tmp_path):
    (tmp_path / "fail.py").write_text("""
from helpers.base import InputError
from helpers.ranks import one_message, rank_and_size
print("begun")
with one_message():
    if rank_and_size()[0] == 1:
        raise InputError("the disk", found="no room", expected="room", fix="free some")
    import time; time.sleep(60)
""")
    status, output, errors = start_here(tmp_path, "torchrun --nproc_per_node=2 fail.py")
    last = errors.strip().splitlines()[-1]
    assert status and output.count("begun") == 2 and "Traceback" not in output
    assert re.search(
        r"RankError: torchrun: found rank 1 of 2 on \S+: the disk: found no room, .*Fix: free some, ", last
    )
    assert "run the cell again: it goes on" in last
    status, _, errors = start_here(tmp_path, "no-such-program at all")
    assert status and "found" in errors.splitlines()[-1] and "no-such-program" in errors.splitlines()[-1]
    assert start_here(tmp_path, "torchrun --help")[0] == 0


def test_a_signal_that_ended_a_rank_is_named():
    lines = ["Root Cause (first observed failure):\n", "[0]:\n", "  rank      : 1 (local_rank: 1)\n"]
    lines += ["  exitcode  : -9 (pid: 8608)  (SIGKILL)\n"]
    assert cause_of(lines) == "rank 1, ended by SIGKILL"
    gone = "rank 0 of 2 on a: another rank has gone: RuntimeError: Connection closed by peer\n"
    assert cause_of([gone, *lines]) == "rank 1, ended by SIGKILL"
    assert cause_of([gone, "rank 1 of 2 on a: the disk is full.\n", *lines]) == "rank 1 of 2 on a: the disk is full"
    assert cause_of([gone]).startswith("rank 0 of 2 on a: another rank has gone") and cause_of([]) == "no message"


def test_stop_is_passed_on_once_and_the_processes_save(tmp_path):
    (tmp_path / "train.py").write_text("""
import signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
print("step 3", flush=True)
while not asked:
    time.sleep(0.05)
time.sleep(1)
print(f"saved, asked {len(asked)} times", flush=True)
sys.exit(130)
""")
    status, output, errors = start_here(tmp_path, f"{sys.executable} train.py", interrupt=True)
    assert "saved, asked 1 times" in output
    assert status and "KeyboardInterrupt: stopped; run the cell again to go on" in errors.splitlines()[-1]


def test_a_batch_that_does_not_fit_is_not_split_by_one_rank_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = torch.nn.Linear(1, 1)
    model.device, model.dtype = torch.device("cuda"), torch.float16
    trainer = SimpleNamespace(model=model, training_step=step, prediction_step=step, add_callback=lambda each: None)
    trainer.remove_callback, trainer.args = trainer.add_callback, SimpleNamespace(per_device_train_batch_size=2)
    with (
        fit_into_memory(trainer),
        pytest.raises(DoesNotFit, match="size 2 on rank 1: found a batch of 6 tokens.*MICRO_BATCH below it"),
    ):
        trainer.training_step(model, {"input_ids": torch.zeros(2, 3)}, 1)


def shares_of_each_step(processes, *, hooked=True, strategy="group_by_length", padding_free=False, epoch=1, skipped=0):
    """Each process's rows of each step of a pass, by number, as Accelerate deals them out.

    `skipped`: of a pass that is resumed behind so many steps.
    """
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from datasets import Dataset
    from torch.utils.data import DataLoader, RandomSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = [tokens_of(number) for number in range(ROWS)]
    data = Dataset.from_dict({"input_ids": [[n] * length for n, length in enumerate(lengths)], "labels": [[5]] * ROWS})
    each = CONVERSATIONS // processes
    args = SimpleNamespace(world_size=processes, train_batch_size=each, dataloader_drop_last=False, seed=3407)
    args.padding_free = padding_free
    trainer = SimpleNamespace(train_dataset=data, args=args)

    def plain(rows):
        return LengthGroupedSampler(each, rows) if strategy == "group_by_length" else RandomSampler(rows)

    def of_rank(rank):
        def make():
            rows = trainer.train_dataset
            order = seeded_sampler(plain, rows, ROWS, args) if hooked else plain(rows)
            if not hooked:
                order.generator = torch.Generator().manual_seed(args.seed + epoch)
            loader = DataLoader(rows, batch_size=each, sampler=order, collate_fn=list)
            return prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)

        loader = whole_rounds(make, trainer) if hooked else make()
        loader = skip_first_batches(loader, skipped) if skipped else loader  # first, as the trainer does
        loader.set_epoch(epoch)
        return iter(loader.batch_sampler)

    steps = list(zip(*map(of_rank, range(processes)), strict=True))
    assert trainer.train_dataset is data
    return steps


def rows_of_each_step(processes, **options):
    """The rows of each step, whoever has them, without those that fill the last round."""
    steps = shares_of_each_step(processes, **options)
    return [sorted(number for share in step for number in share if number < ROWS) for step in steps]


def tokens_of(number):
    return 3 + 7 * number % 11


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_of_a_step_are_those_of_one_process(processes, strategy, padding_free):
    options = {"strategy": strategy, "padding_free": padding_free}
    whole = rows_of_each_step(1, **options)
    assert rows_of_each_step(processes, **options) == whole
    assert rows_of_each_step(processes, **options, skipped=2) == whole[2:]
    assert sorted(number for step in whole for number in step) == list(range(ROWS))
    assert rows_of_each_step(processes, **options, epoch=2) != whole


def test_without_padding_the_processes_get_nearly_equally_many_tokens():
    def wait(**options):
        """Tokens by which the fullest process of a step exceeds the other, over all steps but the filled one."""
        each = [[sum(map(tokens_of, share)) for share in step] for step in shares_of_each_step(2, **options)[:-1]]
        return sum(max(step) - min(step) for step in each)

    drawn, even = wait(strategy="random"), wait(strategy="random", padding_free=True)
    assert even < drawn / 2


def test_shares_keep_rounds_and_sizes():
    lengths = [9, 8, 2, 1, 5, 5, 5, 50, 3]
    assert even_shares([0, 1, 2, 3], lengths, batch=2, processes=2) == [0, 3, 1, 2]
    # The longest row fills no second place before the others have theirs; what makes no whole round stays as it is.
    assert even_shares([7, 4, 5, 6, 8, 0], lengths, batch=2, processes=2) == [7, 6, 4, 5, 8, 0]
    assert even_shares(range(8), lengths, batch=1, processes=4) == [0, 1, 2, 3, 7, 4, 5, 6]


def test_without_the_hooks_they_are_not():
    assert rows_of_each_step(2, hooked=False) != rows_of_each_step(1, hooked=False)
    twice = [number for step in rows_of_each_step(2, hooked=False) for number in step]
    assert len(twice) > ROWS  # Accelerate fills the last round with rows that came before


def test_with_dropout_another_number_of_processes_is_another_run():
    from datasets import Dataset

    def settings(processes, dropout):
        sizes = {"per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 1}
        args = SimpleNamespace(to_dict=lambda: dict(sizes), world_size=processes)
        lora = SimpleNamespace(base_model_name_or_path="", lora_dropout=dropout)
        model = SimpleNamespace(peft_config={"default": lora})
        rows = Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]})
        return settings_of(SimpleNamespace(args=args, model=model, train_dataset=rows))

    assert compare_settings(settings(1, 0), settings(2, 0)) == []
    assert compare_settings(settings(1, 0.1), settings(2, 0.1)) == ["processes was None, is 2"]
    assert compare_settings(settings(4, 0.1), settings(1, 0.1)) == ["processes was 4, is None"]


def test_rows_that_fill_a_round_train_nothing():
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[-100, 2, 3], [-100, 5]]})
    filled = with_empty(data, 2)
    assert filled[:2] == data[:] and filled[2] == filled[3] == {"input_ids": [4, 5], "labels": [-100, -100]}


def test_the_figures_on_the_page_are_those_of_the_formulas():
    from transformers import LlamaConfig

    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    from scaling import LORA, all_reduce_seconds

    page = (ROOT / "notebooks" / "src" / "08_scale_up.py").read_text(encoding="utf-8")
    for link, name in (("PCIe 3", "PCIe 3, the slots"), ("Ethernet 10 Gbit/s", "a network of 10 Gbit/s")):
        two, eight = (round(1000 * all_reduce_seconds(LORA["3B"], gpus=gpus, link=link)) for gpus in (2, 8))
        assert re.search(rf"{re.escape(name)}.* \| {two} ms \| {eight} ms \|", page)
    assert all_reduce_seconds(LORA["3B"], gpus=8, link="NVLink") < 1e-3
    shapes = {
        "Llama 3.2 3B": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24),
        "Llama 3.1 8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
        "Llama 3.3 70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    }
    for name, shape in shapes.items():
        tied = name.endswith("3B")
        config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied, **shape)
        whole = dict(lora_rank=16, use_gradient_checkpointing=True, triton_loss=True)
        figures = [f"{predict_peak(config, tokens=tokens, **whole):.1f}" for tokens in (2048, 8192, 32768)]
        assert f"| {name} | {' | '.join(figures)} |" in page
        if name.endswith("8B"):  # "up to 16,000 tokens"
            fits = [predict_peak(config, tokens=tokens, **whole) <= 0.9 * T4_GIB for tokens in (16_000, 20_000)]
            assert fits == [True, False]
    weights = predict_peak(config, tokens=1, **whole)
    divided = [f"{weights / gpus + float(figures[0]) - weights:.1f}" for gpus in (4, 8)]
    assert "41.9 are weights" in page and [f"{weights:.1f}", *divided] == ["41.9", "13.7", "8.4"]


@pytest.mark.slow
def test_make_train_runs_on_two_processes():
    done = subprocess.run(["make", "--silent", "train", "PROCESSES=2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout


def test_the_script_says_what_it_needs(tmp_path):
    done = subprocess.run([sys.executable, "notebooks/scale_up.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "run_dir" in done.stderr
    command = [sys.executable, "notebooks/scale_up.py", str(tmp_path / "empty")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "empty: found no settings.json, expected a folder that chapter 08" in done.stderr
    assert not (tmp_path / "empty").exists()
