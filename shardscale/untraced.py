"""Methods that run as they are, also when the code that calls them is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

# torch.compiler.disable imports torch._dynamo, half a second that an import should not take. This
# is what torch's own optimizers use in its place: it waits for the first call.
from torch._compile import _disable_dynamo

__all__ = ["leave_untraced"]

Class = TypeVar("Class", bound=type)


def leave_untraced(*names: str) -> Callable[[Class], Class]:
    """A class decorator: ``torch.compile`` traces neither these methods nor what they call.

    In compiled code each call of them is one graph break. Traced, they would be many: they keep
    books about single calls, optimizers and verdicts, and a compiler that guards on those compiles
    again in every iteration.

    Args:
        names: Methods of the class, its own or inherited.

    >>> @leave_untraced("double")
    ... class Number(int):
    ...     def double(self) -> int:
    ...         return 2 * self
    >>> Number(4).double()
    8
    """

    def mark(marked: Class) -> Class:
        for name in names:
            setattr(marked, name, _disable_dynamo(getattr(marked, name)))
        return marked

    return mark
