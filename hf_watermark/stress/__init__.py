"""Does the mark survive? Attacks on a model, and a table of what they leave of it.

An attack (`attacks`) is a function from a model to a model with a record: its source, parameters,
whether it needs images. They lie in rooms by noun, `pruning`, `quantization`, `finetuning`,
`erasure`, `overwriting`, `merging`, `disguises`, and are put together in `suite`. A `Stress` run
(`runner`) attacks a copy of the victim (`victims`) with the attacker's part of the images
(`examples`), saves it, reads it as `hf_watermark.verify` does, and keeps the outcome (`outcomes`)
on disk, cell by cell; `table` and `plot` show them.

A mark counts as removed only if it is not found while accuracy fell by less than five points:
whoever ruins the model has won nothing. No attack has the owner's key.
"""

from __future__ import annotations

from hf_watermark.stress.attacks import Attack, Means
from hf_watermark.stress.runner import Settings, Stress
from hf_watermark.stress.suite import ATTACKS, attacks_of

__all__ = ["ATTACKS", "Attack", "Means", "Settings", "Stress", "attacks_of"]
