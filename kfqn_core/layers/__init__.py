"""A layer as `h = W a`: one file a kind, one table of kinds, one door."""

from kfqn_core.layers.convolution import ConvView
from kfqn_core.layers.kinds import SUPPORTED, view
from kfqn_core.layers.linear import LinearView
from kfqn_core.layers.view import LayerView, UnsupportedLayer

__all__ = ["SUPPORTED", "ConvView", "LayerView", "LinearView", "UnsupportedLayer", "view"]
