"""Where turns begin and end in token ids, read from probe renderings of the tokenizer's own chat template.

Everything is compared as bytes, not as token ids: `\n` before an answer may be a token of its own, part of `\n\n`, or
part of the answer's first token, but the bytes are the same. A token with a meaning of its own (`<|eot_id|>`) becomes
a code of bytes that UTF-8 never uses, so that text which merely spells `<|eot_id|>` cannot be taken for it.
"""

import contextlib
import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from helpers.base import InputError
from helpers.messages import N_, _
from helpers.template.limits import Late, limits

ROW_END = b"\xff\xff"  # between rows, and in place of padding
_CODE_LENGTH = 7  # one byte 0xFF and six digits of base 7, 0xF8 to 0xFE
# Unsloth's name for the template whose turns end with this token.
TEMPLATE_OF_END = {"<|eot_id|>": "llama-3.1", "<|im_end|>": "chatml", "<end_of_turn>": "gemma"}
CHAT_MODEL = N_("take the chat model, whose name often ends in -Instruct: a base model has learned no template")
FIXED_DATE = datetime.date(2024, 7, 26)  # Llama 3's templates print this one unless they are told another
# What a template may take for one conversation. Llama's takes half a millisecond and writes two hundred characters.
RENDER_SECONDS = 10
RENDER_BYTES = 2**28  # of memory, besides what the process has
RENDER_CHARACTERS = 1_000_000  # besides ten times those of the conversation


class TurnsError(InputError):
    """This tokenizer's chat template cannot be read: there is none, or its turns have no marks of their own."""


class RefusedError(TurnsError):
    """The chat template stopped with an error: it refuses this conversation, or it is broken."""


class TokenBytes:
    """Each token id's bytes, laid end to end: `join` turns millions of ids into one byte string with numpy.

    Example: ids of `<|im_end|>` and `é` -> `b"\\xff\\xf8\\xf8\\xf8\\xf8\\xf8\\xfa\\xc3\\xa9"`.
    """

    def __init__(self, tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TurnsError(
                type(tokenizer).__name__,
                found=_("a tokenizer without a `tokenizers` backend"),
                expected=_("a fast tokenizer, whose vocabulary can be read as bytes"),
                fix=_("load it with AutoTokenizer.from_pretrained(..., use_fast=True)"),
            )
        added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        vocabulary = tokenizer.get_vocab()
        to_bytes = _reader(backend)
        size = max(max(vocabulary.values()), max(added, default=0)) + 1
        pieces = [ROW_END] * (size + 1)  # the last one stands for padding and for the end of a row
        for token, token_id in vocabulary.items():
            pieces[token_id] = to_bytes(token)
        self.codes = {}
        for rank, (token_id, content) in enumerate(sorted(added.items())):
            if content.strip():  # a run of spaces kept as an added token is still text
                pieces[token_id] = b"\xff" + bytes(0xF8 + rank // 7**power % 7 for power in range(5, -1, -1))
                self.codes[pieces[token_id]] = (token_id, content)
            else:
                pieces[token_id] = content.encode()
        self.pieces = pieces
        self.row_end_id = size
        self._flat = np.frombuffer(b"".join(pieces), np.uint8)
        self._lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))
        self._starts = np.cumsum(self._lengths, dtype=np.int64) - self._lengths

    def join(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """The bytes of all ids, and where each id's bytes begin, shape `(len(ids) + 1,)`: the last entry is the end."""
        lengths = self._lengths[ids]
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        source = np.repeat(self._starts[ids] - offsets[:-1], lengths)
        source += np.arange(offsets[-1])
        return self._flat[source].tobytes(), offsets

    def text(self, data: bytes) -> str:
        """`join`'s bytes as the text that they stand for."""
        parts = re.split(b"(\xff[\xf8-\xfe]{6})", data)
        return "".join(self.codes[p][1] if p in self.codes else p.decode("utf-8", "backslashreplace") for p in parts)


def _reader(backend) -> Callable[[str], bytes]:
    """The function from a vocabulary entry to the bytes that it stands for."""
    decoder = backend.decoder.__getstate__() if backend.decoder else b""
    if b"ByteLevel" in decoder:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        letters = {ord(letter): chr(byte) for byte, letter in bytes_to_unicode().items()}

        def byte_level(token: str) -> bytes:  # `Ġcafé` is written as ` cafÃ©`
            try:
                return token.translate(letters).encode("latin-1")
            except UnicodeEncodeError:  # an added token that is stored as plain text
                return token.encode()

        return byte_level
    byte_token = re.compile("<0x([0-9A-F]{2})>")

    def pieces(token: str) -> bytes:  # SentencePiece: `▁café`, and `<0x0A>` for a byte outside the vocabulary
        match = byte_token.fullmatch(token)
        return bytes.fromhex(match[1]) if match else token.replace("▁", " ").encode()

    return pieces


@dataclass(frozen=True)
class Turns:
    """What surrounds an answer, as `TokenBytes` gives it.

    Attributes:
        answer_start: what stands right before an answer: `<|im_start|>assistant\\n`.
        answer_end: from the end of its text through its end-of-turn token: `<|im_end|>`.
        user_start: what stands right before a user's text: `<|im_start|>user\\n`.
        user_end: what stands between a user's text and `answer_start`; empty where that holds it all.
        after_answer: what the template may write after `answer_end`, longest first: `\\n`.
        marks: what shows that a text is of this template: the three above and the start of a system turn.
        end_token_id: the end-of-turn token.
        renders_bos: whether the rendered text begins with the BOS token.
    """

    answer_start: bytes
    answer_end: bytes
    user_start: bytes
    user_end: bytes
    after_answer: tuple[bytes, ...]
    marks: tuple[bytes, ...]
    end_token_id: int
    renders_bos: bool


@dataclass(frozen=True)
class Answers:
    """Answers found in a byte string: arrays of offsets, one entry an answer.

    Attributes:
        start: the first byte of its text.
        stop: the byte after its text and, where it is closed, after its end-of-turn token.
        after: the byte after whatever the template writes behind the end-of-turn token.
        closed: whether its end-of-turn token is there.
        cut: not closed because the row ends.
    """

    start: np.ndarray
    stop: np.ndarray
    after: np.ndarray
    closed: np.ndarray
    cut: np.ndarray


def find_answers(data: bytes, turns: Turns) -> Answers:
    """Find every answer in rows joined by `TokenBytes.join`, with `ROW_END` after each row."""
    headers = _find_all(turns.answer_start, data)
    start = headers + len(turns.answer_start)
    ends = _next(_find_all(turns.answer_end, data), start)
    rows = _next(_find_all(ROW_END, data), start)
    users = _next(_find_all(turns.user_start, data), start) if turns.user_start else rows
    stop = np.minimum.reduce([ends, rows, users, _next(headers, start)])
    closed = stop == ends
    stop = stop + closed * len(turns.answer_end)
    after = stop.copy()
    for i in np.flatnonzero(closed) if turns.after_answer else ():
        after[i] += next((len(tail) for tail in turns.after_answer if data.startswith(tail, stop[i])), 0)
    return Answers(start, stop, after, closed, ~closed & (stop == rows))


def _find_all(mark: bytes, data: bytes) -> np.ndarray:
    return np.fromiter((match.start() for match in re.finditer(re.escape(mark), data)), np.int64)


def _next(positions: np.ndarray, after: np.ndarray) -> np.ndarray:
    """For each offset in `after` the first position at or behind it; a huge number where there is none."""
    positions = np.append(positions, np.iinfo(np.int64).max // 2)
    return positions[np.searchsorted(positions, after)]


def render(tokenizer, messages: list[dict], **options) -> str:
    """The template's text for one conversation. A template that prints today's date prints 26 July 2024, as Llama's.

    A template is a program, and comes with a model from anywhere. In the main thread one that does not end is stopped
    after `RENDER_SECONDS`, and its memory is bounded on Linux. In another thread, such as the chat box's, neither is:
    Python handles signals in the main thread alone. A single operation is waited for; of those only powers take long,
    and `read_turns` refuses them.

    Raises:
        RefusedError: the template stopped with an error.
        TurnsError: it did not end, or wrote too much.
    """
    options = {"strftime_now": FIXED_DATE.strftime} | options
    try:
        with limits(seconds=RENDER_SECONDS, more_bytes=RENDER_BYTES):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Late:
        raise _excessive(_("no end after {seconds} s", seconds=RENDER_SECONDS)) from None
    except (MemoryError, RecursionError) as error:
        raise _excessive(_said(error)) from None
    except Exception as error:  # templates raise whatever they like
        fix = _("leave out what it refuses, such as a system message, or correct tokenizer.chat_template")
        expected = _("a template that renders this conversation")
        raise RefusedError(_("chat template"), found=_said(error), expected=expected, fix=fix) from None
    if len(text) > RENDER_CHARACTERS + 10 * len(str(messages)):
        raise _excessive(_("a text of {count:,} characters", count=len(text)))
    return text


def _excessive(found: str) -> TurnsError:
    expected, fix = _("a template that writes a short text at once"), _("correct tokenizer.chat_template")
    return TurnsError(_("chat template"), found=found, expected=expected, fix=fix)


def _said(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def joined(tokenizer, table: TokenBytes, text: str) -> bytes:
    """The bytes of a text's tokens, without a BOS token that the tokenizer may put in front."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return table.join(np.asarray(ids, np.int64))[0]


def read_turns(tokenizer, table: TokenBytes) -> Turns:
    """Read the marks around answers from probe conversations, and prove on the probes that they find every answer.

    No marker string is known beforehand: the text between one probe's end and the next one's start is the mark.

    Raises:
        TurnsError: the template is missing, does not end, stops with an error, drops or changes content, or ends an
            answer without a special token.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise _unreadable(_("no chat template"), _fitting_template(tokenizer))
    if _has_powers(tokenizer.chat_template):
        raise _excessive(_("a power, `**`, which may take for ever"))
    probes = {shape: _probe(tokenizer, table, shape) for shape in ("uauaua", "suaua", "ua", "aua", "saua", "uaaua")}
    if probes["uauaua"] is None:
        raise _unreadable(
            _("one that does not render three questions and answers with their text unchanged"),
            _("check that it accepts the roles user and assistant; rows made with it cannot be checked"),
        )
    gaps: dict[tuple[str, str], list[bytes]] = {}
    for shape, probe in probes.items():
        for pair, gap in zip(zip("^" + shape, shape + "$", strict=True), probe or (), strict=False):
            gaps.setdefault(pair, []).append(gap)
    answer_start = _answer_start(tokenizer, table, gaps)
    after = _shared_prefix(gaps["a", "u"] + gaps["a", "$"])
    if not after:
        raise _unreadable(
            _("one that ends an answer in the middle of a conversation and the last one differently"),
            _("rows made with it cannot be checked; use one that ends every answer with the same token"),
        )
    end = re.match(b"[^\xff]*\xff[\xf8-\xfe]{6}", after)
    if end is None:
        raise _unreadable(
            _("answers that end with {end!r}, without a special token", end=table.text(after)),
            _("use a template that ends answers with the end-of-turn token; a model trained without one never stops"),
        )
    answer_end = end.group()
    tail = after[len(answer_end) :]
    tails = {tail} | {gap[len(answer_end) :] for gap in gaps["a", "$"]}
    user_gap = _shared_prefix(gaps["u", "a"])
    user_start = _shared_prefix(gaps["a", "u"])[len(after) :]
    marks = [answer_start, answer_end, user_start]
    if ("^", "s") in gaps:  # its first line: the lines behind it may hold a date
        bos = table.pieces[tokenizer.bos_token_id] if tokenizer.bos_token else b""
        opening = gaps["^", "s"][0].partition(b"\n")[0]
        marks.append(opening if bos in answer_start else opening.removeprefix(bos))
    turns = Turns(
        answer_start=answer_start,
        answer_end=answer_end,
        user_start=user_start,
        user_end=user_gap[: -len(answer_start)],
        after_answer=tuple(sorted(tails - {b""}, key=len, reverse=True)),
        marks=tuple(mark.strip() for mark in marks if mark.strip()),
        end_token_id=table.codes[answer_end[-_CODE_LENGTH:]][0],
        renders_bos=bool(tokenizer.bos_token) and render(tokenizer, _messages("ua")).startswith(tokenizer.bos_token),
    )
    for shape in ("uauaua", "suaua", "ua"):
        if probes[shape] is not None:
            _prove(tokenizer, table, turns, shape)
    return turns


def _has_powers(template: str) -> bool:
    """Whether `**` stands in a template's code. In the text around its code it is Markdown."""
    import jinja2

    with contextlib.suppress(jinja2.TemplateSyntaxError):  # to render it says more about this
        return any(token[1:] == ("operator", "**") for token in jinja2.Environment().lex(template))
    return False


def _fitting_template(tokenizer) -> str:
    """What to do about a tokenizer without a template: its end token tells whether its model learned one."""
    if tokenizer.eos_token in TEMPLATE_OF_END:
        return _('set CHAT_TEMPLATE to "{name}"', name=TEMPLATE_OF_END[tokenizer.eos_token])
    return _(CHAT_MODEL)


def _messages(shape: str) -> list[dict]:
    """Probe messages: `"ua"` -> a user's `Zq0u` and an assistant's `Zq1a`."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[letter], "content": f"Zq{i}{letter}"} for i, letter in enumerate(shape)]


def _probe(tokenizer, table: TokenBytes, shape: str) -> list[bytes] | None:
    """The bytes before, between and after the probe messages; None where the template refuses or changes them."""
    messages = _messages(shape)
    try:
        data = joined(tokenizer, table, render(tokenizer, messages))
    except RefusedError:  # of an order of roles that it does not know
        if shape == "uauaua":
            raise
        return None
    found = re.fullmatch(b"(.*?)" + b"(.*?)".join(m["content"].encode() for m in messages) + b"(.*)", data, re.DOTALL)
    return list(found.groups()) if found else None


def _answer_start(tokenizer, table: TokenBytes, gaps: dict) -> bytes:
    """What is written before every answer, whoever spoke before, and before nothing else."""
    mark = _shared_prefix(gaps["u", "a"])  # a template may add an empty <think> block to the last answer alone
    generation = joined(tokenizer, table, render(tokenizer, _messages("u"), add_generation_prompt=True))
    prompt = joined(tokenizer, table, render(tokenizer, _messages("u")))
    others = [gap for (_, role), found in gaps.items() if role in "us" for gap in found]
    candidates = [_shared_prefix(gaps[role, "a"]) for role in "s^a" if (role, "a") in gaps]
    candidates.append(generation[len(_shared_prefix([generation, prompt])) :])
    for candidate in candidates:
        shared = _shared_suffix(mark, candidate)
        if shared.strip() and not any(gap.endswith(shared) for gap in others):
            mark = shared
    if not mark.strip() or any(gap.endswith(mark) for gap in others):
        raise _unreadable(
            _("{mark!r} before answers, which is before questions too", mark=table.text(mark)),
            _("use a template that marks the assistant's turns; rows of this one cannot be checked"),
        )
    return mark


def _prove(tokenizer, table: TokenBytes, turns: Turns, shape: str) -> None:
    messages = _messages(shape)
    data = joined(tokenizer, table, render(tokenizer, messages)) + ROW_END
    answers = find_answers(data, turns)
    spans = zip(answers.start, answers.stop - len(turns.answer_end), strict=True)
    found = [table.text(data[start:stop]) for start, stop in spans]
    expected = [message["content"] for message in messages if message["role"] == "assistant"]
    # endswith: a template may put an empty <think> block before an answer, which the model has to learn as well
    right = len(found) == len(expected) and all(map(str.endswith, found, expected))
    if not (right and answers.closed.all()):
        raise _unreadable(
            _("answers {found} where the probe held {expected}", found=found, expected=expected),
            _("rows of this template cannot be checked; use one whose turns have marks of their own"),
        )


def _shared_prefix(strings: list[bytes]) -> bytes:
    """Example: `[b"abc", b"abd"]` -> `b"ab"`. A token's code is never cut in two."""
    first, last = min(strings), max(strings)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:length]
    return re.sub(b"\xff[\xf8-\xfe]{0,5}$", b"", shared)


def _shared_suffix(first: bytes, second: bytes) -> bytes:
    pairs = zip(reversed(first), reversed(second), strict=False)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return re.sub(b"^[\xf8-\xfe]+", b"", first[len(first) - length :])


def _unreadable(found: str, fix: str) -> TurnsError:
    expected = _("a template whose turns can be told apart")
    return TurnsError(_("chat template"), found=found, expected=expected, fix=fix)
