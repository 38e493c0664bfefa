"""Kinds of faults that users met in the field, and how each is to go: programs that Adam runs, run with KFQN."""
