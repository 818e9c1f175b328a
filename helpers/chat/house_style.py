"""Is a support reply in the house style, and does it give the right help? Counted by a program, not by eye."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What `judge_reply` found in one reply."""

    house_style: bool
    right_help: bool


def judge_reply(reply: str, *, product: str, right_help: Sequence[str]) -> Verdict:
    """Judge one reply: three lines (product, next step, team) make the style; one of `right_help` makes the help.

    Example:
        >>> reply = "Re: Solvi lamp, wifi\\nNext step: restart your router.\\nHave a good day. — Mossbell Care"
        >>> judge_reply(reply, product="Solvi lamp", right_help=["router", "2.4 GHz"])
        Verdict(house_style=True, right_help=True)
    """
    lines = reply.strip().split("\n")
    house_style = (
        len(lines) == 3
        and lines[0].startswith(f"Re: {product}, ")
        and lines[1].startswith("Next step: ")
        and lines[2].endswith(" — Mossbell Care")
    )
    return Verdict(house_style, any(words.lower() in reply.lower() for words in right_help))
