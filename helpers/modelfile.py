"""An Ollama `Modelfile` whose template is read off the tokenizer's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.chat import Message, render_prompt, stop_tokens
from helpers.errors import InputError

_MARK = "Zq{}p"  # a content that no template holds and none changes


class ModelfileError(InputError):
    """The chat template cannot be written as an Ollama template."""


@dataclass(frozen=True)
class TemplateParts:
    """What a chat template writes around the messages: question, answer, question, answer, question …

    Attributes:
        start: in front of the first question, where there is no system message (some templates write one themselves).
        before_system, after_system: around a system message.
        to_answer: between a question and its answer; also what ends a prompt.
        to_question: between an answer and the next question.
    """

    start: str
    before_system: str
    after_system: str
    to_answer: str
    to_question: str

    def render(self, conversation: Sequence[Message]) -> str:
        """The prompt for a conversation that ends with a question."""
        text = self.start
        for message in conversation:
            if message["role"] == "system":
                text = self.before_system + message["content"] + self.after_system
            else:
                text += message["content"] + (self.to_answer if message["role"] == "user" else self.to_question)
        return text


def read_template_parts(tokenizer: Any) -> TemplateParts:
    """Render conversations of marked messages and keep what stands between the marks.

    A BOS token that the runtime writes itself (`tokenizer("")` begins with it) is left out.

    Raises:
        ModelfileError: the template does more than put fixed text around each message, so no such parts exist.
    """
    probe = [
        {"role": role, "content": _MARK.format(number)}
        for number, role in enumerate(("system", "user", "assistant", "user", "assistant", "user"))
    ]
    texts = [render_prompt(tokenizer, conversation) for conversation in (probe, probe[1:2])]
    bos = tokenizer.bos_token or ""
    if bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        texts = [text.removeprefix(bos) for text in texts]
    pieces = _split(texts[0], range(6)), _split(texts[1], [1])
    if None not in pieces:
        before_system, after_system, to_answer, to_question, *_ = pieces[0]
        parts = TemplateParts(pieces[1][0], before_system, after_system, to_answer, to_question)
        if [parts.render(probe), parts.render(probe[1:2])] == texts:
            return parts
    raise ModelfileError(
        "the chat template",
        found="one that changes messages or depends on their place",
        expected="the same text around each question and answer",
        fix="write the Modelfile's TEMPLATE by hand; llama.cpp uses the template inside the GGUF file",
    )


def _split(text: str, numbers: Sequence[int]) -> list[str] | None:
    pieces = []
    for number in numbers:
        before, found, text = text.partition(_MARK.format(number))
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]


def ollama_template(parts: TemplateParts) -> str:
    """The parts as a Go template over `.System` and `.Messages`, in the form that Ollama fills in.

    Example: ChatML ->
        {{ if .System }}<|im_start|>system
        {{ .System }}<|im_end|>
        <|im_start|>user
        {{ else }}… and so on, to the opening of the answer
    """
    question = f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{_literal(parts.to_answer)}'
    answer = f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{_literal(parts.to_question)}{{{{ end }}}}'
    system = f"{_literal(parts.before_system)}{{{{ .System }}}}{_literal(parts.after_system)}"
    start = f"{{{{ if .System }}}}{system}{{{{ else }}}}{_literal(parts.start)}{{{{ end }}}}"
    return f"{start}{{{{ range .Messages }}}}{question}{answer}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Text that a Go template prints as it is."""
    return text.replace("{{", '{{ "{{" }}')


def make_modelfile(model: Any, tokenizer: Any, *, gguf_file: str, context_tokens: int) -> str:
    """The text of a Modelfile: `ollama create my-model -f Modelfile` in its folder.

    Args:
        gguf_file: the file's name beside the Modelfile.
        context_tokens: tokens that a prompt and its reply may have.

    Raises:
        ModelfileError: the template cannot be written so.
    """
    template = ollama_template(read_template_parts(tokenizer))
    stops = tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer, model))
    if '"""' in template or any('"' in stop for stop in stops):
        fix = "write the Modelfile by hand"
        raise ModelfileError("the chat template", found="quotes that a Modelfile cannot hold", expected="none", fix=fix)
    parameters = [f'PARAMETER stop "{stop}"' for stop in stops]
    lines = [f"FROM ./{gguf_file}", f'TEMPLATE """{template}"""', *parameters, f"PARAMETER num_ctx {context_tokens}"]
    return "\n".join(lines) + "\n"


def write_modelfile(folder: str | Path, text: str) -> Path:
    """Write it into the folder of the GGUF files; returns its path."""
    path = Path(folder) / "Modelfile"
    path.write_text(text, encoding="utf-8")
    return path
