"""Wide residual networks (Zagoruyko & Komodakis 2016), the hosts of Uchida et al. 2017.

transformers has none. This one is registered with its auto classes, so that a folder of it is
loaded, attacked and read like any other; `WideResNetConfig()` is the paper's WRN-10-4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

__all__ = ["WideResNetConfig", "WideResNetForImageClassification"]


class WideResNetConfig(PretrainedConfig):
    """Depth 6 n + 4, and how many times wider than a plain network."""

    model_type = "wide_resnet"

    def __init__(
        self, depth: int = 10, width: int = 4, image_size: int = 32, **kwargs: Any
    ) -> None:
        self.depth, self.width, self.image_size = depth, width, image_size
        super().__init__(**kwargs)


class _Block(nn.Module):
    """Two 3x3 convolutions behind normalisation and ReLU; a 1x1 shortcut where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x).relu()
        kept: Tensor = x if self.shortcut is None else self.shortcut(active)
        return kept + self.conv2(self.norm2(self.conv1(active)).relu())


class WideResNetForImageClassification(PreTrainedModel):
    """WRN-depth-width for images of 32 pixels."""

    config_class = WideResNetConfig
    base_model_prefix = "wide_resnet"
    main_input_name = "pixel_values"

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        blocks, channels = (config.depth - 4) // 6, 16
        self.stem = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.stages = nn.ModuleList()
        for stage in range(3):
            outputs = 16 * config.width * 2**stage
            layers = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(_Block(channels, outputs, stride))
                channels = outputs
            self.stages.append(nn.Sequential(*layers))
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Logits (B, K)."""
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        logits = self.classifier(self.norm(x).relu().mean((2, 3)))
        return ImageClassifierOutputWithNoAttention(logits=logits)


AutoConfig.register(WideResNetConfig.model_type, WideResNetConfig)
AutoModelForImageClassification.register(WideResNetConfig, WideResNetForImageClassification)
