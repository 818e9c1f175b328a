"""The pictures that the chapters draw of their own numbers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, on light and dark paper.
FROZEN, TRAINED, MARK = "#9aa0a6", "#0072b2", "#d55e00"


def as_image(figure: "Figure") -> "Image":
    """A figure as one PNG that shows in Jupyter, Colab and papermill alike, without an active pyplot backend."""
    from io import BytesIO

    from IPython.display import Image

    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return Image(data=png.getvalue(), format="png")


def draw_lora(*, out_features: int, in_features: int, rank: int) -> "Image":
    """A frozen weight and its LoRA detour, edges to scale; thin sides are drawn at least 1/14 of the longest edge."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    longest = max(out_features, in_features)
    tall, wide, thin = out_features / longest, in_features / longest, max(rank / longest, 1 / 14)
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    left = wide + 0.75
    boxes = [
        (0, 0, wide, tall, FROZEN, f"W, frozen\n{out_features} × {in_features}\n{out_features * in_features:,}"),
        (left, 0, thin, tall, TRAINED, f"B, trained, starts at 0\n{out_features} × {rank}"),
        (left + thin + 0.12, tall - thin, wide, thin, TRAINED, f"A, trained\n{rank} × {in_features}"),
    ]
    for x, y, width, height, colour, _ in boxes:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none"))
    axes.text(wide / 2, tall / 2, boxes[0][5], ha="center", va="center")
    axes.text(left + thin + 0.12, 0.04, boxes[1][5], ha="left", va="bottom")
    axes.text(left + thin + 0.12 + wide / 2, tall - thin - 0.05, boxes[2][5], ha="center", va="top")
    axes.text(wide + 0.375, tall / 2, "+  $\\frac{\\alpha}{r}\\cdot$", ha="center", va="center", fontsize=16)
    count, share = rank * (out_features + in_features), rank * (out_features + in_features) / out_features / in_features
    axes.set_title(f"r = {rank}: {count:,} trained numbers, {100 * share:.1f} % of what they adapt", fontsize=10)
    axes.set(xlim=(-0.02, left + thin + 0.14 + wide), ylim=(-0.02, tall + 0.02), aspect="equal")
    axes.axis("off")
    return as_image(figure)
