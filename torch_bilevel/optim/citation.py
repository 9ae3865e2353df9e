"""What to cite for what is in use."""

from __future__ import annotations

from typing import Any

JI_2021 = """@inproceedings{ji2021bilevel,
  title     = {Bilevel Optimization: Convergence Analysis and Enhanced Design},
  author    = {Ji, Kaiyi and Yang, Junjie and Liang, Yingbin},
  booktitle = {International Conference on Machine Learning},
  year      = {2021}
}"""

PEDREGOSA_2016 = """@inproceedings{pedregosa2016hyperparameter,
  title     = {Hyperparameter optimization with approximate gradient},
  author    = {Pedregosa, Fabian},
  booktitle = {International Conference on Machine Learning},
  year      = {2016}
}"""

FRANCESCHI_2017 = """@inproceedings{franceschi2017forward,
  title     = {Forward and Reverse Gradient-Based Hyperparameter Optimization},
  author    = {Franceschi, Luca and Donini, Michele and Frasconi, Paolo and Pontil,
               Massimiliano},
  booktitle = {International Conference on Machine Learning},
  year      = {2017}
}"""


def citation(optimizer: Any) -> str:
    """BibTeX of the algorithm an optimizer is, or of the estimator it uses.

    Args:
        optimizer: a `BilevelOptimizer`.

    Returns:
        One BibTeX entry.

    Example:
        >>> import torch, torch_bilevel as tb
        >>> x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> o = tb.AIDBiO(torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1))
        >>> tb.citation(o).splitlines()[0]
        '@inproceedings{ji2021bilevel,'
    """
    own = getattr(type(optimizer), "bibtex", None)
    if own:
        return own
    return FRANCESCHI_2017 if optimizer.estimator.name == "unrolled" else PEDREGOSA_2016
