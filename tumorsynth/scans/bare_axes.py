"""Axes of matplotlib for a picture alone, without ticks.

Making ticks takes most of the time of a small figure, even where none is drawn.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis


class _BareXAxis(XAxis):
    def set_clip_path(self, *args: Any, **kwargs: Any) -> None:  # makes ticks to clip them
        pass


class _BareYAxis(YAxis):
    def set_clip_path(self, *args: Any, **kwargs: Any) -> None:
        pass


class BareAxes(Axes):
    """Axes that show their background and what is drawn into them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_axis_off()

    def grid(self, *args: Any, **kwargs: Any) -> None:
        pass

    def tick_params(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _init_axis(self) -> None:
        """The hook of a projection: a matplotlib that does not ask it draws the same, slower."""
        self.xaxis = _BareXAxis(self, clear=False)
        self.yaxis = _BareYAxis(self, clear=False)
