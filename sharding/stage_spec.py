"""What a stage is told to hold. Apart from `stage.py`, so that planning does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from sharding.model.rotation import Stretch


@dataclass(frozen=True)
class StageSpec:
    """Layers `[start, stop)` of the model file `model`, and so many KV pages.

    `window_pages`: those of layers with a window, if the model mixes such with others. `stretch`:
    see `sharding.model.rotation`. `context`: most tokens of a request; some models turn otherwise
    where that is more than they were first trained for.
    """

    model: str
    start: int
    stop: int
    pages: int
    kernels: str
    stretch: Stretch | None = None
    window_pages: int = 0
    context: int = 0
