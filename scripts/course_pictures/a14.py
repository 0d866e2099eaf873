from __future__ import annotations

from matplotlib.figure import Figure

import effzoo
from scripts.pictures import BLUE, GREEN, GREY, INK, ORANGE, PINK

ALL = "(attn.q, attn.k, attn.v, attn.o, mlp.up, mlp.down)"
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def counted(peft: str, layers: int) -> int:
    """What a method trains, with the head."""
    model = effzoo.build("minilm", layers=layers, task="classification", num_labels=2, pooling="mean", peft=peft)
    return effzoo.account(model).trainable


def draw() -> Figure:
    """What fits into 150,000 numbers, counted on MiniLM with a head for two labels."""
    asked = [
        ("the head alone", "head", 6, GREY),
        ("biases (BitFit), 6 layers", "bitfit", 6, GREEN),
        ("LoRA of rank 8 on q and v, 6 layers", "lora[rank=8]", 6, BLUE),
        ("LoRA of rank 8 on all matrices, 1 layer", f"lora[rank=8, targets={ALL}]", 1, BLUE),
        ("an adapter of 128, 1 layer", "pfeiffer[bottleneck=128]", 1, PINK),
        ("the rows of 350 words", "tokens[ids=0-349]", 1, ORANGE),
    ]
    spent = [(name, counted(peft, layers), colour) for name, peft, layers, colour in asked]
    figure = Figure(figsize=(7.6, 2.9), dpi=110)
    axes = figure.add_axes((0.44, 0.17, 0.52, 0.76))
    for place, (_, numbers, colour) in enumerate(spent):
        axes.barh(place, numbers, color=colour, height=0.62)
        axes.text(numbers + 2500, place, f"{numbers:,}", va="center", fontsize=8, color=INK, bbox=WHITE)
    axes.axvline(150_000, color=INK, linewidth=1, linestyle="--")
    axes.set(yticks=range(len(spent)), yticklabels=[name for name, _, _ in spent], xlim=(0, 178_000))
    axes.set_xticks([0, 50_000, 100_000, 150_000], ["0", "50,000", "100,000", "150,000"])
    axes.set_xlabel("numbers that change", fontsize=9, color=GREY)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.invert_yaxis()
    return figure
