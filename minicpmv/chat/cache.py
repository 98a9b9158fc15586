"""The images and videos of a conversation, which are read once.

What is special:
- They are known again by what the caller gave: the same object or text, or a path whose file has not changed.
- What is known keeps its slices, and these what models made of them; so nothing here holds features.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple


class KnownMedia(NamedTuple):
    source: Any  # what the caller gave; kept, so that its id stays its own
    made: Any  # what the processor made of it
    file: tuple[int, int] | None  # time and size of the file

    @property
    def slices(self) -> list:
        return [part for image in getattr(self.made, "frames", [self.made]) for part in image.pixel_values]


class MediaCache:
    """The media cache of one conversation, as the processor asks it (`MiniCPMVProcessor.__call__`).

    Copies share what is known, and change apart.
    """

    def __init__(self) -> None:
        self._known: dict[tuple, KnownMedia] = {}  # (kind, what the caller gave) -> ...

    def get(self, kind: str, sources: list, make: Callable[[list], list]) -> list:
        """What the processor made of images or videos; made now of those that are new, or whose files changed."""
        keys = [(kind, s if isinstance(s, (str, bytes, os.PathLike)) else id(s)) for s in sources]
        new = {}
        for key, source in zip(keys, sources, strict=True):
            known, file = self._known.get(key), _file_state(source)
            if known is None or file not in (None, known.file):  # a file that is gone has not changed
                new[key] = source, file
        made_of_new = make([source for source, _ in new.values()])
        pairs = zip(new.items(), made_of_new, strict=True)
        self._known = self._known | {key: KnownMedia(source, made, file) for (key, (source, file)), made in pairs}
        return [self._known[key].made for key in keys]

    def keep_only(self, units: list) -> None:
        """Forget the images and videos that are not among the visual units of the conversation."""
        kept = {id(part) for unit in units for part in unit.slices}
        self._known = {key: known for key, known in self._known.items() if kept.issuperset(map(id, known.slices))}


def _file_state(source: Any) -> tuple[int, int] | None:
    """Time and size of the file at a path, which tell whether it was written anew; None where there is none."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        found = os.stat(source)
    except (OSError, ValueError):  # an address, a data URL, or a file that is gone
        return None
    return found.st_mtime_ns, found.st_size
