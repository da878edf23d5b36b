"""What all quant modules share: how they are built from a float module, and who knows the role of a child.

A quant module replaces one class of float modules. It computes the same, bit for bit, while all of its quantizers
are `off`. It shares the float module's parameters and never changes the float module.
"""

from typing import ClassVar, Protocol, Self

from torch import Tensor, nn

from ptqsam.quantizers import Quantizer
from ptqsam.registry import QUANT_MODULES


class PassThrough(nn.Module):
    """Stands where the rules put no quantizer."""

    def forward(self, x: Tensor, inplace: bool = False, operand: Tensor | None = None) -> Tensor:
        """Return the input."""
        return x


class Build(Protocol):
    """What `from_float` is given to make quantizers and to convert children (ptqsam/solver/prepare.py).

    Attributes:
        role: role that the parent declares for the module being converted, or ''.
    """

    role: str

    def __call__(self, name: str, role: str, kind: str = 'act', ch_axis: int | None = None) -> Quantizer | PassThrough:
        """Make the quantizer of the point ``name`` of this module, as the rules say."""

    def convert(self, module: nn.Module, name: str, role: str = '') -> nn.Module:
        """Replace the child ``name``; its points get roles that start with ``role``."""


class QuantModule(nn.Module):
    """Base of the quantized replacements.

    Attributes:
        positions: how reconstruction draws a part of the input (`ptqsam.reconstruction.sampling`); '' for what is no
            unit by itself.
    """

    positions: ClassVar[str] = ''

    @classmethod
    def from_float(cls, module: nn.Module, build: Build) -> Self:
        """Make the replacement.

        Args:
            module: instance of the replaced class; left as it is, its parameters are shared.
            build: makes quantizers and converts children.

        Returns:
            The quant module, all quantizers `off`.
        """
        raise NotImplementedError


# qualified class name of a parent -> child attribute -> role of the child's points
_CHILD_ROLES: dict[str, dict[str, str]] = {}


def qualified_name(module: nn.Module) -> str:
    """Name under which the replacement of a module's class is registered."""
    return f'{type(module).__module__}.{type(module).__qualname__}'


def replacement_for(module: nn.Module) -> type[QuantModule] | None:
    """Class that replaces a module's class, or None."""
    QUANT_MODULES.import_from_location()
    # not Registry.get: that would take the qualified name for a scope, or import the float class itself
    return QUANT_MODULES.module_dict.get(qualified_name(module))


def declare_child_roles(parent: str, roles: dict[str, str]) -> None:
    """Tell the roles of children whose own class does not know what it is used for.

    Args:
        parent: qualified class name of the parent module.
        roles: attribute name of the child -> role.
    """
    _CHILD_ROLES[parent] = roles


def child_role(parent: nn.Module, name: str) -> str:
    """Role that a parent declares for a child, or ''."""
    return _CHILD_ROLES.get(qualified_name(parent), {}).get(name, '')
