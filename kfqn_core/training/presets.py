"""Published configurations by name: every value of `KFQN` but the step length.

    KFQN(model, lr=0.3, **presets.KBFGS_2020)

`KBFGS_2020` and `KBFGS_L_2020` follow Goldfarb, Ren & Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural
Networks" (NeurIPS 2020, arXiv 2006.08877). The values were read in the authors' public code
(renyiryry/kbfgs_neurips2020_public), where the MNIST autoencoder is trained with lr = 0.3. The method starts from
`optimizer.warm_start(batches)` over the training set. With full-batch gradients the authors' code neither warm-starts
nor averages pairs: override the preset with `{**presets.KBFGS_2020, "pair_momentum": 0.0}`.
"""

from typing import Any

KBFGS_2020: dict[str, Any] = {
    "pairs": "second_pass",  # the mini-batch is evaluated again after the step, every step
    "refresh": 1,
    "damping": 0.3,  # lambda
    "damping_split": "even",  # lambda_A = lambda_G = sqrt(lambda)
    "pair_damping": "double",  # Powell on H_g, then on the identity
    "activation_factor": "action",  # H_a by Hessian action
    "activation_decay": 0.9,  # beta_A, running average of A
    "momentum": 0.9,  # beta_m, running average of the gradient, not bias-corrected
    "pair_momentum": 0.9,  # beta_sy
    "mu1": 0.2,  # Powell's constant; mu2 = lambda_G
    "memory": None,  # dense H_g
    "weight_decay": 1e-5,  # tau
    "decoupled_weight_decay": False,  # tau [W | b] is added to the gradient
    "step_length": "raw",
}

KBFGS_L_2020: dict[str, Any] = {
    **KBFGS_2020,
    "memory": 100,  # p pairs, initial matrix the identity
}

# Kronecker-factored quasi-Newton for convolutions, from the abstracts of arXiv 2102.06737 and from public code, since
# the authors' own code of the step was not published. Choices where sources disagree, and their alternatives:
#   A        sum over locations, mean over samples (the authors' published helpers); its action is taken from the
#            mini-batch. Third-party code of the first version keeps a running A for fully connected layers:
#            `linear={"activation_decay": 0.9}`.
#   start    H_a = (A_0 + lambda_A I)^-1 from a warm start if there is one, else from the first mini-batch.
#   damping  third-party code of the first version splits evenly and uses double damping for fully connected layers:
#            `linear={"pair_damping": "double"}`; `pair_damping="double"` selects it for every layer.
#   others   batch-norm and other parameters move by their averaged gradient at the same lr, as in the authors' K-FAC.
KFQN_CNN_2021: dict[str, Any] = {
    "pairs": "second_pass",
    "refresh": 1,
    "damping": 0.3,  # default of third-party code (saeedsoori/k-fac)
    "damping_split": "even",  # lambda_A = lambda_G = sqrt(lambda)
    "pair_damping": "levenberg-marquardt",  # Powell on H_g, then y + lambda_G s
    "activation_factor": "action",
    "activation_decay": None,  # Hessian action of the mini-batch
    "momentum": 0.9,
    "pair_momentum": 0.9,
    "mu1": 0.2,
    "memory": None,
    "weight_decay": 0.0,  # tau depends on the data set there
    "decoupled_weight_decay": True,  # W <- (1 - lr tau) W, applied to all parameters
    "step_length": "raw",
}

KFQN_2022: dict[str, Any] = {
    **KFQN_CNN_2021,
    # Two independent third-party readings of the later version agree on this split (kazukiosawa/asdl is one of them).
    "damping_split": "locations",
}
