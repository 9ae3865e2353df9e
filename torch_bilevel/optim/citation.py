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


FINN_2017 = """@inproceedings{finn2017model,
  title     = {Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks},
  author    = {Finn, Chelsea and Abbeel, Pieter and Levine, Sergey},
  booktitle = {International Conference on Machine Learning},
  year      = {2017}
}"""

LI_2017 = """@article{li2017metasgd,
  title   = {Meta-SGD: Learning to Learn Quickly for Few-Shot Learning},
  author  = {Li, Zhenguo and Zhou, Fengwei and Chen, Fei and Li, Hang},
  journal = {arXiv preprint arXiv:1707.09835},
  year    = {2017}
}"""

LIU_2019 = """@inproceedings{liu2019darts,
  title     = {{DARTS}: Differentiable Architecture Search},
  author    = {Liu, Hanxiao and Simonyan, Karen and Yang, Yiming},
  booktitle = {International Conference on Learning Representations},
  year      = {2019}
}"""

NICHOL_2018 = """@article{nichol2018first,
  title   = {On First-Order Meta-Learning Algorithms},
  author  = {Nichol, Alex and Achiam, Joshua and Schulman, John},
  journal = {arXiv preprint arXiv:1803.02999},
  year    = {2018}
}"""

RAGHU_2020 = """@inproceedings{raghu2020rapid,
  title     = {Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
               {MAML}},
  author    = {Raghu, Aniruddh and Raghu, Maithra and Bengio, Samy and Vinyals, Oriol},
  booktitle = {International Conference on Learning Representations},
  year      = {2020}
}"""

RAJESWARAN_2019 = """@inproceedings{rajeswaran2019meta,
  title     = {Meta-Learning with Implicit Gradients},
  author    = {Rajeswaran, Aravind and Finn, Chelsea and Kakade, Sham and Levine, Sergey},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2019}
}"""

SOW_2022 = """@inproceedings{sow2022convergence,
  title     = {On the Convergence Theory for Hessian-Free Bilevel Algorithms},
  author    = {Sow, Daouda and Ji, Kaiyi and Liang, Yingbin},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}"""

JI_LIANG_2021 = """@article{ji2021lower,
  title   = {Lower Bounds and Accelerated Algorithms for Bilevel Optimization},
  author  = {Ji, Kaiyi and Liang, Yingbin},
  journal = {arXiv:2102.03926},
  year    = {2021}
}"""

YANG_2021 = """@inproceedings{yang2021provably,
  title     = {Provably Faster Algorithms for Bilevel Optimization},
  author    = {Yang, Junjie and Ji, Kaiyi and Liang, Yingbin},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021}
}"""

GRAZZI_2021 = """@inproceedings{grazzi2021convergence,
  title     = {Convergence Properties of Stochastic Hypergradients},
  author    = {Grazzi, Riccardo and Pontil, Massimiliano and Salzo, Saverio},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year      = {2021}
}"""

DAGREOU_2022 = """@inproceedings{dagreou2022framework,
  title     = {A framework for bilevel optimization that enables stochastic and global variance
               reduction algorithms},
  author    = {Dagr\\'eou, Mathieu and Ablin, Pierre and Vaiter, Samuel and Moreau, Thomas},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}"""

DAGREOU_2024 = """@inproceedings{dagreou2024lower,
  title     = {A Lower Bound and a Near-Optimal Algorithm for Bilevel Empirical Risk Minimization},
  author    = {Dagr\\'eou, Mathieu and Moreau, Thomas and Vaiter, Samuel and Ablin, Pierre},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year      = {2024}
}"""

ARBEL_2022 = """@inproceedings{arbel2022amortized,
  title     = {Amortized Implicit Differentiation for Stochastic Bilevel Optimization},
  author    = {Arbel, Michael and Mairal, Julien},
  booktitle = {International Conference on Learning Representations},
  year      = {2022}
}"""

GRAZZI_2023 = """@article{grazzi2023bilevel,
  title   = {Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
             without Warm-Start},
  author  = {Grazzi, Riccardo and Pontil, Massimiliano and Salzo, Saverio},
  journal = {Journal of Machine Learning Research},
  volume  = {24},
  year    = {2023}
}"""

CHEN_2023 = """@article{chen2023accelerated,
  title   = {An accelerated proximal algorithm for regularized nonconvex and nonsmooth bi-level
             optimization},
  author  = {Chen, Ziyi and Kailkhura, Bhavya and Zhou, Yi},
  journal = {Machine Learning},
  volume  = {112},
  number  = {5},
  pages   = {1433--1463},
  year    = {2023}
}"""

_ESTIMATORS = {
    "unrolled": FRANCESCHI_2017,
    "darts": LIU_2019,
    "pzobo": SOW_2022,
    "joint": DAGREOU_2022,
    "accelerated": JI_LIANG_2021,
    "stochastic_neumann": JI_2021,
    "stochastic_richardson": GRAZZI_2021,
}


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
    estimator = optimizer.estimator
    name = getattr(estimator, "solver", estimator).name
    return _ESTIMATORS.get(estimator.name) or _ESTIMATORS.get(name, PEDREGOSA_2016)
