"""A chat box for the notebook: history, streaming, stop, base and tuned side by side; headless it runs a script."""

import contextlib
import html
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.base import short_path
from helpers.chat.replies import ChatError, Message, Reply, generating, stream_reply, trim_conversation
from helpers.messages import N_, _

REFRESH_SECONDS = 0.1  # each refresh sends the whole history to the browser
BESIDE = "<div style='display:flex;gap:8px;align-items:flex-start'>{}</div>"
BUBBLE = (
    "<div style='flex:1;min-width:0;margin:4px 0;padding:6px 10px;border-radius:6px;white-space:pre-wrap;"
    "overflow-wrap:anywhere;line-height:1.4;background:{colour};color:#111'>{who}{text}</div>"
)
SIDES = {"tuned": N_("tuned"), "base": N_("base")}
MODELS = {"tuned": N_("tuned model"), "base": N_("base model")}
COLOURS = {"you": "#e8eef7", "tuned": "#e7f4e4", "base": "#f4efe0", "note": "#f0f0f0"}


@dataclass
class Exchange:
    """One question and what was answered: {"tuned": text, "base": text}, or one of them; `notes` are the box's own."""

    question: str
    replies: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class ChatBox:
    """Talk to a model, and to the model that it was tuned from.

    Both are one model in memory: for the base model's replies the adapter is switched off. Each of the two sees its own
    replies as its memory. Earlier turns that no longer fit are left out whole, and the box says so.

    Args:
        model: with an adapter; without one there is nothing to compare, and the one model is called "tuned".
        max_seq_length: tokens that a conversation and its reply may have together.
        max_new_tokens: what its slider begins with, the longest reply.

    Attributes:
        system: the system message; empty for none.
        temperature, min_p: see `helpers.chat.replies.stream_reply`.

    Example:
        >>> box = ChatBox(model, tokenizer, max_seq_length=512)
        >>> box.show(script=["My lamp is dark.", "And now?"])   # the box in a browser; headless, these two questions
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_seq_length: int, max_new_tokens: int = 96):
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_length, self.max_new_tokens = max_seq_length, max_new_tokens
        self.system, self.temperature, self.min_p = "", 0.0, 0.1
        self.has_base = hasattr(model, "disable_adapter")
        self.sides: tuple[str, ...] = ("tuned",)
        self.exchanges: list[Exchange] = []
        self._stop, self._busy, self._drawn, self._widgets = threading.Event(), threading.Lock(), 0.0, {}

    def conversation(self, side: str) -> list[Message]:
        """What one side has seen, its own replies included."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            if exchange.replies.get(side):
                messages.append({"role": "user", "content": exchange.question})
                messages.append({"role": "assistant", "content": exchange.replies[side]})
        return messages

    def ask(self, question: str) -> dict[str, Reply]:
        """Ask every chosen side and wait; the history is refreshed while the replies come.

        A side that has not begun when the reader presses Stop is not asked: it has no reply in what is returned.
        """
        with self._busy:
            self._stop.clear()
            exchange = Exchange(question)
            conversations = {
                side: [*self.conversation(side), {"role": "user", "content": question}] for side in self.sides
            }
            self.exchanges.append(exchange)
            replies = {}
            for side, conversation in conversations.items():
                if self._stop.is_set():
                    exchange.notes.append(_("{side}: not asked, you pressed Stop", side=_(SIDES[side])))
                else:
                    replies[side] = self._reply(side, conversation, exchange)
            return replies

    def _reply(self, side: str, conversation: list[Message], exchange: Exchange) -> Reply:
        def on_text(text: str) -> None:
            exchange.replies[side] += text
            self._draw()

        who = _(SIDES[side])
        limits = dict(max_seq_length=self.max_seq_length, max_new_tokens=self.max_new_tokens)
        kept, left_out = trim_conversation(self.tokenizer, conversation, **limits)
        if left_out:
            note = _("{side}: the oldest {count} messages no longer fit and are not seen", side=who, count=left_out)
            exchange.notes.append(note)
        exchange.replies[side] = ""
        switched = self.model.disable_adapter() if side == "base" else contextlib.nullcontext()
        options = dict(temperature=self.temperature, min_p=self.min_p, max_new_tokens=self.max_new_tokens)
        with generating(self.model), switched:
            reply = stream_reply(self.model, self.tokenizer, kept, on_text=on_text, stop=self._stop, **options)
        exchange.replies[side] = reply.text
        exchange.notes.append(_("{who}: {text}", who=who, text=reply))
        self._draw(now=True)
        return reply

    def reset(self) -> None:
        """Stop, and forget the conversation."""
        self._stop.set()
        with self._busy:
            self.exchanges.clear()
        self._draw(now=True)

    def transcript(self) -> list[dict[str, Any]]:
        """The conversation of each side that spoke as a ShareGPT row: a data set that chapter 03 reads.

        Example: [{"model": "tuned", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", …}]}]
        """
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        rows = []
        for side in ("tuned", "base"):
            turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in self.conversation(side)]
            if any(turn["from"] == "gpt" for turn in turns):
                rows.append({"model": side, "conversations": turns})
        return rows

    def save_transcript(self, path: str | Path) -> Path:
        """Write the transcript, a row a line; returns its path."""
        path = Path(path)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.transcript())
        path.write_text(text, encoding="utf-8")
        return path

    def html(self) -> str:
        """The history. All that was typed or generated is escaped: markup in a reply is shown, never executed."""
        parts = []
        for exchange in self.exchanges:
            replies = [_bubble(side, _(MODELS[side]), text) for side, text in exchange.replies.items()]
            parts += [_bubble("you", _("you"), exchange.question), BESIDE.format("".join(replies))]
            parts += [_bubble("note", "", note) for note in exchange.notes]
        return "".join(parts)

    def __repr__(self) -> str:
        lines = []
        for exchange in self.exchanges:
            said = {_("you"): exchange.question}
            said |= {_(SIDES[side]): text for side, text in exchange.replies.items()}
            lines += [_("{who}: {text}", who=who, text=text) for who, text in said.items()]
        return "\n".join(lines)

    def show(self, *, script: Sequence[str] = (), save_to: str | Path = "transcript.jsonl") -> None:
        """Show the box where somebody can use it; where nobody can (papermill), ask the script's questions and print.

        Args:
            script: the questions for a run without a reader; both sides are asked.
            save_to: the file that the box's button writes the transcript to.
        """
        if has_reader():
            from IPython.display import display

            display(self.widget(save_to=save_to))
            return
        self.sides = ("tuned", "base") if self.has_base else ("tuned",)
        for question in script:
            self.ask(question)
        print(self)

    def widget(self, *, save_to: str | Path = "transcript.jsonl") -> Any:
        """The box as one ipywidgets widget (7.7 and 8)."""
        import ipywidgets as w

        wide, width = w.Layout(width="auto"), {"description_width": "110px"}
        named = dict(layout=wide, style=width)
        sides = {_(name): (side,) for side, name in MODELS.items()} | {_("both, side by side"): ("tuned", "base")}
        made = self._widgets = {
            "history": w.HTML(),
            "question": w.Text(placeholder=_("Your question"), layout=wide),
            "send": w.Button(description=_("Send"), button_style="primary"),
            "stop": w.Button(description=_("Stop"), disabled=True),
            "reset": w.Button(description=_("Reset")),
            "save": w.Button(description=_("Save transcript")),
            "status": w.Label(),
            "sides": w.Dropdown(options=list(sides), description=_("Ask"), disabled=not self.has_base, **named),
            "system": w.Textarea(value=self.system, description=_("System prompt"), rows=2, **named),
            "temperature": w.FloatSlider(self.temperature, min=0, max=2, step=0.1, description="temperature", **named),
            "min_p": w.FloatSlider(self.min_p, min=0, max=0.5, step=0.01, description="min_p", **named),
            "max_new_tokens": w.IntSlider(
                self.max_new_tokens, min=8, max=max(8, self.max_seq_length // 2), description=_("max tokens"), **named
            ),
        }
        for name in ("system", "temperature", "min_p", "max_new_tokens"):
            setattr(self, name, made[name].value)  # a slider keeps to its range, and the box to its sliders
            made[name].observe(lambda change, name=name: setattr(self, name, change["new"]), "value")
        made["sides"].observe(lambda change: setattr(self, "sides", sides[change["new"]]), "value")
        made["send"].on_click(lambda button: self._send())
        made["question"].on_submit(lambda field: self._send())
        made["stop"].on_click(lambda button: self._stop.set())
        made["reset"].on_click(lambda button: self.reset())
        made["save"].on_click(lambda button: self._save(save_to))
        # Laid out from below, so that the newest text stays in view while it grows.
        scrolled = w.Layout(max_height="420px", overflow="auto", flex_flow="column-reverse", border="1px solid #ccc")
        buttons = w.HBox([made[name] for name in ("send", "stop", "reset", "save", "status")])
        settings = [made[name] for name in ("sides", "system", "temperature", "min_p", "max_new_tokens")]
        made["history"].add_class("chat-history")
        self._draw(now=True)
        return w.VBox([w.Box([made["history"]], layout=scrolled), made["question"], buttons, *settings])

    def _save(self, path: str | Path) -> None:
        self._say(_("saved: {path}", path=short_path(self.save_transcript(path))))

    def _send(self) -> None:
        """Answer in a thread, so that the kernel stays free to hear the stop button."""
        question = self._widgets["question"].value.strip()
        if not question or self._busy.locked():
            return
        self._widgets["question"].value = ""
        self._widgets["send"].disabled, self._widgets["stop"].disabled = True, False
        self._say(_("writing …"))
        threading.Thread(target=self._answer, args=(question,), daemon=True).start()

    def _answer(self, question: str) -> None:
        try:
            self.ask(question)
            self._say("")
        except ChatError as error:
            self._say(str(error))
        except Exception as error:  # in a thread it would end nowhere: show it
            self._say(f"{type(error).__name__}: {error}")
        finally:
            self._draw(now=True)
            self._widgets["send"].disabled, self._widgets["stop"].disabled = False, True

    def _say(self, text: str) -> None:
        self._widgets["status"].value = text

    def _draw(self, *, now: bool = False) -> None:
        if self._widgets and (now or time.monotonic() - self._drawn > REFRESH_SECONDS):
            self._drawn = time.monotonic()
            self._widgets["history"].value = self.html()


def _bubble(kind: str, who: str, text: str) -> str:
    return BUBBLE.format(colour=COLOURS[kind], who=f"<b>{who}</b>\n" if who else "", text=html.escape(text))


def has_reader() -> bool:
    """Whether a person can answer: papermill and nbval run cells without a channel to type into, browsers with one.

    Colab's own kernel says nothing of it: `tests.maintain.series` sets HEADLESS=1 for the chapters that it runs.
    """
    if os.environ.get("HEADLESS") == "1":
        return False
    if "google.colab" in sys.modules:
        return True
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))
