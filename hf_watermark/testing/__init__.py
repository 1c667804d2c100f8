"""A Hub on this machine, for tests and demos.

`LoopbackHub` serves the Hub's API from a folder: the real clients, `huggingface_hub`,
`transformers` and `datasets`, talk to it through `HF_ENDPOINT`, push and pull, and meet the faults
that a test orders. `hub.requests` tells what was asked and how many bytes went out;
`hub.bytes_of(repo)` is everything that was stored.
"""

from hf_watermark.testing.faults import Fault, Faults, ServedRequest
from hf_watermark.testing.hub import LoopbackHub

__all__ = ["Fault", "Faults", "LoopbackHub", "ServedRequest"]
