"""Ask a saved model in a process that has nothing but its files."""

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.base import ROOT
from helpers.chat.replies import Message, batch_replies, render_prompt, stop_tokens
from helpers.export.gguf import bound_process, serve_gguf
from helpers.export.plan import ExportError
from helpers.messages import _

FIRST_TOKENS = 32  # how much of each greedy reply is compared token by token
SCORED_TOKENS = 64  # how much of each held-out answer is scored
TOP_TOKENS = 100  # how many candidates a server is asked for at each scored token
TIED_TOKENS = 8  # candidates that are looked at for a tie
END = -1  # stands for whichever token ends a reply


@dataclass(frozen=True)
class Probe:
    """What one form of the model said about the held-out conversations.

    Attributes:
        replies: its greedy replies, one a conversation.
        log_probs: for each held-out answer, the log-probability of each of its tokens.
        distributions: the same for every token of the vocabulary, an array (tokens, vocabulary) an answer; or none.
        stops: the ids that end a reply; or none.
        rivals: for each token of each reply and for its end, the best tokens in its place, {token: how many logits it
            is from the one that was taken}, with the reply's end as `END`; or none.
    """

    replies: tuple[str, ...]
    log_probs: tuple[tuple[float, ...], ...]
    distributions: tuple[Any, ...] = field(default=(), repr=False)
    rivals: tuple[tuple[dict[int, float], ...], ...] = field(default=(), repr=False)
    stops: tuple[int, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability over all tokens of the held-out answers."""
        values = [value for answer in self.log_probs for value in answer]
        return math.exp(-sum(values) / len(values))


def held_out_answer(tokenizer: Any, model_stops: Sequence[int], conversation: Sequence[Message]) -> tuple[list, list]:
    """(prompt ids, answer ids) of a conversation that ends with an answer; the token that ends it is counted.

    Example: user "Hi", assistant "Hello." -> ids of "…<|im_start|>assistant\\n", ids of "Hello.<|im_end|>"
    """
    prompt = render_prompt(tokenizer, conversation[:-1])
    whole = prompt + conversation[-1]["content"].strip()
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(whole, add_special_tokens=False).input_ids[len(prompt_ids) :]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in model_stops else model_stops[0]
    return prompt_ids, [*answer_ids, end][:SCORED_TOKENS]


def probe_model(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 96,
    with_rivals: bool = True,
) -> Probe:
    """Ask a loaded model for its replies, and how likely it finds the held-out answers.

    Args:
        conversations: held-out ones, each ending with an answer.
        max_new_tokens: the longest reply.
        with_rivals: look for near ties, which only the model that others are held against needs.

    Raises:
        ExportError: the weights of the model that others are held against are quantised, so that a merge would keep
            their rounding errors.
    """
    if with_rivals and getattr(model.config, "quantization_config", None):
        found, expected = _("quantised weights"), _("16-bit ones to merge into")
        raise ExportError(_("the model"), found=found, expected=expected, fix=_("load it with load_in_4bit=False"))
    stops = stop_tokens(tokenizer, model)
    replies = batch_replies(model, tokenizer, [turns[:-1] for turns in conversations], max_new_tokens=max_new_tokens)
    chosen, distributions, rivals = [], [], []
    for turns, reply in zip(conversations, replies, strict=True):
        prompt_ids, answer_ids = held_out_answer(tokenizer, stops, turns)
        distribution = _next_tokens(model, prompt_ids, answer_ids).log_softmax(-1)
        distributions.append(distribution.numpy())
        chosen.append(tuple(distribution[range(len(answer_ids)), answer_ids].tolist()))
        if with_rivals:
            rivals.append(_rivals(model, prompt_ids, reply_tokens(tokenizer, reply), stops))
    return Probe(tuple(replies), tuple(chosen), tuple(distributions), tuple(rivals), tuple(stops))


def _rivals(
    model: Any, prompt_ids: list[int], reply_ids: list[int], stops: Sequence[int]
) -> tuple[dict[int, float], ...]:
    import torch

    logits = _next_tokens(model, prompt_ids, [*reply_ids, END])
    ends = logits[:, list(stops)].amax(1)
    taken = torch.cat([logits[torch.arange(len(reply_ids)), torch.tensor(reply_ids, dtype=torch.long)], ends[-1:]])
    best = logits.topk(TIED_TOKENS)
    gaps, end_gaps = (best.values - taken[:, None]).abs().tolist(), (ends - taken).abs().tolist()
    places = zip(best.indices.tolist(), gaps, end_gaps, strict=True)
    return tuple(dict(zip(tokens, gap, strict=True)) | {END: end_gap} for tokens, gap, end_gap in places)


def reply_tokens(tokenizer: Any, reply: str) -> list[int]:
    """The token ids of a reply, without the one that ended it."""
    return tokenizer(reply, add_special_tokens=False).input_ids


def _next_tokens(model: Any, prompt_ids: list[int], continuation: list[int]) -> Any:
    """The logits before each token of a continuation: float32, (tokens, vocabulary), on the CPU."""
    import torch

    ids = torch.tensor([prompt_ids + continuation[:-1]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0, len(prompt_ids) - 1 :].float().cpu()


@dataclass(frozen=True)
class SavedForm:
    """How a fresh process loads a form of the model.

    Attributes:
        folder: what `save_pretrained` or `save_pretrained_merged` wrote.
        library: "unsloth" (also for an adapter) or "transformers" (a whole model, without Unsloth).
        load_in_4bit: whether Unsloth rounds the base to 4 bits.
    """

    folder: str | Path
    library: str = "unsloth"
    load_in_4bit: bool = False


def probe_in_fresh_processes(
    forms: Mapping[str, SavedForm],
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 96,
    timeout_seconds: float = 900,
) -> dict[str, Probe]:
    """Load saved models in new Python processes and probe them there, never two models at once.

    Forms of the same folder and library share a process, which loads one after the other. All processes start at once,
    because to import Unsloth takes most of a minute; each gets its jobs when the one before it has ended.

    Args:
        forms: {name: how it is loaded}.
        timeout_seconds: how long a form may take; forms that share a process have the sum.

    Raises:
        ExportError: a process failed, and its last words are in the message, or took too long. No process is left.
    """
    groups: dict[tuple[str, str], dict[str, SavedForm]] = {}
    for name, form in forms.items():
        groups.setdefault((str(form.folder), form.library), {})[name] = form
    question = {"conversations": [list(turns) for turns in conversations], "max_new_tokens": max_new_tokens}
    probes: dict[str, Probe] = {}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_fresh_process(library)) for _, library in groups]
        for (process, scratch), group in zip(processes, groups.values(), strict=True):
            probes |= _ask(process, scratch, group, question, timeout_seconds * len(group))
    return {name: probes[name] for name in forms}


@contextlib.contextmanager
def _fresh_process(library: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A process that imports a library and waits for its jobs, and its scratch folder; both are gone afterwards.

    What it prints goes to a file: nobody reads along while it waits, and a full pipe would stop it.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        open(Path(folder) / "stderr", "wb") as last_words,
        bound_process(
            [sys.executable, "-m", "helpers.export.probe", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=last_words,
            text=True,
            encoding="utf-8",
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        ) as process,
    ):
        yield process, Path(folder)


def _ask(
    process: subprocess.Popen,
    scratch: Path,
    forms: Mapping[str, SavedForm],
    question: Mapping[str, Any],
    timeout_seconds: float,
) -> dict[str, Probe]:
    """Give a waiting process its jobs, one a form, and read its answers when it has ended."""
    answers = {name: scratch / str(number) for number, name in enumerate(forms)}
    jobs = [
        {"folder": str(form.folder), "load_in_4bit": form.load_in_4bit, "answer": str(answers[name]), **question}
        for name, form in forms.items()
    ]
    try:
        process.communicate(json.dumps(jobs), timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        found, expected = _("no answer in {limit:.0f} s", limit=timeout_seconds), _("an answer")
        fix = _("allow more, or ask fewer questions")
        raise ExportError(_unanswered(forms, answers), found=found, expected=expected, fix=fix) from None
    if process.returncode:
        words = (scratch / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        found = words[-1] if words else _("an end with {status} and no word", status=process.returncode)
        expected = _("a model that loads and answers")
        fix = _("save it again; the process's own message is quoted here")
        raise ExportError(_unanswered(forms, answers), found=found, expected=expected, fix=fix)
    return {name: _read_answer(answer) for name, answer in answers.items()}


def _unanswered(forms: Mapping[str, SavedForm], answers: Mapping[str, Path]) -> str:
    """The first form without an answer, and its folder."""
    name = next((name for name, answer in answers.items() if not (answer / "said.json").exists()), list(forms)[-1])
    return f"{name} ({forms[name].folder})"


def _read_answer(answer: Path) -> Probe:
    import numpy as np

    said = json.loads((answer / "said.json").read_text(encoding="utf-8"))
    arrays = tuple(np.load(answer / f"{row}.npy") for row in range(len(said["replies"])))
    return Probe(tuple(said["replies"]), tuple(map(tuple, said["log_probs"])), arrays)


def _import_library(library: str) -> Callable[[Mapping[str, Any]], tuple[Any, Any]]:
    """Import what a fresh process needs; returns how (model, tokenizer) of a job are loaded with it."""
    if library == "unsloth":
        from unsloth import FastLanguageModel

        def load(job: Mapping[str, Any]) -> tuple[Any, Any]:
            model, tokenizer = FastLanguageModel.from_pretrained(
                job["folder"], max_seq_length=2048, dtype=None, load_in_4bit=job["load_in_4bit"]
            )
            FastLanguageModel.for_inference(model)
            return model, tokenizer

    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def load(job: Mapping[str, Any]) -> tuple[Any, Any]:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype="auto").to(device).eval()
            return model, AutoTokenizer.from_pretrained(job["folder"])

    return load


def _probe_job(load: Callable[[Mapping[str, Any]], tuple[Any, Any]], job: Mapping[str, Any]) -> None:
    """The fresh process's work for a form: load, ask, leave the answer in files, and free the memory."""
    import numpy as np
    import torch

    model, tokenizer = load(job)
    probe = probe_model(model, tokenizer, job["conversations"], max_new_tokens=job["max_new_tokens"], with_rivals=False)
    answer = Path(job["answer"])
    answer.mkdir()
    for row, distribution in enumerate(probe.distributions):
        np.save(answer / f"{row}.npy", distribution)
    said = {"replies": probe.replies, "log_probs": probe.log_probs}
    (answer / "said.json").write_text(json.dumps(said), encoding="utf-8")
    del model
    gc.collect()
    torch.cuda.empty_cache()


def probe_gguf(
    file: str | Path,
    conversations: Sequence[Sequence[Message]],
    *,
    tokenizer: Any,
    model_stops: Sequence[int],
    max_new_tokens: int = 96,
) -> Probe:
    """Serve a GGUF file with `llama-server` and ask it through the OpenAI client, as a user of the file would.

    The held-out answers are scored token by token: the server says what it would say next, and how likely.

    Args:
        tokenizer: the one that the model was trained with.
        model_stops: `stop_tokens(tokenizer, model)`.

    Raises:
        ExportError: the server renders a conversation in another way than the tokenizer does.
        GgufError: the server does not serve.
    """
    longest = max(len(held_out_answer(tokenizer, model_stops, turns)[0]) for turns in conversations)
    replies, scored = [], []
    with serve_gguf(file, context_tokens=longest + max(max_new_tokens, SCORED_TOKENS) + 8) as server:
        for turns in conversations:
            check_rendering(server, tokenizer, turns[:-1])
            messages = [message | {"content": message["content"].strip()} for message in turns[:-1]]
            answer = server.client.chat.completions.create(
                model="tuned", messages=messages, temperature=0, max_tokens=max_new_tokens
            )
            replies.append(answer.choices[0].message.content.strip())
        for turns in conversations:
            prompt_ids, answer_ids = held_out_answer(tokenizer, model_stops, turns)
            tokens = range(len(answer_ids))
            scored.append(tuple(_score_next(server, prompt_ids + answer_ids[:i], answer_ids[i]) for i in tokens))
    return Probe(tuple(replies), tuple(scored))


def _score_next(server: Any, ids: list[int], token: int) -> float:
    """The log-probability that the server gives a token after others: among its best, else among all."""
    for top in (TOP_TOKENS, 1_000_000):
        answer = server.client.completions.create(
            model="tuned", prompt=ids, max_tokens=1, temperature=0, logprobs=top, extra_body={"cache_prompt": True}
        )
        candidates = answer.choices[0].logprobs.content[0]["top_logprobs"]
        for candidate in candidates:
            if candidate["id"] == token:
                return candidate["logprob"]
    found, expected = _("no token {token}", token=token), _("the tokenizer's vocabulary")
    raise ExportError("llama-server", found=found, expected=expected, fix=_("export it"))


def check_rendering(server: Any, tokenizer: Any, conversation: Sequence[Message]) -> None:
    """Make sure that a server makes the same prompt of a conversation as the tokenizer: the text, and its tokens.

    Raises:
        ExportError: it does not; both are in the message.
    """
    messages = [message | {"content": message["content"].strip()} for message in conversation]
    ours, theirs = render_prompt(tokenizer, messages), server.post("/apply-template", {"messages": messages})["prompt"]
    bos = tokenizer.bos_token or ""
    fix = _("export the tokenizer that the model was trained with")
    if theirs not in (ours, ours.removeprefix(bos)):
        raise ExportError(_("the GGUF file's template"), found=repr(theirs), expected=repr(ours), fix=fix)
    expected = tokenizer(ours, add_special_tokens=False).input_ids
    question = {"content": theirs, "add_special": True, "parse_special": True}
    found = server.post("/tokenize", question)["tokens"]
    if found != expected:
        raise ExportError(_("the GGUF file's tokens"), found=str(found[:12]), expected=str(expected[:12]), fix=fix)


def main() -> None:
    """The fresh process: its library is the argument; JSON jobs come on standard input once it may load a model."""
    gc.disable()  # nothing that is imported is garbage: searching it all again and again took a fifth of the time
    load = _import_library(sys.argv[1])
    gc.enable()
    gc.freeze()
    for job in json.load(sys.stdin):
        _probe_job(load, job)


if __name__ == "__main__":
    main()
