"""One tokenized row in colour: what is trained and what is not."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from helpers.masking.rows import MaskingError, flat, need_columns
from helpers.messages import _
from helpers.template.turns import TokenBytes


def show_masking(row: Mapping, *, tokenizer) -> "MaskView":
    """One row as text, trained tokens apart from masked ones; in a notebook in colour, with ids as tool-tips.

    Example:
        >>> print(show_masking(trainer.train_dataset[0], tokenizer=tokenizer))
        30 tokens, 9 trained
        masked  | <|im_start|>user↵Hi<|im_end|>↵<|im_start|>assistant↵
        TRAINED | Hello!<|im_end|>
        masked  | ↵
    """
    need_columns(row, "row")
    table = TokenBytes(tokenizer)
    ids, labels = (flat(row[key]).tolist() for key in ("input_ids", "labels"))
    if len(ids) != len(labels):
        raise MaskingError(
            "row",
            found=_("{labels} labels for {ids} ids", labels=len(labels), ids=len(ids)),
            expected=_("one label a token"),
            fix=_("pass a whole row"),
        )
    trained = [label != -100 for label in labels]
    pieces: list[_Piece] = []
    data = b""
    first = 0
    for index, token_id in enumerate(ids):
        data += table.pieces[token_id]
        # the bytes of one character may be spread over several tokens: they are shown as one piece
        whole = index + 1 == len(ids) or trained[index + 1] != trained[first] or _is_text(data)
        if whole:
            special = data in table.codes
            pieces.append(_Piece(table.text(data), trained[first], special, tuple(ids[first : index + 1]), first))
            data, first = b"", index + 1
    return MaskView(tuple(pieces))


@dataclass(frozen=True)
class _Piece:
    text: str
    trained: bool
    special: bool
    ids: tuple[int, ...]
    index: int


# Okabe and Ito's blue and orange, thin enough that the theme's own text colour stays legible on them. Not by colour
# alone: trained text is underlined, special tokens are framed. <u> and <b> survive viewers that strip styles.
_TRAINED_STYLE = "background:rgba(0,114,178,.30);text-decoration:underline;text-underline-offset:3px"
_MASKED_STYLE = "background:rgba(230,159,0,.16);text-decoration:none"
_SPECIAL_STYLE = "font-weight:600;outline:1px solid rgba(128,128,128,.8);outline-offset:-1px"


@dataclass(frozen=True)
class MaskView:
    """A row to look at: print it, or let a notebook show it in colour."""

    pieces: tuple[_Piece, ...]

    def _counts(self) -> str:
        tokens = sum(len(piece.ids) for piece in self.pieces)
        trained = sum(len(piece.ids) for piece in self.pieces if piece.trained)
        return _("{tokens} tokens, {trained} trained", tokens=tokens, trained=trained)

    def __repr__(self) -> str:
        lines = [self._counts()]
        for trained, run in groupby(self.pieces, key=lambda piece: piece.trained):
            side = _("TRAINED |") if trained else _("masked  |")
            lines.append(f"{side} " + "".join(_visible(p.text) for p in run))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        spans = []
        for piece in self.pieces:
            tag, style = ("u", _TRAINED_STYLE) if piece.trained else ("span", _MASKED_STYLE)
            ids = ", ".join(map(str, piece.ids))
            title = (
                _("id {ids}, index {index}, trained", ids=ids, index=piece.index)
                if piece.trained
                else _("id {ids}, index {index}, masked", ids=ids, index=piece.index)
            )
            text = html.escape(piece.text).replace("\n", "↵\n")
            if piece.special:
                text = f'<b style="{_SPECIAL_STYLE}">{text}</b>'
            spans.append(f'<{tag} style="{style}" title="{title}">{text}</{tag}>')
        trained, masked = _("trained"), _("masked")
        legend = _(
            "{counts}: {trained} {masked}",
            counts=self._counts(),
            trained=f'<u style="{_TRAINED_STYLE}">{trained}</u>',
            masked=f'<span style="{_MASKED_STYLE}">{masked}</span>',
        )
        return (
            f'<div><p>{legend}</p><pre style="white-space:pre-wrap;line-height:1.7;'
            f'color:inherit;background:transparent">{"".join(spans)}</pre></div>'
        )


def _visible(text: str) -> str:
    """Newlines as `↵`, other control characters as escapes."""
    return "".join(c if c.isprintable() else "↵" if c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _is_text(data: bytes) -> bool:
    if data[:1] == b"\xff":
        return True
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return True
