"""Published configurations by name: every value of `KFQN` but the step length.

    KFQN(model, lr=0.3, **presets.KBFGS_2020)

Both follow Goldfarb, Ren & Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks" (NeurIPS 2020,
arXiv 2006.08877). The values were read in the authors' public code (renyiryry/kbfgs_neurips2020_public), where the
MNIST autoencoder is trained with lr = 0.3. The method starts from `optimizer.warm_start(batches)` over the training
set. With full-batch gradients the authors' code neither warm-starts nor averages pairs: override the preset with
`{**presets.KBFGS_2020, "pair_momentum": 0.0}`.
"""

from typing import Any

KBFGS_2020: dict[str, Any] = {
    "pairs": "second_pass",  # the mini-batch is evaluated again after the step, every step
    "refresh": 1,
    "damping": 0.3,  # lambda; lambda_A = lambda_G = sqrt(0.3)
    "activation_decay": 0.9,  # beta_A, running average of A
    "momentum": 0.9,  # beta_m, running average of the gradient, not bias-corrected
    "pair_momentum": 0.9,  # beta_sy
    "mu1": 0.2,  # Powell's constant; mu2 = lambda_G
    "memory": None,  # dense H_g
    "weight_decay": 1e-5,  # tau, coupled: added to the gradient, biases included
    "step_length": "raw",
}

KBFGS_L_2020: dict[str, Any] = {
    **KBFGS_2020,
    "memory": 100,  # p pairs, initial matrix the identity
}
