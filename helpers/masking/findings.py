"""The faults of a mask in a reader's words: what they are called, one row of each quoted, and the fix that fits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from helpers.masking.rows import ids_of
from helpers.messages import N_, _
from helpers.template.turns import TokenBytes, Turns

# In the order in which they are blamed: each may cause those behind it.
CHECKS = {
    "no_template": ("rows", N_("no answer of this chat template in any row")),
    "label_mismatch": ("tokens", N_("trained labels that differ from their input ids")),
    "double_bos": ("rows", N_("more than one BOS token, or none where the template has one")),
    "leaked": ("tokens", N_("trained, but not part of an answer")),
    "only_last": ("rows", N_("only the last of several answers is trained")),
    "fully_masked": ("rows", N_("nothing is trained")),
    "missed": ("tokens", N_("part of an answer, but masked")),
    "missing_end": ("answers", N_("end-of-turn token masked or absent: the model never learns to stop")),
    "pad_trained": ("tokens", N_("padding is trained")),
    "truncated": ("rows", N_("cut off by the length limit")),
}
IN_ROWS = {
    "tokens": N_("{count:,} tokens, in row {rows}: {found}"),
    "rows": N_("{count:,} rows, in row {rows}: {found}"),
    "answers": N_("{count:,} answers, in row {rows}: {found}"),
}


@dataclass(frozen=True)
class Finding:
    """One kind of fault. `first_rows` are row numbers of the dataset; `found` quotes the first one."""

    code: str
    count: int
    unit: str
    rows: int
    first_rows: tuple[int, ...]
    where: str
    found: str
    expected: str
    fix: str


def find_faults(
    spans: Mapping[str, np.ndarray], *, answers: np.ndarray, cut: np.ndarray, dataset, tokenizer, fixes: Mapping
) -> Iterator[Finding]:
    """The faults in the order of `CHECKS`.

    Args:
        spans: for each code lines of row, first token, the token behind the last.
        answers: how many answers each row has at least a token of.
        cut: True for the rows that the length limit has cut.
        dataset: the rows.
        fixes: see `fixes_of`.
    """
    for code, (unit, meaning) in CHECKS.items():
        lines = spans[code]
        if not len(lines):
            continue
        lines = lines[np.lexsort((lines[:, 1], lines[:, 0]))]
        numbers = np.unique(lines[:, 0])
        shown, cause = lines[0], code
        if code == "fully_masked":  # the worst cause first: wrong markers, then no answer to train, then the length
            answered, short = answers[lines[:, 0]] > 0, cut[lines[:, 0]]
            shown = lines[np.lexsort((short, ~answered))[0]]
            cause = "fully_masked" if answered.any() else "no_answer" if not short.all() else "truncated"
        row, first, last = map(int, shown)
        text = tokenizer.decode(ids_of(dataset, row)[first:last])
        expected, fix = fixes[cause]
        yield Finding(
            code=code,
            count={"tokens": int((lines[:, 2] - lines[:, 1]).sum()), "rows": len(numbers), "answers": len(lines)}[unit],
            unit=unit,
            rows=len(numbers),
            first_rows=tuple(numbers[:3].tolist()),
            where=_("row {row}, tokens {first} to {last}", row=row, first=first, last=last - 1)
            if last > first
            else _("row {number}", number=row),
            found=_("{meaning}: {text}", meaning=_(meaning), text=_quote(text, from_end=code == "truncated")),
            expected=expected,
            fix=fix,
        )


def fixes_of(table: TokenBytes, turns: Turns, longest: int, enough: int | None) -> dict[str, tuple[str, str]]:
    """{cause: (what was expected, what to do)}, in the template's own markers."""
    instruction, response = (table.text(mark).strip(" ") for mark in (turns.user_start, turns.answer_start))
    end = table.text(turns.answer_end)
    markers = _(
        "give train_on_responses_only this template's own markers, "
        "instruction_part={instruction!r} and response_part={response!r}",
        instruction=instruction,
        response=response,
    )
    merged = _(
        "{markers}; if it has them, strip the answers: a leading newline merges with the marker's", markers=markers
    )
    if enough:
        length = _("set max_seq_length to {enough:,}, which keeps 99 % of the answers whole", enough=enough)
    else:
        length = _("raise max_seq_length above {longest:,}", longest=longest)
    only_last = _("leave out last_response_only; if it is not set: {fix}", fix=merged)
    padding = _("label padding with -100, and pad with a token that is not the EOS token")
    return {
        "no_template": (
            _("rows made with this tokenizer's chat template"),
            _("use one tokenizer to format and to check"),
        ),
        "label_mismatch": (
            _("labels equal to their input ids: the model itself shifts them"),
            _("leave them in place"),
        ),
        "double_bos": (_("one BOS token where a conversation starts"), _("render the rows as chapter 03 does")),
        "leaked": (_("everything outside an answer masked"), markers),
        "only_last": (_("every answer trained"), only_last),
        "fully_masked": (_("at least one answer trained"), merged),
        "no_answer": (_("an answer in each row"), _("keep only the rows that read_conversations gives")),
        "missed": (_("the whole answer trained"), merged),
        "missing_end": (_("each answer's {end!r} in the text and trained", end=end), merged),
        "pad_trained": (_("padding masked"), padding),
        "truncated": (
            _("answers that end with {end!r}", end=end),
            _("the markers are not to blame: {fix}", fix=length),
        ),
    }


def _quote(text: str, *, from_end: bool, width: int = 60) -> str:
    short = text if len(text) <= width else "…" + text[-width:] if from_end else text[:width] + "…"
    return repr(short)
