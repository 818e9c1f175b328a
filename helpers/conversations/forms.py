"""Which form rows have, and one row as turns: every common form becomes `role` and `content` here, and nowhere else."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from helpers.base import InputError
from helpers.conversations.source import ROLE_KEYS, Row, Unreadable
from helpers.messages import N_, _

ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(["user", "human", "input", "prompter", "customer", "instruction"], "user")
ROLES |= dict.fromkeys(["assistant", "gpt", "output", "chatgpt", "bot", "chatbot", "ai", "model", "agent"], "assistant")
TOOL_ROLES = {"tool", "function", "function_call", "function_response", "observation", "tool_call", "tool_response"}
TOOL_ROLES |= {"ipython", "function-call", "function-response"}
TEXT_KEYS = ("content", "value", "text", "message", "utterance")
# Names of columns, in lower case, with _ for spaces and hyphens.
CONVERSATIONS = ("conversations", "messages", "conversation", "dialogue", "dialog", "turns", "chat")
QUESTIONS = ("instruction", "question", "prompt", "query", "input", "user", "human", "problem", "request", "q")
QUESTIONS += ("问题", "提问", "問題")
ANSWERS = ("output", "answer", "completion", "response", "reply", "assistant", "solution", "target", "a")
ANSWERS += ("回答", "答案", "回复", "答复", "回覆")
MORE = ("input", "context")  # beside an instruction: the text that it is about
SYSTEMS = ("system", "system_prompt", "system_message")
GROUPS = ("conversation_id", "conv_id", "conversationid", "dialogue_id", "dialog_id", "thread_id", "chat_id")
GROUPS += ("session_id", "ticket_id", "group_id", "conversation", "dialogue", "id")
ORDERS = ("turn", "turn_id", "turn_index", "message_index", "index", "position", "order", "seq")
SAMPLE = 1000  # rows that are looked at for the form


class Unfit(Exception):
    """A row that holds no conversation, with the code and the message of a `Problem`."""

    def __init__(self, code: str, message: str):
        self.code, self.message = code, message
        super().__init__(message)


class Turn(NamedTuple):
    """One turn as it was read.

    Attributes:
        role: "system", "user" or "assistant"; None where it is none of them.
        text: its text, or whatever stands in its place.
        place: its number among the messages, or its column.
        said: the role as it stands in the row.
    """

    role: str | None
    text: Any
    place: int | str
    said: Any = None

    @property
    def name(self) -> str:
        """How a problem calls it: "message 1" or "`output`"."""
        return f"`{self.place}`" if isinstance(self.place, str) else _("message {number}", number=self.place)


@dataclass(frozen=True)
class Form:
    """How rows are read.

    Attributes:
        kind: "turns", "table" or "spread" (one conversation over several rows).
        columns: for turns, those that may hold them; for a table, those of the question in order, and the answer's;
            for spread rows, those of the conversation's id, the role and the text.
        system, tools, history, order: the columns of these, or "".
        title: one sentence for the reader.
    """

    kind: str
    columns: tuple[str, ...] = ()
    system: str = ""
    tools: str = ""
    history: str = ""
    order: str = ""
    title: str = ""


def find_form(rows: Sequence[Row], *, where: str, columns: Sequence[str] = (), keep: Sequence[str] = ()) -> Form:
    """Look at the first rows and decide how all are read.

    Args:
        columns: the reader's own choice: one name, of the column with the conversations; or several, of the question
            and, last, of the answer.
        keep: columns that are no part of a conversation, and are not told as unread.

    Raises:
        InputError: no form fits, or two do.
    """
    values = [row.value for row in rows[:SAMPLE] if isinstance(row.value, Mapping)]
    names = list(dict.fromkeys(str(name) for value in values for name in value))
    wrong = [name for name in columns if name not in names]
    if wrong:
        expected, fix = _("some of {columns}", columns=", ".join(names)), _("correct COLUMNS, or leave it empty")
        raise InputError("COLUMNS", found=repr(wrong[0]), expected=expected, fix=fix)
    if not values and any(isinstance(row.value, list) for row in rows[:SAMPLE]):
        return Form("turns", title=_("Read as lists of turns."))
    form = _turns(values, names, columns, where) or _spread(values, names, columns, where)
    form = form or _table(names, columns, where)
    by_name = {_plain(name): name for name in names}
    more = {"system": _first(by_name, SYSTEMS), "tools": _first(by_name, ("tools", "functions"))}
    more |= {"history": _first(by_name, ("history",)) if form.kind == "table" else ""}
    read = {*form.columns, form.order, *more.values()}
    more = {name: "" if column in form.columns else column for name, column in more.items()}
    unread = [name for name in names if name not in read and name not in keep]
    if more["system"]:
        title = _("Read as {form}, with the system prompt in `{column}`.", form=form.title, column=more["system"])
    else:
        title = _("Read as {form}.", form=form.title)
    title = _("{sentence} Not read: {columns}.", sentence=title, columns=_listed(unread)) if unread else title
    return Form(form.kind, form.columns, **more, order=form.order, title=title)


def _turns(values: list[Mapping], names: list[str], columns: Sequence[str], where: str) -> Form | None:
    chosen = [name for name in names if any(_is_turns(value.get(name)) for value in values)]
    if len(columns) == 1:
        chosen = list(columns)
    elif columns or {_plain(name) for name in chosen} == {"prompt", "completion"}:
        return None
    # a column with the right name and the wrong content is told row by row
    known = [name for name in names if _plain(name) in CONVERSATIONS[:2]]
    chosen = chosen or (known if not _first({_plain(name): name for name in names}, ROLE_KEYS) else [])
    both = next((v for v in values if sum(v.get(name) not in (None, []) for name in chosen) > 1), None)
    if both is not None:
        found = _("conversations in {columns}", columns=_listed(chosen))
        fix = _('set COLUMNS to the one to train on, such as "{column}"', column=chosen[0])
        raise InputError(where, found=found, expected=_("one column with them"), fix=fix)
    if not chosen:
        return None
    keys = next((set(map(str, turn)) for v in values for name in chosen for turn in _dicts(v.get(name))), set())
    if "role" in keys:
        title = _("messages: {columns}", columns=_listed(chosen))
    elif {"from", "value"} <= keys:
        title = _("ShareGPT (`from`, `value`): {columns}", columns=_listed(chosen))
    else:
        title = _("conversations: {columns}", columns=_listed(chosen))
    return Form("turns", tuple(chosen), title=title)


def _is_turns(value: Any) -> bool:
    """Whether a cell looks like a list of turns: dictionaries with a role, also as JSON text or as Arrow's columns."""
    return any(_lower(turn).keys() & set(ROLE_KEYS) for turn in _dicts(value))


def _dicts(value: Any) -> list[Mapping]:
    try:
        turns = _list_of(value)
    except Unfit:
        return []
    return [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []


def _spread(values: list[Mapping], names: list[str], columns: Sequence[str], where: str) -> Form | None:
    by_name = {_plain(name): name for name in names}
    role, text = _first(by_name, ROLE_KEYS), _first(by_name, TEXT_KEYS)
    if columns or not role or not text:
        return None
    roles = [_role(value.get(role)) for value in values]
    if sum(each is not None for each in roles) * 2 < len(roles):
        return None
    ids = [by_name[name] for name in GROUPS if name in by_name and by_name[name] not in (role, text)]
    ids = ids if len(ids) < 2 else [name for name in ids if _plain(name) != "id"]
    if len(ids) != 1:
        if ids:
            found = _("one turn a row, and {columns}", columns=_listed(ids))
            fix = _("delete all but one of {columns}", columns=_listed(ids))
        else:
            found = _("one turn a row, and no column that says of which conversation")
            fix = _("name it `conversation_id`")
        raise InputError(where, found=found, expected=_("one column with the conversation's id"), fix=fix)
    order, listed = _first(by_name, ORDERS), _listed([ids[0], role, text])
    if order:
        title = _("one turn a row: {columns}, in the order of `{order}`", columns=listed, order=order)
    else:
        title = _("one turn a row: {columns}", columns=listed)
    return Form("spread", (ids[0], role, text), order=order, title=title)


def _table(names: list[str], columns: Sequence[str], where: str) -> Form:
    if columns:
        return Form("table", tuple(columns), title=_("question and answer: {columns}", columns=_listed(columns)))
    by_name = {_plain(name): name for name in names}
    questions = [by_name[name] for name in QUESTIONS if name in by_name]
    answers = [by_name[name] for name in ANSWERS if name in by_name]
    if "instruction" in by_name:  # Alpaca: the `input` beside it is no second question
        more = [by_name[name] for name in MORE if name in by_name]
        questions = [name for name in questions if name not in more]
    else:
        more = []
    for found, several, none in (
        (
            questions,
            N_("{count} columns that may be the question ({columns})"),
            N_("no column for the question among {columns}"),
        ),
        (
            answers,
            N_("{count} columns that may be the answer ({columns})"),
            N_("no column for the answer among {columns}"),
        ),
    ):
        if len(found) != 1 or len(more) > 1:
            if not names:
                some = _("no conversations")
            elif not found:
                some = _(none, columns=_listed(names))
            elif len(found) == 1:
                some = _("both {columns} beside the instruction", columns=_listed(more))
            else:
                some = _(several, count=len(found), columns=_listed(found))
            expected = _("one for each, or a column with conversations")
            fix = _("name the question's and the answer's column in COLUMNS, as in \"question, answer\"")
            raise InputError(where, found=some, expected=expected, fix=fix)
    read = (questions[0], *more, answers[0])
    if "instruction" in by_name:
        title = _("instructions and outputs: {columns}", columns=_listed(read))
    else:
        title = _("questions and answers: {columns}", columns=_listed(read))
    return Form("table", read, title=title)


def grouped(rows: Sequence[Row], form: Form, *, where: str) -> list[Row]:
    """Rows of one turn each as rows of one conversation each, in the order in which the conversations begin.

    Raises:
        InputError: a row cannot be read: its conversation would be trained without it.
    """
    group, role, text = form.columns
    conversations: dict[str, list[Row]] = {}
    for row in rows:
        if not isinstance(row.value, Mapping) or row.value.get(group) in (None, ""):
            place = _("{where}, {place}", where=where, place=row.place)
            why = row.value.why if isinstance(row.value, Unreadable) else _("no `{column}`", column=group)
            expected = _("a turn with its `{column}`", column=group)
            fix = _("correct that row: its conversation would be trained without it")
            raise InputError(place, found=why, expected=expected, fix=fix)
        conversations.setdefault(str(row.value[group]), []).append(row)
    whole = []
    for parts in conversations.values():
        if form.order:
            parts = sorted(parts, key=lambda row: _number(row, form.order, where))
        turns = [{"role": part.value.get(role), "content": part.value.get(text)} for part in parts]
        # the first turn's other columns are the conversation's
        whole.append(Row(parts[0].place, {**parts[0].value, group: turns}))
    return whole


def _number(row: Row, column: str, where: str) -> float:
    try:
        return float(row.value.get(column))
    except (TypeError, ValueError):
        found, fix = ascii(row.value.get(column))[:40], _("correct that row")
        place = _("{where}, {place}, `{column}`", where=where, place=row.place, column=column)
        raise InputError(place, found=found, expected=_("the number of the turn"), fix=fix) from None


def turns_of(value: Any, form: Form) -> list[Turn]:
    """One row's turns, with its system prompt as the first.

    Raises:
        Unfit: nothing in it is a conversation, or a part of it could not be trained.
    """
    if isinstance(value, Unreadable):
        raise Unfit("unreadable", value.why)
    if isinstance(value, list):
        return [_turn(turn, number) for number, turn in enumerate(_nonempty(value))]
    if not isinstance(value, Mapping):
        raise Unfit("wrong_nesting", _("{value} in place of a conversation", value=quoted(value)))
    if form.tools and value.get(form.tools) not in (None, "", [], {}, "[]", "{}"):
        raise Unfit("tool_call", _("`{column}` offers functions", column=form.tools))
    turns = _table_turns(value, form) if form.kind == "table" else _column_turns(value, form)
    system = value.get(form.system) if form.system else None
    if system in (None, ""):
        return turns
    own = [turn.text for turn in turns if turn.role == "system"]
    if own and own != [system]:
        message = _("`{column}` and the conversation hold different system prompts", column=form.system)
        raise Unfit("two_systems", message)
    return turns if own else [Turn("system", system, form.system), *turns]


def _column_turns(value: Mapping, form: Form) -> list[Turn]:
    """The turns in whichever of the form's columns is filled in this row."""
    columns = form.columns[:1] if form.kind == "spread" else form.columns
    column = next((name for name in columns if value.get(name) is not None), None)
    if column is None:
        raise Unfit("wrong_nesting", _("nothing in {columns}", columns=_listed(columns)))
    return [_turn(turn, number) for number, turn in enumerate(_nonempty(_list_of(value[column])))]


def _table_turns(value: Mapping, form: Form) -> list[Turn]:
    *asked, answer = form.columns
    turns = []
    for pair in value.get(form.history) or () if form.history else ():  # Alpaca's: earlier questions and answers
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            message = _(
                "`{column}` holds {value} in place of a question and its answer",
                column=form.history,
                value=quoted(pair),
            )
            raise Unfit("wrong_nesting", message)
        turns += [Turn("user", pair[0], form.history), Turn("assistant", pair[1], form.history)]
    if _is_turns(value.get(asked[0])) or _is_turns(value.get(answer)):  # TRL's conversational prompt and completion
        for column in form.columns:
            turns += [_turn(turn, number) for number, turn in enumerate(_nonempty(_list_of(value.get(column))))]
        return turns
    question, *more = (value.get(name) for name in asked)
    more = [text for text in more if text not in (None, "")]
    if more:  # a part that is no text is told as it is
        wrong = [text for text in (question, *more) if not isinstance(text, str)]
        question = wrong[0] if wrong else "\n\n".join([question, *more])
    return [*turns, Turn("user", question, asked[0]), Turn("assistant", value.get(answer), answer)]


def _list_of(value: Any) -> Any:
    """A cell's list of turns: as it is, out of JSON text, or out of the columns as which Arrow may store it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise Unfit("wrong_nesting", _("text that is not JSON: {value}", value=quoted(value))) from None
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    return value


def _nonempty(turns: Any) -> Sequence:
    if not isinstance(turns, list | tuple):
        raise Unfit("wrong_nesting", _("{value} in place of a list of messages", value=quoted(turns)))
    if not turns:
        raise Unfit("empty_conversation", _("the list of messages is empty"))
    if len(turns) > 1 and all(isinstance(turn, str) for turn in turns):  # the user begins
        return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return turns


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping):
        value = quoted(message)
        raise Unfit("wrong_nesting", _("message {number} is {value}", number=number, value=value))
    message = _lower(message)
    said, text = (next((message[k] for k in keys if k in message), None) for keys in (ROLE_KEYS, TEXT_KEYS))
    if any(message.get(key) for key in ("tool_calls", "function_call")) or _plain(said) in TOOL_ROLES:
        raise Unfit("tool_call", _("message {number} calls a function, or is its result", number=number))
    return Turn(_role(said), _joined(text), number, said)


def _lower(message: Mapping) -> dict[str, Any]:
    """Without what is absent: Arrow gives each key that any row has, as None."""
    return {str(key).strip().lower(): value for key, value in message.items() if value is not None}


def _joined(text: Any) -> Any:
    """The text of OpenAI's list of parts, where all are text: [{"type": "text", "text": "Hi"}] -> "Hi"."""
    if isinstance(text, list) and text and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in text):
        return "".join(part["text"] for part in text)
    return text


def _role(said: Any) -> str | None:
    return ROLES.get(said.strip().lower()) if isinstance(said, str) else None


def _plain(name: Any) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def _first(by_name: Mapping[str, str], names: Iterable[str]) -> str:
    return next((by_name[name] for name in names if name in by_name), "")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:8])
    return f"{shown}, …" if len(names) > 8 else shown


def quoted(value: object, width: int = 40) -> str:
    """A value as it is shown in one line."""
    text = ascii(value)
    return text if len(text) <= width else f"{text[:width]}…"
