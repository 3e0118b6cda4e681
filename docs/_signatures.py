"""For the API page: the signatures that `tumorsynth.arguments.keywords_of` makes at run time."""

from __future__ import annotations

import inspect
from typing import Any

import griffe


class Signatures(griffe.Extension):
    """Shows the parameters in place of ``**settings`` on every class with that decorator."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Replace the parameters of the class's constructor."""
        if not any("keywords_of" in str(decorator.value) for decorator in cls.decorators):
            return
        try:
            signature = inspect.signature(griffe.dynamic_import(cls.path).__init__)
        except ImportError:  # of a framework, or a release of it, that is not installed
            return
        parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    one.name,
                    annotation=None if one.annotation is one.empty else str(one.annotation),
                    kind=griffe.ParameterKind(one.kind.description),
                    default=None if one.default is one.empty else repr(one.default),
                )
                for one in signature.parameters.values()
            )
        )
        if "__init__" in cls.members:
            cls.members["__init__"].parameters = parameters
        else:  # a constructor that the class inherits
            cls.set_member("__init__", griffe.Function("__init__", parameters=parameters))
