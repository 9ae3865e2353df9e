"""Engines: how products with H and J are computed, ``products=`` of `BilevelOptimizer`.

Adding one is a file and an import line here; see ``docs/extending.md``.
"""

from typing import Any

from .. import _registry
from .base import Products as Products
from .base import Substitute as Substitute
from .base import disagreement as disagreement
from .double_backward import DoubleBackward as DoubleBackward
from .finite_difference import CentralDifference as CentralDifference
from .forward_over_reverse import ForwardOverReverse as ForwardOverReverse
from .gauss_newton import GaussNewton as GaussNewton
from .traced import Recording as Recording
from .traced import Traced as Traced

REGISTRY: dict[str, type[Products]] = {
    cls.name: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, Products) and cls is not Products
}
"""Name → class, built from the imports above."""


def parse(spec: Any) -> Products:
    """The engine that a name, a name with options, or an object stands for.

    Args:
        spec: ``"double_backward"``, ``"traced(compile=True)"``, or an engine.

    Returns:
        The engine; ``str(engine)`` gives the string back.

    Raises:
        UnknownName: no engine or option has that name.

    Example:
        >>> from torch_bilevel.products import parse
        >>> parse("traced(compile=True)")
        Traced(compile=True, cuda_graph=None)
    """
    if isinstance(spec, Products):
        return spec
    if not isinstance(spec, str):
        raise _registry.UnknownName(
            f"products={spec!r}: write a name such as 'double_backward', or an object such as "
            "tb.Traced(compile=True)."
        )
    name, options = _registry.parse(
        spec, REGISTRY, "engine for products", "traced(compile=True)"
    )
    return _registry.build(REGISTRY[name], options, name)


def names() -> dict[str, str]:
    """Every engine, with one line each.

    Returns:
        Name → one line.
    """
    return {
        name: (cls.__doc__ or "").strip().splitlines()[0]
        for name, cls in REGISTRY.items()
    }
