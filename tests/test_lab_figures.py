"""lab.figures: the promises of the one style."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from kfqn_core.lab import figures


@pytest.fixture(autouse=True)
def _no_display():
    mpl.use("agg")
    with mpl.rc_context():
        yield
    mpl.pyplot.close("all")


def _luma(color) -> float:
    return float(np.dot(to_rgb(color), (0.299, 0.587, 0.114)))


def test_colors_stay_apart_in_grey():
    gaps = [abs(_luma(a) - _luma(b)) for a, b in itertools.combinations(figures.COLORS, 2)]
    assert min(gaps) > 0.11
    assert len(set(figures.LINE_STYLES)) == len(figures.COLORS)


def test_compare_matrices_uses_one_scale_for_all_panels():
    figures.use_style()
    exact = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    _, axes = figures.compare_matrices(exact, -exact)
    images = [ax.get_images()[0] for ax in axes]
    assert {image.get_clim() for image in images} == {(-4.0, 4.0)}
    np.testing.assert_allclose(images[2].get_array(), 2 * exact.numpy())
    assert axes[2].get_xlabel() == "relative error 2.0e+00"


def test_matrix_map_rises_in_luminance():
    figures.use_style()
    greys = [_luma(mpl.colormaps[mpl.rcParams["image.cmap"]](v)[:3]) for v in np.linspace(0, 1, 32)]
    assert (np.diff(greys) > 0).all()


def test_zero_is_white_where_there_are_signs():
    _, axes = figures.compare_matrices(torch.eye(2), -torch.eye(2))
    image = axes[0].get_images()[0]
    assert _luma(image.cmap(image.norm(0.0))[:3]) > 0.95


def test_show_images_lays_out_rows():
    _, axes = figures.show_images({"input": torch.zeros(3, 6), "output": torch.ones(3, 6)}, (2, 3))
    assert axes.shape == (2, 3)
    assert axes[1, 0].get_ylabel() == "output"
    assert axes[1, 2].get_images()[0].get_array().shape == (2, 3)


def test_figures_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="one shape"):
        figures.compare_matrices(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="three titles"):
        figures.compare_matrices(torch.zeros(2, 2), torch.zeros(2, 2), titles=("a", "b"))
    with pytest.raises(ValueError, match="same number"):
        figures.show_images({"a": torch.zeros(2, 4), "b": torch.zeros(3, 4)}, (2, 2))
