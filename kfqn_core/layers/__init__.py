"""A layer as `h = W a`: one file a kind, one table of kinds, one door."""

from kfqn_core.layers.convolution import ConvView
from kfqn_core.layers.kinds import SUPPORTED, Part, parts, view
from kfqn_core.layers.linear import LinearView
from kfqn_core.layers.view import Call, LayerView, UnsupportedLayer

__all__ = ["SUPPORTED", "Call", "ConvView", "LayerView", "LinearView", "Part", "UnsupportedLayer", "parts", "view"]
