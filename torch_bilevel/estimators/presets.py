"""Published names for choices of parts: name → the estimator string it stands for.

Options written after the name are added to it, and win: ``"stocbio(num_steps=5)"``.
"""

PRESETS = {
    # approximate implicit differentiation (Ji, Yang & Liang 2021; Grazzi et al. 2020)
    "aid_cg": "cg(max_steps=10)",
    "aid_fp": "richardson(max_steps=10, rtol=0.0)",
    # Nesterov's momentum for v, for a proximal outer step (Chen, Kailkhura & Zhou 2023)
    "proxbio": "nesterov(max_steps=10)",
    # the same at extrapolated points (Ji & Liang 2021); -BG keeps y and v, as loops here do
    "accbio": "accelerated(base='heavy_ball(max_steps=20)')",
    "accbio_bg": "accelerated(base='heavy_ball(max_steps=10)')",
    # iterative differentiation; truncated (Shaban et al. 2019); √K checkpoints; T1–T2
    "itd": "unrolled",
    "truncated": "unrolled(window=20)",
    "checkpointed": "unrolled(checkpoint_every='auto')",
    "one_step": "unrolled(window=1)",
    # with minibatches: both runs of a difference see the same ones anyway
    "pzobo_s": "pzobo",
    # stochastic, v rebuilt
    "stocbio": "stochastic_neumann(num_steps=11)",
    "bsa": "random_truncated_neumann",
    "mrbo": "stochastic_neumann(memory='storm')",
    "sustain": "random_truncated_neumann(memory='storm')",
    "vrbo": "stochastic_neumann(num_steps=4, memory='sarah(period=30)')",
    "sid": "stochastic_richardson(decay=20.0)",
    "bsgm": "stochastic_richardson",
    "amigo": "sgd(warm_start=True)",
    # single loop, v is state
    "soba": "joint",
    "ma_soba": "joint(outer_memory='moving_average')",
    "saba": "joint(memory='saga')",
    "srba": "joint(memory='sarah(period=8)')",
}
