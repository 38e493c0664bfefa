"""What several test files share."""

from collections.abc import Callable, Iterator

import pytest

SLACK = 1 + 1e-9  # several bounds are attained; conditions up to 1e3 leave the ratios far more accurate than this


@pytest.fixture
def achieved(record_property: Callable[[str, object], None]) -> Iterator[Callable[[str, float, float], None]]:
    """`achieved(name, value, bound)` asserts value <= bound; the largest ratios go to `--junitxml` (xunit1)."""
    largest: dict[str, float] = {}

    def compare(name: str, value: float, bound: float) -> None:
        ratio = float(value) / float(bound)
        assert ratio < SLACK, f"{name}: {float(value):.3g} exceeds its bound {float(bound):.3g}"
        largest[name] = max(largest.get(name, 0.0), ratio)

    yield compare
    for name, ratio in largest.items():
        record_property(f"{name}, achieved/bound", round(ratio, 4))
