"""The pictures that the chapters draw of their own numbers."""

import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.messages import _

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, on light and dark paper.
FROZEN, TRAINED, MARK = "#9aa0a6", "#0072b2", "#d55e00"

FONT, SHIPPED_BY = "Noto Sans SC", "zhplot"  # it has the Chinese letters that Matplotlib's own font lacks


def as_image(figure: "Figure") -> "Image":
    """A figure as one PNG that shows in Jupyter, Colab and papermill alike, without an active pyplot backend."""
    from io import BytesIO

    from IPython.display import Image

    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return Image(data=png.getvalue(), format="png")


@functools.cache
def families() -> list[str]:
    """The fonts to draw with: Matplotlib's own, and for letters that it lacks the one that zhplot ships."""
    from matplotlib import font_manager, rcParams

    package = importlib.util.find_spec(SHIPPED_BY)
    if package is None:
        return list(rcParams["font.family"])
    for path in font_manager.findSystemFonts([str(Path(package.origin).with_name("fonts"))]):
        font_manager.fontManager.addfont(path)
    return [*rcParams["font.family"], FONT]


def label(message: str, /, **values: object) -> str:
    """A text of a picture in the reader's language, or in English where there is no font for it."""
    return _(message, **values) if FONT in families() else message.format(**values)


def draw_lora(*, out_features: int, in_features: int, rank: int) -> "Image":
    """A frozen weight and its LoRA detour, edges to scale; thin sides are drawn at least 1/14 of the longest edge."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    longest = max(out_features, in_features)
    tall, wide, thin = out_features / longest, in_features / longest, max(rank / longest, 1 / 14)
    figure = Figure(figsize=(7, 3), layout="constrained")
    with rc_context({"font.family": families()}):
        axes = figure.subplots()
    left = wide + 0.75
    boxes = [
        (0, 0, wide, tall, FROZEN),
        (left, 0, thin, tall, TRAINED),
        (left + thin + 0.12, tall - thin, wide, thin, TRAINED),
    ]
    shape = f"{out_features} × {in_features}\n{out_features * in_features:,}"
    texts = [
        (wide / 2, tall / 2, label("W, frozen\n{shape}", shape=shape), "center", "center"),
        (
            left + thin + 0.12,
            0.04,
            label("B, trained, starts at 0\n{shape}", shape=f"{out_features} × {rank}"),
            "left",
            "bottom",
        ),
        (
            left + thin + 0.12 + wide / 2,
            tall - thin - 0.05,
            label("A, trained\n{shape}", shape=f"{rank} × {in_features}"),
            "center",
            "top",
        ),
    ]
    for x, y, width, height, colour in boxes:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none"))
    count = rank * (out_features + in_features)
    told = label(
        "r = {rank}: {count:,} trained numbers, {percent:.1f} % of what they adapt",
        rank=rank,
        count=count,
        percent=100 * count / out_features / in_features,
    )
    with rc_context({"font.family": families()}):
        for x, y, text, across, along in texts:
            axes.text(x, y, text, ha=across, va=along)
        axes.text(wide + 0.375, tall / 2, "+  $\\frac{\\alpha}{r}\\cdot$", ha="center", va="center", fontsize=16)
        axes.set_title(told, fontsize=10)
    axes.set(xlim=(-0.02, left + thin + 0.14 + wide), ylim=(-0.02, tall + 0.02), aspect="equal")
    axes.axis("off")
    return as_image(figure)
