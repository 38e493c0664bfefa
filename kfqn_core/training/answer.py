"""Asking the device something without waiting for its answer."""

from __future__ import annotations

import torch
from torch import Tensor


class Answer:
    """The values of a boolean tensor, on the host as soon as the device has got that far.

    A step reads nothing on the host; what it would like to know it asks for, and goes on as if it were not known.

    Args:
        flags: bool, `[n]`; a copy is asked for.
    """

    def __init__(self, flags: Tensor):
        self._event: torch.cuda.Event | None = None
        if flags.is_cuda and torch.cuda.is_current_stream_capturing():
            self._host: Tensor | None = None  # nothing happens while a graph is captured
        elif flags.is_cuda:
            self._host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._host.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            # A tensor without values (of FakeTensorMode, or on "meta") will never answer.
            has_values = type(flags) is Tensor and flags.device.type != "meta"
            self._host = flags.to("cpu", copy=True) if has_values else None

    def known(self, *, wait: bool = False) -> list[bool] | None:
        """The values; None as long as they are not there, unless `wait`."""
        if self._host is None:
            return None
        if self._event is not None and not self._event.query():
            if not wait:
                return None
            self._event.synchronize()
        return [bool(flag) for flag in self._host.tolist()]
