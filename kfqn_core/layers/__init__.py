"""A layer as `h = W a`: one file a kind, one table of kinds, one door."""

from kfqn_core.layers.attention import InProjectionView
from kfqn_core.layers.convolution import ConvView
from kfqn_core.layers.embedding import EmbeddingView
from kfqn_core.layers.experts import ExpertsView
from kfqn_core.layers.kinds import SUPPORTED, parts, register, view
from kfqn_core.layers.linear import LinearView, TransposedLinearView
from kfqn_core.layers.transposed import TransposedConvView
from kfqn_core.layers.view import Call, LayerView, Part, UnsupportedLayer

__all__ = [
    "SUPPORTED",
    "Call",
    "ConvView",
    "EmbeddingView",
    "ExpertsView",
    "InProjectionView",
    "LayerView",
    "LinearView",
    "Part",
    "TransposedConvView",
    "TransposedLinearView",
    "UnsupportedLayer",
    "parts",
    "register",
    "view",
]
