"""The two-layer MLP of SAM's transformer blocks (ViT encoder, two-way decoder) and of TinyViT."""

from typing import Self

from torch import Tensor, nn

from ptqsam.modules.base import Build, QuantModule
from ptqsam.registry import QUANT_MODULES


@QUANT_MODULES.register_module(name='segment_anything.modeling.common.MLPBlock')
class QuantMLP(QuantModule):
    """Linear, activation function, linear; both linear layers quantized.

    Roles are `mlp.lin1.*` and `mlp.lin2.*` in every model, whatever the attributes are called.
    """

    first, second = 'lin1', 'lin2'
    positions = 'tokens'

    def __init__(self, norm: nn.Module, lin1: nn.Module, act: nn.Module, lin2: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.add_module(self.first, lin1)
        self.act = act
        self.add_module(self.second, lin2)

    @classmethod
    def from_float(cls, module: nn.Module, build: Build) -> Self:
        """Convert the linear layers, and the normalisation where the MLP contains one."""
        norm = getattr(module, 'norm', None)
        return cls(
            build.convert(norm, 'norm') if norm is not None else nn.Identity(),
            build.convert(module.get_submodule(cls.first), cls.first, 'mlp.lin1'),
            module.get_submodule('act'),
            build.convert(module.get_submodule(cls.second), cls.second, 'mlp.lin2'),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the MLP, (..., C) -> (..., C)."""
        x = self.get_submodule(self.first)(self.norm(x))
        return self.get_submodule(self.second)(self.act(x))


@QUANT_MODULES.register_module(name='timm.models.tiny_vit.NormMlp')
class QuantNormMlp(QuantMLP):
    """TinyViT's MLP: starts with a normalisation; its dropouts do nothing at inference."""

    first, second = 'fc1', 'fc2'
