"""Refuses to copy or pickle objects that hold connections or tasks.

A copy would share the connections of the original, or would have none and count permits that it does not hold; a pickle
would contain the key. Without this check, some copies fail later, with an error of a lock or of an event loop that says
nothing about copies, and others seem to work.
"""

from __future__ import annotations

from typing import ClassVar, NoReturn, SupportsIndex


class NotCopyable:
    """The base class of objects that belong to one event loop, and can neither be copied nor pickled.

    `copy.copy`, `copy.deepcopy` and `pickle` raise a `TypeError`. So do `copy.deepcopy` and `pickle` for any object
    that contains such an object.
    """

    __slots__ = ()

    _instead_of_a_copy: ClassVar[str]
    """What to do in place of copying, for the text of the error."""

    # copy.copy, copy.deepcopy and pickle all end up here.
    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"this {type(self).__name__} cannot be copied or pickled, because it belongs to one event loop of one"
            f" process; {self._instead_of_a_copy}"
        )
