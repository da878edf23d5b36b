"""What all schema classes of a recipe share."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

# what SAM is made of, in the order of execution
PartName = Literal['encoder', 'decoder']
PARTS: tuple[PartName, ...] = get_args(PartName)
UnitLevel = Literal['layer', 'module', 'block', 'stage']


class Schema(BaseModel):
    """Base of all schema classes: no unknown keys, no silent type conversions, no NaN or infinity."""

    model_config = ConfigDict(extra='forbid', strict=True, frozen=True, allow_inf_nan=False)


class Part(BaseModel):
    """Something built from a registry: ``{type: LSQ, symmetric: true}``. The constructor checks the arguments."""

    model_config = ConfigDict(extra='allow', strict=True, frozen=True)

    type: str

    def kwargs(self) -> dict[str, Any]:
        """Arguments for the constructor, without ``type``."""
        return dict(self.model_extra or {})
