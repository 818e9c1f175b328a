"""Ask the model: single and batched replies, and two models' answers side by side."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]


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

    Prompts of a batch are padded on the *left*, so that every reply starts right after its own prompt, and the
    attention mask hides the padding.

    Args:
        conversations: lists of {"role", "content"}, each ending with a user's turn.
        max_new_tokens: the longest reply, in tokens.
        batch_size: conversations generated together; similar lengths are grouped to save padding.

    Returns:
        The replies in the order of the conversations, without special tokens.
    """
    import torch

    prompts = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) for turns in conversations
    ]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    replies = [""] * len(prompts)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            # The template has written the special tokens already: adding them again would double the BOS.
            batch = tokenizer(
                [prompts[row] for row in rows], padding=True, add_special_tokens=False, return_tensors="pt"
            )
            batch = batch.to(model.device)
            with torch.inference_mode():
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
    finally:
        tokenizer.padding_side = side
    return replies


@dataclass(frozen=True)
class Comparison:
    """The same prompts answered twice: rows of (prompt, first answer, second answer), and the two columns' names."""

    rows: tuple[tuple[str, str, str], ...]
    names: tuple[str, str]

    def __repr__(self) -> str:
        blocks = [
            f"[{number}] {prompt}\n  {self.names[0]}: {first}\n  {self.names[1]}: {second}"
            for number, (prompt, first, second) in enumerate(self.rows, 1)
        ]
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in ("prompt", *self.names))
        cell = "<td style='text-align:left;vertical-align:top;white-space:pre-wrap;max-width:24em'>{}</td>"
        body = "".join("<tr>" + "".join(cell.format(html.escape(text)) for text in row) + "</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def compare_replies(
    conversations: Sequence[Sequence[Message]],
    first: Sequence[str],
    second: Sequence[str],
    *,
    names: tuple[str, str] = ("before", "after"),
) -> Comparison:
    """Put two replies to the same prompts side by side; the prompt shown is the last user turn."""
    prompts = [turns[-1]["content"] for turns in conversations]
    return Comparison(tuple(zip(prompts, first, second, strict=True)), names)
