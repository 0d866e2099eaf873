"""Pictures show what the kinds attend to, in a figure and in the terminal; learning curves show what the history
holds."""

import io

import matplotlib.image
import pytest
import torch

import effzoo
from effzoo import plots
from effzoo.attention import AttentionCore, Context, Part, memory_part
from effzoo.attention.longformer import Longformer
from effzoo.errors import InputError, OptionError, UnknownNameError


def test_the_pattern_of_the_window_is_that_of_its_definition():
    cells = plots.pattern("longformer[window=4]", 9)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    assert torch.equal(cells, torch.where(distance <= 2, plots.ATTENDED, plots.NOT).to(torch.int8))


def test_rows_and_columns_of_global_tokens_have_a_value_of_their_own():
    cells = plots.pattern("longformer[window=2]", 8, is_global=(3,))
    assert (cells[3] == plots.GLOBAL).all() and (cells[:, 3] == plots.GLOBAL).all()
    assert cells[0].tolist() == [1, 1, 0, 2, 0, 0, 0, 0]
    causal = plots.pattern("longformer[window=2]", 8, is_global=(3,), causal=True)
    assert (causal.triu(1) == plots.NOT).all() and causal[3].tolist() == [2, 2, 2, 2, 0, 0, 0, 0]


def test_a_core_is_drawn_like_its_spec():
    core = Longformer(Context(heads=2, head_dim=4, causal=True), window=4)
    assert torch.equal(plots.pattern(core, 7), plots.pattern("longformer[window=4]", 7, causal=True))
    assert torch.equal(plots.pattern({"name": "longformer", "window": 4}, 7), plots.pattern("longformer[window=4]", 7))


@pytest.mark.parametrize("n", [1, 7, 33])
@pytest.mark.parametrize("causal", [False, True])
def test_a_kind_without_pattern_is_probed_and_shows_what_it_attends(n, causal):
    class Undeclared(AttentionCore):
        """A window that does not say so."""

        cost = "n^2"

        def forward(self, q, k, v, *, mask, memory=None):
            allowed = Longformer(self.context, window=4).pattern(q.shape[2], mask)
            return self.attend(Part(q, k, v, effzoo.attention.bias_of(allowed, q.dtype)), memory_part(q, memory))

    with effzoo.scope():
        effzoo.attention.register("undeclared")(Undeclared)
        assert torch.equal(
            plots.pattern("undeclared", n, causal=causal), plots.pattern("longformer[window=4]", n, causal=causal)
        )


def test_the_text_has_one_half_block_per_pair_of_queries():
    lines = plots.pattern_text("longformer[window=2]", 5).splitlines()
    assert lines[0] == "██▄  "
    above = torch.tensor([[bool(" ▀▄█".index(c) & 1) for c in line] for line in lines[:3]])
    below = torch.tensor([[bool(" ▀▄█".index(c) & 2) for c in line] for line in lines[:3]])
    drawn = torch.stack([above, below], dim=1).reshape(6, 5)[:5]
    assert torch.equal(drawn, plots.pattern("longformer[window=2]", 5) != plots.NOT)
    assert "5 queries (down) x 5 keys (across)" in lines[3]


def test_many_positions_are_drawn_as_blocks_that_hide_nothing():
    lines = plots.pattern_text("longformer[window=8]", 1000, is_global=(500,), width=40).splitlines()
    assert len(lines) == 21 and all(len(line) == 40 for line in lines[:20])
    assert all(line[20] != " " for line in lines[:20]), "the column of the global token is one token wide"
    assert "a cell is 25 x 25 tokens" in lines[20]


def test_colours_tell_window_and_global_apart_in_the_terminal():
    text = plots.pattern_text("longformer[window=2]", 8, is_global=(3,), colour=True)
    assert "38;2;0;114;178" in text and "38;2;230;159;0" in text and "through a global token" in text
    assert "through a global token" not in plots.pattern_text("full", 8, colour=True)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "is_global"), [(16, (0, 9)), (200, (100,)), (1, ())])
def test_the_figure_is_a_png_with_labelled_axes(n, is_global):
    figure = plots.pattern_figure("longformer[window=8]", n, is_global=is_global)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        "key position",
        "query position",
        "longformer[window=8]",
    )
    image = matplotlib.image.imread(io.BytesIO(plots.png_bytes(figure)))
    assert image.shape[0] > 500 and image.shape[1] > 500
    colours = {tuple((255 * pixel[:3]).round().astype(int)) for pixel in image.reshape(-1, 4)}
    assert (0, 114, 178) in colours or n == 1
    assert ((230, 159, 0) in colours) == bool(is_global)


def test_the_legend_counts_pairs_and_leaves_out_what_there_is_none_of():
    legend = plots.pattern_figure("full", 8).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["attended (100 %)"]
    legend = plots.pattern_figure("longformer[window=2]", 10, is_global=(5,)).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "attended (23 %)",
        "through a global token (19 %)",
        "not attended (58 %)",
    ]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: plots.pattern("full", 0), OptionError),
        (lambda: plots.pattern("longformer", 8, is_global=(8,)), OptionError),
        (lambda: plots.pattern("full", 8, is_global=(0,)), InputError),
        (lambda: plots.pattern("fulll", 8), UnknownNameError),
        (lambda: plots.pattern_text("full", 8, width=0), OptionError),
        (lambda: plots.learning_curves([]), InputError),
        (lambda: plots.learning_curves([{"loss": 1.0}]), InputError),
        (lambda: plots.learning_curves([{"step": 1, "loss": 1.0}], metric="f1"), InputError),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, error):
    with pytest.raises(error):
        call()


HISTORY = [
    {"step": 10, "loss": 2.0, "learning_rate": 1e-3},
    {"step": 20, "loss": 1.0},
    {"step": 20, "eval_loss": 1.5, "eval_accuracy": 0.6, "eval_runtime": 3.0, "eval_samples_per_second": 9.0},
    {"step": 40, "loss": 0.5, "eval_loss": 1.2, "eval_accuracy": 0.8},
    {"step": 40, "train_runtime": 12.0, "train_loss": 1.2},
]


def data_of(axes):
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.get_lines()}


def test_curves_hold_the_numbers_of_the_history():
    loss, accuracy = plots.learning_curves(HISTORY).axes
    assert data_of(loss) == {"training": [(10, 2.0), (20, 1.0), (40, 0.5)], "validation": [(20, 1.5), (40, 1.2)]}
    assert data_of(accuracy) == {"validation": [(20, 0.6), (40, 0.8)]}
    assert (loss.get_xlabel(), loss.get_ylabel(), accuracy.get_ylabel()) == (
        "optimizer step",
        "loss",
        "validation accuracy",
    )
    assert accuracy.get_ylim()[1] >= 1


def test_several_runs_have_names_colours_and_markers_of_their_own():
    figure = plots.learning_curves(
        {"lora": HISTORY, "prefix": [{"step": 5, "loss": 3.0}], "bitfit": HISTORY}, title="three"
    )
    assert list(data_of(figure.axes[0])) == [
        "lora, training",
        "lora, validation",
        "prefix, training",
        "bitfit, training",
        "bitfit, validation",
    ]
    drawn = {(line.get_color(), line.get_marker()) for line in figure.axes[1].get_lines()}
    assert len(drawn) == 2 and len({colour for colour, _ in drawn}) == 2 and len({marker for _, marker in drawn}) == 2


def test_without_a_metric_there_is_one_panel_and_another_metric_can_be_chosen():
    assert len(plots.learning_curves([{"step": 1, "loss": 1.0}]).axes) == 1
    (axes,) = plots.learning_curves([{"step": step, "loss": 0.7} for step in range(5)]).axes
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 0.7  # inside of the picture
    history = [{"step": 1, "loss": 1.0, "eval_loss": 1.0, "eval_perplexity": 9.0, "eval_f1": 0.5}]
    assert plots.learning_curves(history).axes[1].get_ylabel() == "validation perplexity"
    assert plots.learning_curves(history, metric="f1").axes[1].get_ylabel() == "validation f1"


def test_drawing_leaves_the_random_state_and_global_plotting_state_alone():
    import matplotlib

    torch.manual_seed(3)
    state, backend = torch.get_rng_state(), matplotlib.rcParams["backend"]
    plots.png_bytes(plots.pattern_figure("longformer", 20))
    assert torch.equal(state, torch.get_rng_state()) and matplotlib.rcParams["backend"] == backend
