"""Phantoms that several files use, made once: copy one before changing it in place."""

from __future__ import annotations

from functools import cache

from tumorsynth.phantom import Phantom, make_phantom


@cache
def shared_phantom(
    spacing: tuple[float, float, float], shape: tuple[int, int, int] | None = None
) -> Phantom:
    return make_phantom(spacing=spacing, shape=shape)
