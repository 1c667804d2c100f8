"""Model cards that a tool drafted, told from those that people wrote or touched."""

from __future__ import annotations

from collections.abc import Iterable

from hf_watermark.card import without_watermark

__all__ = ["Drafts"]


class Drafts:
    """What was drafted for a card, the watermark's part aside."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def add(self, text: str) -> None:
        """A card that was drafted."""
        self._known.add(without_watermark(text))

    def note(self, before: bytes | None, after: bytes | None) -> None:
        """A card that a tool may have drafted, or a draft that it edited.

        Saving an adapter makes peft write a template, or edit the card that is there.
        """
        if after is None or after == before:
            return
        if before is None or without_watermark(before.decode()) in self._known:
            self.add(after.decode())

    def first_other(self, cards: Iterable[str | None]) -> str | None:
        """The first card that is no draft."""
        touched = (card for card in cards if card and without_watermark(card) not in self._known)
        return next(touched, None)
