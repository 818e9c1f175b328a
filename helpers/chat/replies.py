"""Ask the model: one streamed reply, batches, and a conversation that is trimmed."""

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.base import InputError
from helpers.messages import N_, _

Message = dict[str, str]
_LOCKS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class ChatError(InputError):
    """A conversation that the model cannot answer: too long, or rendered in another way than in training."""


def render_prompt(tokenizer: Any, conversation: Sequence[Message]) -> str:
    """The text that the model continues: the conversation as in training, and the opening of an answer.

    Example:
        >>> render_prompt(tokenizer, [{"role": "user", "content": "Hi "}])
        '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
    """
    from helpers.template.check import adds_bos
    from helpers.template.turns import render

    stripped = [message | {"content": message["content"].strip()} for message in conversation]
    prompt = render(tokenizer, stripped, add_generation_prompt=True)
    bos = tokenizer.bos_token
    if bos and (prompt.startswith(bos * 2) or (adds_bos(tokenizer) and not prompt.startswith(bos))):
        two = prompt.startswith(bos)
        found = _("two {bos} at its start", bos=bos) if two else _("no {bos} at its start", bos=bos)
        fix = _("write one {{ bos_token }} at the start of tokenizer.chat_template")
        raise ChatError(_("prompt"), found=found, expected=_("one such token"), fix=fix)
    return prompt


def encode_prompts(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> Any:
    """Prompts as a batch of tensors: `input_ids` and `attention_mask`, both (conversations, longest prompt).

    Shorter prompts are padded on the *left*, so that every reply starts right after its own prompt, and the attention
    mask hides the padding. The template has written the special tokens: adding them again would double the BOS.
    """
    prompts = [render_prompt(tokenizer, conversation) for conversation in conversations]
    return tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")


def count_tokens(tokenizer: Any, conversation: Sequence[Message]) -> int:
    """How many tokens the prompt for a conversation has; it is only counted, so one that is too long is no mistake."""
    return len(tokenizer(render_prompt(tokenizer, conversation), add_special_tokens=False, verbose=False).input_ids)


def trim_conversation(
    tokenizer: Any, conversation: Sequence[Message], *, max_seq_length: int, max_new_tokens: int
) -> tuple[list[Message], int]:
    """Leave out the oldest turns until the prompt and its reply fit; a turn is left out whole, with its answer.

    The system message and the last question always stay.

    Args:
        conversation: ends with a user's turn.
        max_seq_length: tokens that prompt and reply may have together.
        max_new_tokens: tokens kept free for the reply.

    Returns:
        The conversation that fits, and how many messages were left out.

    Example:
        >>> kept, left_out = trim_conversation(tokenizer, long_conversation, max_seq_length=512, max_new_tokens=96)
    """
    system = [message for message in conversation[:1] if message["role"] == "system"]
    turns = list(conversation[len(system) :])
    total = len(turns)
    while count_tokens(tokenizer, system + turns) + max_new_tokens > max_seq_length:
        later = next((i for i, message in enumerate(turns) if i and message["role"] == "user"), None)
        if later is None:
            tokens = count_tokens(tokenizer, system + turns)
            found = _("{tokens} tokens and {reply} for the reply", tokens=tokens, reply=max_new_tokens)
            expected = _("at most {most} in all", most=max_seq_length)
            fix = _("shorten it, or raise max_seq_length")
            raise ChatError(_("the last question"), found=found, expected=expected, fix=fix)
        turns = turns[later:]
    return system + turns, total - len(turns)


def generating(model: Any) -> threading.RLock:
    """The lock that a model is asked under, one question after another: `with generating(model): …`.

    Two threads (the chat box's, and a cell that you run meanwhile) would mix their replies up, and one would switch the
    other's adapter off. `stream_reply`, `batch_replies` and the box take it; `model.generate` of your own does not.
    """
    return _LOCKS.setdefault(model, threading.RLock())


@dataclass(frozen=True)
class Reply:
    """A reply and how fast it came.

    Attributes:
        text: without special tokens.
        tokens: how many were generated, the end of the turn included.
        seconds_to_first_token: from the call to the first token.
        seconds: from the call to the last one.
        ended_by: "end of turn", "max_new_tokens" or "stop".
    """

    text: str
    tokens: int
    seconds_to_first_token: float
    seconds: float
    ended_by: str

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first one, by the time that they took."""
        return (self.tokens - 1) / max(self.seconds - self.seconds_to_first_token, 1e-9)

    def __repr__(self) -> str:
        told = dict(tokens=self.tokens, first=self.seconds_to_first_token, end=_(self.ended_by))
        if self.tokens > 1:
            told |= dict(speed=self.tokens_per_second)
            return _("{tokens} tokens, the first after {first:.2f} s, {speed:.1f} tokens/s, {end}", **told)
        return _("{tokens} tokens, the first after {first:.2f} s, one token, {end}", **told)


def stream_reply(
    model: Any,
    tokenizer: Any,
    conversation: Sequence[Message],
    *,
    on_text: Callable[[str], None] | None = None,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    min_p: float = 0.0,
    stop: threading.Event | None = None,
) -> Reply:
    """One reply, handed out word by word.

    Args:
        conversation: {"role", "content"} messages, ending with a user's turn.
        on_text: called with each piece of text as soon as it is whole (a character may take several tokens).
        max_new_tokens: the longest reply, in tokens.
        temperature: 0 takes the most likely token each time; more draws, from a flatter distribution the higher it is.
        min_p: when drawing, leaves out tokens that are less than this share as likely as the likeliest.
        stop: set it in another thread to end the reply after the next token.

    Example:
        >>> stream_reply(model, tokenizer, [{"role": "user", "content": "Hi"}])
        9 tokens, the first after 0.08 s, 20.4 tokens/s, end of turn
    """
    import torch
    from transformers import TextStreamer

    start, times, stop = time.perf_counter(), [], stop or threading.Event()

    class Timed(TextStreamer):
        def put(self, value):
            if not self.next_tokens_are_prompt:
                times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False):
            if on_text and text:
                on_text(text)

    prompt = encode_prompts(tokenizer, [conversation]).to(model.device)
    sampling = dict(do_sample=True, temperature=temperature, min_p=min_p) if temperature else dict(do_sample=False)
    ends = stop_tokens(tokenizer, model)
    with generating(model), torch.inference_mode():
        output = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            streamer=Timed(tokenizer, skip_prompt=True, skip_special_tokens=True),
            stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), stop.is_set(), device=ids.device)],
            **sampling,
        )
    new = output[0, prompt["input_ids"].shape[1] :]
    ended_by = N_("end of turn") if new[-1].item() in ends else N_("stop") if stop.is_set() else "max_new_tokens"
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return Reply(text, len(new), times[0] - start, times[-1] - start, ended_by)


def stop_tokens(tokenizer: Any, model: Any) -> list[int]:
    """The token ids that end a reply: those of the model's generation settings, and the tokenizer's end token."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})


def batch_replies(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 8,
) -> list[str]:
    """One greedy reply for each conversation.

    Args:
        conversations: lists of {"role", "content"}, each ending with a user's turn.
        max_new_tokens: the longest reply, in tokens.
        batch_size: conversations generated together; similar lengths are grouped to save padding.
    """
    import torch

    lengths = [count_tokens(tokenizer, conversation) for conversation in conversations]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    replies = [""] * len(order)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = encode_prompts(tokenizer, [conversations[row] for row in rows]).to(model.device)
        with generating(model), torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop_tokens(tokenizer, model),
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            replies[row] = text.strip()
    return replies
