"""Render conversations with the tokenizer's chat template, and check that the two fit together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.base import InputError, Table
from helpers.handoff.run import fingerprint
from helpers.messages import _
from helpers.template.turns import CHAT_MODEL, TokenBytes, Turns, TurnsError, joined, read_turns, render

# What a server hands to a template, with values as they may be: llama-server does (common/chat.cpp), and so do others.
SERVER_VARIABLES = {
    "date_string": "Zq2d",
    "datetime": "Zq2d",
    "enable_thinking": True,
    "strftime_now": "Zq2d{}".format,
}
_QUESTION = [{"role": "user", "content": "Zq0u"}]
_ANSWER = [{"role": "assistant", "content": "Zq1a"}]


def training_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """One conversation as chapter 03 writes it for training.

    The BOS token is left out where the tokenizer puts one in front of every text by itself, so that rows begin with
    one and not with two. White space around a message is left out, as Llama's own template does: a newline in front of
    an answer would become one token with the marker before it.

    Example:
        >>> training_text(tokenizer, [{"role": "user", "content": "Hi "}])
        '<|im_start|>user\\nHi<|im_end|>\\n'
    """
    stripped = [{**message, "content": message["content"].strip()} for message in messages]
    return render(tokenizer, stripped).removeprefix(tokenizer.bos_token if adds_bos(tokenizer) else "")


@dataclass(frozen=True)
class TemplateCheck:
    """One thing that is wrong."""

    code: str
    sentence: str
    fix: str


@dataclass(frozen=True, repr=False)
class TemplateReport(Table):
    """What `check_template` found.

    Attributes:
        facts: (name, value) of what the template does.
        details: the problems, with sentence and fix.
    """

    facts: tuple[tuple[str, str], ...]
    details: tuple[TemplateCheck, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems' codes."""
        return tuple(check.code for check in self.details)

    @property
    def ok(self) -> bool:
        return not self.details

    def raise_if_failed(self) -> None:
        """Raise `TemplateError` about the first problem; do nothing where `ok`."""
        if self.details:
            first = self.details[0]
            fix, others = first.fix, ", ".join(self.problems[1:])
            raise TemplateError(
                _("chat template ({code})", code=first.code),
                found=first.sentence,
                expected=_("a template and a tokenizer that fit together"),
                fix=_("{fix} (also found: {others})", fix=fix, others=others) if others else fix,
            )

    def _title(self) -> str:
        return _("Chat template: fits the tokenizer") if self.ok else _("Chat template: does NOT fit the tokenizer")

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows = [list(fact) for fact in self.facts]
        for check in self.details:
            what = _("problem: {code}", code=check.code)
            rows.append([what, _("{problem}. Fix: {fix}", problem=check.sentence, fix=check.fix)])
        return [_("what"), _("value")], rows


class TemplateError(InputError):
    """The chat template and the tokenizer do not fit together."""


def check_template(tokenizer, *, model=None, original=None, expected: str = "") -> TemplateReport:
    """Check the chat template against the tokenizer, along the paths that training and inference take.

    A template that cannot be read, does not end, or stops with an error is the problem "unreadable".

    Args:
        tokenizer: the one to train with, its chat template set.
        model: where given, its generation config says what `generate` stops on, and its embedding what ids exist;
            else the generation config beside the tokenizer, or its EOS token, and its vocabulary do.
        original: the tokenizer as it was loaded, before `get_chat_template` (a `copy.deepcopy` of it). Without it a
            silent re-mapping of special tokens shows only with `model`, and only where it moved the end-of-turn token.
        expected: where given, the fingerprint of the template that the model was trained with.

    Example:
        >>> check_template(tokenizer).problems
        ('pad_is_eos',)
    """
    facts = [(_("{name} token", name=name), _named(tokenizer, name)) for name in ("bos", "eos", "pad")]
    problems = [*_another(tokenizer, expected), *_special_tokens(tokenizer, model, original)]
    try:
        table = TokenBytes(tokenizer)
        turns = read_turns(tokenizer, table)
        facts += [
            (_("before a question"), repr(table.text(turns.user_start))),
            (_("before an answer"), repr(table.text(turns.answer_start))),
            (_("end of an answer"), repr(table.text(turns.answer_end))),
        ]
        problems += _stop(tokenizer, turns, model, original)
        problems += _bos(tokenizer)
        problems += _generation_prompt(tokenizer, table, turns)
        problems += _server_variables(tokenizer) if _is_deterministic(tokenizer) else [_not_deterministic()]
    except TurnsError as error:
        sentence = _("{where}: {found}", where=error.where, found=error.found)
        problems.insert(0, TemplateCheck("unreadable", sentence, error.fix))
    return TemplateReport(tuple(facts), tuple(problems))


def _is_deterministic(tokenizer) -> bool:
    return len({render(tokenizer, _QUESTION + _ANSWER) for _ in range(20)}) == 1


def _not_deterministic() -> TemplateCheck:
    return TemplateCheck(
        "not_deterministic",
        _("the same conversation is rendered differently each time"),
        _("take whatever is random out of tokenizer.chat_template"),
    )


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts a BOS token in front of every text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]


def _named(tokenizer, name: str) -> str:
    token = getattr(tokenizer, f"{name}_token")
    if token is None:
        return _("none")
    return _("{token}, id {token_id}", token=token, token_id=getattr(tokenizer, f"{name}_token_id"))


def _stops(tokenizer, model) -> list[int]:
    """The ids that `generate` stops on: those of the generation config, the model's or the one saved beside it."""
    config = model.generation_config if model is not None else _saved_config(tokenizer.name_or_path)
    ids = tokenizer.eos_token_id if config is None or config.eos_token_id is None else config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


def _saved_config(name: str) -> Any:
    """The generation config of the model from whose folder or repository a tokenizer was loaded; None without one."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name) if name else None
    except (OSError, ValueError):  # no such file, no network, or not JSON
        return None


def _another(tokenizer, expected: str) -> Iterator[TemplateCheck]:
    found = fingerprint(tokenizer.chat_template or "")
    if expected and found != expected:
        yield TemplateCheck(
            "another_template",
            _(
                "the model was trained with the template {expected}, and this is {found}",
                expected=expected,
                found=found,
            ),
            _("load the tokenizer from the adapter's folder, and set no template after that; or run chapter 04 again"),
        )


def _special_tokens(tokenizer, model, original) -> Iterator[TemplateCheck]:
    if tokenizer.pad_token_id is None:
        yield TemplateCheck(
            "no_pad", _("the tokenizer has no pad token"), _("set tokenizer.pad_token to a token that no text holds")
        )
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield TemplateCheck(
            "pad_is_eos",
            _(
                "{token} is both the pad and the EOS token: collators mask padding, and with it the end",
                token=tokenizer.pad_token,
            ),
            _("set tokenizer.pad_token to another token, such as <|finetune_right_pad_id|>"),
        )
    vocabulary = tokenizer.get_vocab()
    known = vocabulary if original is None else original.get_vocab()
    size = max(known.values()) + 1 if model is None else model.get_input_embeddings().weight.shape[0]
    outside = [token for token in tokenizer.all_special_tokens if vocabulary.get(token, size) >= size]
    if outside:
        yield TemplateCheck(
            "outside_vocabulary",
            _("no id below {size:,} stands for {tokens}", size=size, tokens=", ".join(outside)),
            _("use tokens that the model has: a new one has no trained embedding"),
        )
    if original is not None:
        now = {token_id: token for token, token_id in vocabulary.items()}
        moved = [
            _("id {token_id} was {was}, is {now}", token_id=i, was=token, now=now.get(i))
            for token, i in known.items()
            if now.get(i) != token
        ]
        if moved:
            yield TemplateCheck(
                "remapped",
                _("special tokens were renamed: {tokens}", tokens=_("; ").join(sorted(moved))),
                _("keep the model's own chat template, or pass map_eos_token=False to get_chat_template"),
            )


def _stop(tokenizer, turns: Turns, model, original) -> Iterator[TemplateCheck]:
    stops = _stops(tokenizer, model)
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(i) if i is not None else None} (id {i})" for i in stops)
    end = tokenizer.convert_ids_to_tokens(turns.end_token_id)
    if turns.end_token_id not in stops:
        facts = dict(end=end, token_id=turns.end_token_id, stops=names)
        sentence = _("answers end with {end} (id {token_id}), but generate stops on {stops}", **facts)
        yield TemplateCheck("wrong_stop", sentence, _stop_fix(tokenizer, original, end))
    elif model is None and tokenizer.eos_token_id not in stops:  # it ends the rows of training, and goes into exports
        facts = dict(eos=_named(tokenizer, "eos"), stops=names)
        sentence = _("the EOS token is {eos}, but generate stops on {stops}", **facts)
        yield TemplateCheck("wrong_stop", sentence, _("set tokenizer.eos_token = {end!r}", end=end))


def _stop_fix(tokenizer, original, end: str) -> str:
    """Where the template is another than the model's own, its own; of a base model, which has none, the chat model."""
    own = tokenizer.chat_template if original is None else original.chat_template
    if own is None:
        return _(CHAT_MODEL)
    if own not in tokenizer.chat_template:  # chapter 03 writes a date in front of it
        return _("set CHAT_TEMPLATE to '', which keeps the model's own template")
    return _("set tokenizer.eos_token = {end!r}, and add its id to model.generation_config.eos_token_id", end=end)


def _bos(tokenizer) -> Iterator[TemplateCheck]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    text = training_text(tokenizer, _QUESTION + _ANSWER)
    prompt = tokenizer(render(tokenizer, _QUESTION, add_generation_prompt=True), add_special_tokens=False)
    trained, inferred = (_leading(ids, bos) for ids in (tokenizer(text).input_ids, prompt.input_ids))
    fix = _("leave one {{ bos_token }} in tokenizer.chat_template")
    if trained > 1:
        sentence = _("{count} BOS tokens at the start of the text that training uses", count=trained)
        yield TemplateCheck("double_bos", sentence, fix)
    if inferred > 1:
        sentence = _("{count} BOS tokens at the start of the text that inference uses", count=inferred)
        yield TemplateCheck("double_bos", sentence, fix)
    if min(trained, 1) != min(inferred, 1):
        yield TemplateCheck(
            "bos_differs",
            _(
                "training texts begin with {trained} BOS tokens, prompts at inference with {inferred}",
                trained=trained,
                inferred=inferred,
            ),
            _("write {{ bos_token }} at the start of tokenizer.chat_template"),
        )
    if adds_bos(tokenizer) and tokenizer.bos_token in tokenizer.chat_template:
        yield TemplateCheck(
            "bos_spelled_out",
            _(
                "the template spells {token} out; Unsloth on a GPU then adds no BOS token to the texts",
                token=tokenizer.bos_token,
            ),
            _("write {{ bos_token }} in its place"),
        )


def _leading(ids: list[int], token_id: int) -> int:
    return next((i for i, each in enumerate(ids) if each != token_id), len(ids))


def _generation_prompt(tokenizer, table: TokenBytes, turns: Turns) -> Iterator[TemplateCheck]:
    prompt = render(tokenizer, _QUESTION, add_generation_prompt=True)
    rendered = render(tokenizer, _QUESTION + _ANSWER)
    prompt_ids, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, rendered))
    left = rendered.removeprefix(prompt).lstrip(" ")  # a space in front of an answer is part of its first token
    # where a template writes an empty <think> block, the answer does not follow the prompt at once
    ends_with_start = joined(tokenizer, table, prompt).endswith(turns.answer_start)
    if not rendered.startswith(prompt) or ids[: len(prompt_ids)] != prompt_ids:
        yield TemplateCheck(
            "prompt_not_prefix",
            _("the prompt at inference is not how training texts begin, in text or in tokens"),
            _("make the generation prompt in tokenizer.chat_template equal to the start of an answer"),
        )
    elif not (left.startswith(_ANSWER[0]["content"]) or ends_with_start):
        yield TemplateCheck(
            "no_generation_prompt",
            _(
                "with add_generation_prompt=True a prompt ends with {end!r}, not with the start of an answer",
                end=prompt[-30:],
            ),
            _("add {% if add_generation_prompt %} and the start of an answer to tokenizer.chat_template"),
        )


def _server_variables(tokenizer) -> Iterator[TemplateCheck]:
    text = render(tokenizer, _QUESTION)
    for name, value in SERVER_VARIABLES.items():
        if render(tokenizer, _QUESTION, **{name: value}) != text:
            yield TemplateCheck(
                "server_variable",
                _("the text changes with {name}, which a server such as llama-server sets in its own way", name=name),
                _("write the value into tokenizer.chat_template, as chapter 03 does with the date"),
            )
