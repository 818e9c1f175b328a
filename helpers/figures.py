"""The pictures that the chapters draw of their own numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure

    from helpers.memory.stats import Stage

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
    """A frozen weight and its LoRA detour, edges to scale; thin sides are drawn at least 1/14 of the longest edge.

    Args:
        out_features, in_features: the shape of the frozen weight.
        rank: LoRA's r.
    """
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


def draw_lengths(token_counts: Sequence[int], *, max_seq_length: int) -> "Image":
    """A histogram of conversation lengths in tokens, with the sequence length that was chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.hist(token_counts, bins=40, color=TRAINED)
    axes.axvline(max_seq_length, color=MARK, linewidth=2, label=f"max_seq_length = {max_seq_length}")
    axes.set(xlabel="tokens in a conversation", ylabel="conversations")
    axes.legend(frameon=False)
    return as_image(figure)


def draw_stages(stages: "Sequence[Stage]") -> "Image":
    """The peak memory of each stage, and what was in use at its end, against the card's (or machine's) size."""
    from matplotlib.figure import Figure

    labels = [stage.label for stage in stages]
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(stages)), layout="constrained")
    axes = figure.subplots()
    axes.barh(labels, [stage.peak_reserved_gib for stage in stages], color=FROZEN, label="at the peak")
    held = [stage.after.allocated_gib for stage in stages]
    axes.barh(labels, held, height=0.4, color=TRAINED, label="in use at the end")
    stats = stages[-1].after
    card = stats.device if stats.is_gpu else "this machine"
    axes.axvline(stats.total_gib, color=MARK, linewidth=2, label=f"{card}: {stats.total_gib:.1f} GiB")
    axes.set(xlabel="GiB", xlim=(0, 1.02 * stats.total_gib))
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="center right")
    return as_image(figure)
