"""Figures: what they hold, not how they look."""

import numpy as np

from difftori.experiments.paper.table8_figures import Curve, Swing, learning_curves, phase_plane
from difftori.experiments.plots import DASHES, MARKERS, PALETTE, save_svg

METHODS = ("expert", "bc", "lstm")


def swing() -> Swing:
    return Swing(np.linspace(0, 4, 10).reshape(2, 5), np.ones((2, 5)), "mean cost 1")


def test_every_method_can_be_told_apart_without_colour():
    assert len(set(PALETTE)) == len(PALETTE) == len(set(DASHES)) == len(set(MARKERS))


def test_curves_of_unequal_length_meet_on_their_common_epochs():
    curves = [Curve(np.arange(1, 5), np.full(4, 2.0)), Curve(np.arange(1, 8), np.full(7, 4.0))]
    figure = learning_curves({"one": {"bc": curves}, "two": {}}, METHODS, ylabel="error", caption="")
    bold = [line for line in figure.axes[0].lines if line.get_label() == "bc"]
    assert len(figure.axes) == 2
    assert len(bold) == 1
    assert bold[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert bold[0].get_ydata().tolist() == [3.0] * 4


def test_curves_show_the_least_error_so_far():
    curve = Curve(np.arange(1, 6), np.array([4.0, 2.0, 3.0, 1.0, 5.0]))
    figure = learning_curves({"one": {"bc": [curve]}}, METHODS, ylabel="error", caption="")
    assert all(line.get_ydata().tolist() == [4, 2, 2, 1, 1] for line in figure.axes[0].lines)


def test_phase_planes_show_the_methods_that_ran_each_in_its_colour(tmp_path):
    panels = {"one": {"lstm": swing()}, "two": {"expert": swing(), "lstm": swing()}}
    figure = phase_plane(panels, METHODS, reference="expert", caption="of a test")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["expert (not run)", "lstm\nmean cost 1", "expert\nmean cost 1", "lstm\nmean cost 1"]
    assert figure.axes[1].lines[-1].get_color() == PALETTE[METHODS.index("lstm")]


def test_the_same_figure_is_the_same_file(tmp_path):
    for name in ("new/a.svg", "b.svg"):
        figure = phase_plane({"one": {"lstm": swing()}}, METHODS, reference="expert", caption="of a test")
        save_svg(figure, tmp_path / name)
    assert (tmp_path / "new" / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "of a test" in (tmp_path / "b.svg").read_text()
