"""Exact second derivatives of small networks; nothing here is needed to train."""
