"""Soft labels that carry a mark into every student distilled from them.

`SoftLabelWatermark` wraps a classifier. Its key picks features of the image (`features`) and, for
every customer, signs that say which way each feature bends each class (`chips`); the probabilities
are bent that way as far as the most likely class allows (`perturbation`). A student learns the
bending along with the labels: regressing its outputs on the features shows the signs of whoever
leaked (`detection`, numpy alone), which `hf_watermark.verify.verify_outputs` turns into evidence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_watermark.softlabels.wrapper import SoftLabelWatermark

__all__ = ["SoftLabelWatermark"]


def __getattr__(name: str) -> Any:
    # Lazily: verifying a suspect's outputs needs the rooms below, but not torch.
    if name == "SoftLabelWatermark":
        from hf_watermark.softlabels.wrapper import SoftLabelWatermark

        return SoftLabelWatermark
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
