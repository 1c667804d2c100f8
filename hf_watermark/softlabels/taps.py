"""Listening to a model's penultimate features: the input of its last classifier layer."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from hf_watermark.errors import AttachError

__all__ = ["Tap", "find_head"]

_LAYERS = (nn.Linear, nn.Conv2d)


def find_head(model: nn.Module, inputs: dict[str, Any], logits: Tensor) -> str:
    """The name of the layer whose output is, or at least last has the shape of, the logits.

    Args:
        model: In eval mode.
        inputs: What gave `logits`; the model is run once more.
        logits: (B, K).

    Raises:
        AttachError: If no linear or convolutional layer has K outputs.
    """
    exact: list[str] = []
    shaped: list[str] = []

    def listen(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel() == logits.numel():
                shaped.append(name)
                if torch.allclose(output.reshape(logits.shape).float(), logits.float(), atol=1e-4):
                    exact.append(name)

        return hook

    handles = [
        layer.register_forward_hook(listen(name))
        for name, layer in model.named_modules()
        if isinstance(layer, _LAYERS)
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not shaped:
        raise AttachError(
            "The model has no classifier layer",
            expected=f"a linear layer of {logits.shape[1]} outputs",
            do="name the layer whose input are the penultimate features: head='...'",
        )
    return (exact or shaped)[-1]


class Tap:
    """Hands over what enters one layer during one forward pass.

    A forward pre-hook that rests unless `listening`: the model's own users notice nothing. Calls
    from several threads do not mix.

    Args:
        model: The model.
        head: The layer's name in it.

    Raises:
        AttachError: If there is no such layer.
    """

    def __init__(self, model: nn.Module, head: str) -> None:
        try:
            layer = model.get_submodule(head)
        except AttributeError:
            raise AttachError(
                f"The model has no layer {head!r}", do="see model.named_modules() for the names"
            ) from None
        self.head = head
        self._local = threading.local()
        # While tracing for torch.compile there is one thread, and dynamo knows plain attributes.
        self._traced: Tensor | None = None
        self._tracing = False
        self._handle = layer.register_forward_pre_hook(self._hear)

    def listen(self) -> None:
        """Keep what enters the layer in the next forward pass."""
        if torch.compiler.is_compiling():
            self._tracing, self._traced = True, None
        else:
            self._local.listening, self._local.heard = True, None

    def heard(self) -> Tensor:
        """What entered, (B, d), tokens or pixels averaged; listening ends.

        Raises:
            AttachError: If the layer was not used.
        """
        if torch.compiler.is_compiling():
            value = self._traced
            self._tracing, self._traced = False, None
        else:
            value = self._local.heard
            self._local.listening, self._local.heard = False, None
        if value is None:
            raise AttachError(f"The layer {self.head!r} took no part in the forward pass")
        if value.ndim == 4:
            return value.mean(dim=(2, 3))
        return value.mean(dim=1) if value.ndim == 3 else value

    def _hear(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            if self._tracing:
                self._traced = args[0]
        elif getattr(self._local, "listening", False):
            self._local.heard = args[0]

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()
