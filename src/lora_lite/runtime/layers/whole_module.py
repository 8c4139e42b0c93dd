"""Any module by its name: what goes into it and what comes out, both as wide as the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from ...core.errors import TargetError
from ..model.kind import Kind
from ..model.site import Site
from ..model.state import SITE


class WholeModule(Kind):
    """A module with modules inside, such as a feed-forward network; d_in = d_out = the width of the stream, which its
    first call checks."""

    name = "module"
    apart = named = True
    offered = False
    absent = "the model's residual stream has no known width, or it has no modules inside."

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        return None  # known by the structure around it

    def sample(self, module: nn.Module, rows: Tensor, columns: Tensor) -> None:
        return None

    def enter(self, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and y, if they are as wide as the stream.

        Raises:
            TargetError: they are not.
        """
        site: Site = module.__dict__[SITE]
        sizes = {(slot.d_in, slot.d_out) for slot in site.slots.values()}
        if sizes != {(x.shape[-1], y.shape[-1])}:
            raise TargetError(
                f"{site.path}: {type(module).__name__} takes vectors of {x.shape[-1]} and returns {y.shape[-1]}, and a "
                f"method on modules wants both as wide as the residual stream, {sorted(sizes)[0][0]}. Name another "
                "module in target_names."
            )
        return x, y
