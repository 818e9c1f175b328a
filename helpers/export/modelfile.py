"""An Ollama `Modelfile` whose template is read off the tokenizer's own chat template."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helpers.base import InputError
from helpers.chat.replies import Message, render_prompt, stop_tokens
from helpers.messages import _
from helpers.template.turns import RefusedError

_MARK = "Zq{}p"  # a content that no template holds and none changes


class ModelfileError(InputError):
    """The chat template, a stop token or a file's name cannot be written in a Modelfile."""


@dataclass(frozen=True)
class TemplateParts:
    """What a chat template writes around the messages: question, answer, question, answer, question …

    Attributes:
        start: in front of the first question, where there is no system message (some templates write one themselves).
        before_system, after_system: around a system message; None where the template refuses one.
        to_answer: between a question and its answer; also what ends a prompt.
        to_question: between an answer and the next question.
    """

    start: str
    before_system: str | None
    after_system: str | None
    to_answer: str
    to_question: str

    def render(self, conversation: Sequence[Message]) -> str:
        """The prompt for a conversation that ends with a question; without a refused system message, as by Ollama."""
        text = self.start
        for message in conversation:
            if message["role"] != "system":
                text += message["content"] + (self.to_answer if message["role"] == "user" else self.to_question)
            elif self.before_system is not None:
                text = self.before_system + message["content"] + self.after_system
        return text


def read_template_parts(tokenizer: Any) -> TemplateParts:
    """Render conversations of marked messages and keep what stands between the marks.

    A BOS token that the runtime writes itself (`tokenizer("")` begins with it) is left out.

    Raises:
        ModelfileError: the template does more than put fixed text around each message, so no such parts exist; or it
            refuses a conversation of questions and answers.
    """
    probe = [
        {"role": role, "content": _MARK.format(number)}
        for number, role in enumerate(("system", "user", "assistant", "user", "assistant", "user"))
    ]
    talks = [probe[1:2], probe[1:], probe]
    try:
        texts = [_prompt(tokenizer, talk) for talk in talks[:2]]
    except RefusedError as error:
        raise _unwritable(error.found) from None
    start, to_answer, to_question = _between_marks(texts[1])
    before_system = after_system = None
    try:
        texts.append(_prompt(tokenizer, probe))
        before_system, after_system = _between_marks(texts[2])[:2]
    except RefusedError:  # Gemma's own template, for one, refuses a system message
        talks.pop()
    parts = TemplateParts(start, before_system, after_system, to_answer, to_question)
    if [parts.render(talk) for talk in talks] != texts:
        raise _unwritable(_("one that changes messages or depends on their place"))
    return parts


def _prompt(tokenizer: Any, conversation: Sequence[Message]) -> str:
    text, bos = render_prompt(tokenizer, conversation), tokenizer.bos_token or ""
    return text.removeprefix(bos) if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else text


def _between_marks(text: str) -> list[str]:
    """What stands before the first three marks; "" where a template dropped or changed one."""
    return [*re.split(_MARK.format("[0-9]"), text), "", ""][:3]


def _unwritable(found: str) -> ModelfileError:
    return ModelfileError(
        _("the chat template"),
        found=found,
        expected=_("the same text around each question and answer"),
        fix=_("write the Modelfile's TEMPLATE by hand; llama.cpp uses the template inside the GGUF file"),
    )


def ollama_template(parts: TemplateParts) -> str:
    """The parts as a Go template over `.System` and `.Messages`, in the form that Ollama fills in.

    Example: ChatML ->
        {{ if .System }}<|im_start|>system
        {{ .System }}<|im_end|>
        <|im_start|>user
        {{ else }}… and so on, to the opening of the answer

    Where the chat template refuses system messages, there is no branch for `.System`: Ollama then leaves one out.
    """
    start = _literal(parts.start)
    if parts.before_system is not None:
        system = f"{_literal(parts.before_system)}{{{{ .System }}}}{_literal(parts.after_system)}"
        start = f"{{{{ if .System }}}}{system}{{{{ else }}}}{start}{{{{ end }}}}"
    question = f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{_literal(parts.to_answer)}'
    answer = f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{_literal(parts.to_question)}{{{{ end }}}}'
    return f"{start}{{{{ range .Messages }}}}{question}{answer}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Text that a Go template prints as it is. A brace at its end would join those of what follows it."""
    return re.sub(r"\{\{|\{\Z", lambda found: f'{{{{ "{found[0]}" }}}}', text)


def _in_quotes(where: str, text: str, quotes: str) -> str:
    """A value as Ollama reads it: it knows no escapes, and leaves out what is not printable.

    Raises:
        ModelfileError: it holds these quotes, such a character, or, between `"` and not `\"""`, the end of a line.
    """
    between = text.replace("\n", "").replace("\t", "") if quotes == '"""' else text
    lost = quotes if quotes in text else next((letter for letter in between if not letter.isprintable()), "")
    if lost:
        expected, fix = _("what a Modelfile can hold"), _("write the Modelfile by hand")
        raise ModelfileError(where, found=_("{lost!r} in it", lost=lost), expected=expected, fix=fix)
    return f"{quotes}{text}{quotes}"


def make_modelfile(model: Any, tokenizer: Any, *, gguf_file: str, context_tokens: int) -> str:
    """The text of a Modelfile: `ollama create my-model -f Modelfile` in its folder.

    Args:
        gguf_file: the file's name beside the Modelfile.
        context_tokens: tokens that a prompt and its reply may have.

    Raises:
        ModelfileError: the template, a token that ends a reply or the file's name cannot be written so.
    """
    template = ollama_template(read_template_parts(tokenizer))
    stops = tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer, model))
    if not (gguf_file and gguf_file.isprintable() and gguf_file == gguf_file.strip()):
        expected, fix = _("one in a line, without a space at its ends"), _("rename the file")
        raise ModelfileError(_("the GGUF file's name"), found=repr(gguf_file), expected=expected, fix=fix)
    lines = [f"FROM ./{gguf_file}", "TEMPLATE " + _in_quotes(_("the chat template"), template, '"""')]
    lines += ["PARAMETER stop " + _in_quotes(_("the stop token {stop!r}", stop=stop), stop, '"') for stop in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {context_tokens}"]) + "\n"
