"""Keep torch.compile out of functions that draw, loop and report in Python."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

REASON = (
    "tumour synthesis draws, loops and reports in Python, which torch.compile cannot trace; "
    "compile without fullgraph=True, or call the synthesis outside of the compiled function"
)


def untraced(function: Function) -> Function:
    """Decorate a function that runs uncompiled, with all that it calls, in code that is compiled.

    `torch.compiler.disable` does the same, but it imports the compiler where it decorates, which
    takes seconds. This imports nothing, and without the compiler in memory the call is a plain one.
    """
    excluded: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not excluded:
            excluded.append(_exclude(function, call))
        return excluded[0](*args, **kwargs)

    # what torch.compiler.disable sets, so that the compiler does not look into the function
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _exclude(function: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs uncompiled; its wrapper is not compiled either."""
    decorators = sys.modules.get("torch._dynamo.decorators")
    skip = getattr(decorators, "skip", None)  # not public; without it the wrapper is compiled
    if skip is not None:
        skip(call)
    return torch.compiler.disable(function)
