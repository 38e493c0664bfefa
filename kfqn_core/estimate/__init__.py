"""From what a mini-batch showed to the two factors of a layer."""
