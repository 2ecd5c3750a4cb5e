"""Collects metrics between two log lines and averages them over steps and ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from refreward_trl.types import Metrics

Sums = dict[str, tuple[float, int]]


class MetricRecorder:
    """Means of metrics since the last `flush`; a NaN means "undefined here" and is left out of its mean."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = defaultdict(list)
        self._sums: Sums = {}

    def record(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Adds one value per metric. Tensors are only read at the next `flush`, so that no device has to wait."""
        for name, value in metrics.items():
            self._values[name].append(value.detach() if isinstance(value, Tensor) else value)

    def flush(self, gather: Callable[[list[Sums]], list[Sums]]) -> Metrics:
        """Returns the means over all ranks in first-recorded order and starts anew.

        Args:
            gather: Takes this rank's list and returns the concatenation over ranks.
        """
        means: Metrics = {}
        totals: dict[str, tuple[float, int]] = {}
        for sums in gather([self._drain()]):
            for name, (total, count) in sums.items():
                so_far = totals.get(name, (0.0, 0))
                totals[name] = (so_far[0] + total, so_far[1] + count)
        for name, (total, count) in totals.items():
            means[name] = total / count if count else math.nan
        self._sums = {}
        return means

    def state(self) -> dict[str, Any]:
        """Returns what was recorded since the last flush, as JSON."""
        return {name: list(pair) for name, pair in self._drain().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores `state()`."""
        self._values.clear()
        self._sums = {name: (float(total), int(count)) for name, (total, count) in state.items()}

    def _drain(self) -> Sums:
        for name, values in self._values.items():
            numbers = [float(value) for value in values]
            defined = [number for number in numbers if not math.isnan(number)]
            total, count = self._sums.get(name, (0.0, 0))
            # Added one by one: the sum must not depend on where a checkpoint cut the sequence.
            for number in defined:
                total += number
            self._sums[name] = (total, count + len(defined))
        self._values.clear()
        return self._sums
