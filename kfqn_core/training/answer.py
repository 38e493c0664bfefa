"""Asking the device something without waiting for its answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Answer:
    """The values of a tensor, on the host as soon as the device has got that far.

    A step reads nothing on the host; what it would like to know it asks for, and goes on as if it were not known.

    Args:
        values: `[n]`; a copy is asked for.
    """

    def __init__(self, values: Tensor):
        self._event: torch.cuda.Event | None = None
        if values.is_cuda and torch.cuda.is_current_stream_capturing():
            self._host: Tensor | None = None  # nothing happens while a graph is captured
        elif values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            # A tensor without values (of FakeTensorMode, or on "meta") will never answer.
            has_values = type(values) is Tensor and values.device.type != "meta"
            self._host = values.to("cpu", copy=True) if has_values else None

    def known(self, *, wait: bool = False) -> list[Any] | None:
        """The values; None as long as they are not there, unless `wait`."""
        if self._host is None:
            return None
        if self._event is not None and not self._event.query():
            if not wait:
                return None
            self._event.synchronize()
        return self._host.tolist()
