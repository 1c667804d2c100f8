"""Prove who made a vision model.

An `OwnerKey` is 32 secret bytes. A `Scheme` says what is embedded and how it is read. From both
come projections of a model's carriers, the largest layer of every block: embedding moves the
carriers until each secret response agrees with a secret message bit, extraction reads the responses
back, and significance says how unlikely the agreement is for a model that never saw the key.

- Embed while training: `hf_watermark.trainer.WatermarkTrainer`, or, in a loop of your own,
  `hf_watermark.embedding.WatermarkLoss`.
- Verify, from the Hub or a folder: `hf_watermark.verify.verify_hub_model`, or the command of that
  name. It reads a few ranges of the safetensors, and needs neither torch nor transformers.

What an owner publishes is a `Claim`, what a check gives is `Evidence`; a failure is a
`WatermarkError` that says what to do.
"""

from hf_watermark.errors import WatermarkError
from hf_watermark.evidence import Claim, Evidence
from hf_watermark.key import OwnerKey
from hf_watermark.scheme import Scheme

__all__ = ["Claim", "Evidence", "OwnerKey", "Scheme", "WatermarkError"]
