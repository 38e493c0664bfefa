"""K-BFGS and K-BFGS(L) for multilayer perceptrons, slow and independent of `kfqn_core`.

Written step by step from the description of the 2020 method (Goldfarb, Ren & Bahamou, NeurIPS 2020, and the authors'
public code): NumPy for everything but the gradients, explicit per-sample quantities, a copy of all weights for the
second evaluation, BFGS as the three-factor product, and the limited-memory matrix as the dense recursion over the kept
pairs.
"""

import numpy as np
import torch


class ReferenceKBFGS:
    """`weights` is a list of `[W | b]`, each `[d_out, d_in + 1]`; tanh between layers, none after the last."""

    def __init__(self, weights, loss, lr, *, damping=0.3, beta=0.9, mu1=0.2, tau=1e-5, memory=None):
        self.W = [w.copy() for w in weights]
        self.loss = loss
        self.lr, self.beta, self.mu1, self.tau, self.memory = lr, beta, mu1, tau, memory
        self.lambda_A = self.lambda_G = np.sqrt(damping)
        self.M = [np.zeros_like(w) for w in self.W]
        self.s_mean = [np.zeros(w.shape[0]) for w in self.W]
        self.y_mean = [np.zeros(w.shape[0]) for w in self.W]
        self.H_g = [np.eye(w.shape[0]) for w in self.W]
        self.pairs = [[] for _ in self.W]
        self.A = self.H_a = None
        self.k = 0

    def evaluate(self, weights, x, y):
        """Inputs a (with the trailing 1), pre-activations h, per-sample gradients g and weight gradients."""
        Ws = [torch.tensor(w, requires_grad=True) for w in weights]
        a, inputs, pre = torch.as_tensor(x), [], []
        for i, W in enumerate(Ws):
            a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
            h = a @ W.T
            h.retain_grad()
            inputs.append(a.detach().numpy())
            pre.append(h)
            a = torch.tanh(h) if i < len(Ws) - 1 else h
        mean_loss = self.loss(a, torch.as_tensor(y))
        mean_loss.backward()
        m = len(x)
        g = [m * h.grad.numpy() for h in pre]  # the loss is a mean: per-sample gradients are m times larger
        return inputs, [h.detach().numpy() for h in pre], g, [W.grad.numpy() for W in Ws], mean_loss.item()

    def warm_start(self, batches):
        per_batch = []
        for x, y in batches:
            inputs, *_ = self.evaluate(self.W, x, y)
            per_batch.append([sum(np.outer(v, v) for v in a) / len(a) for a in inputs])
        self.A = [np.mean([A[i] for A in per_batch], axis=0) for i in range(len(self.W))]

    def step(self, x, y):
        layers = range(len(self.W))
        inputs, h, g, grads, loss = self.evaluate(self.W, x, y)
        for i in layers:
            self.M[i] = self.beta * self.M[i] + (1 - self.beta) * (grads[i] + self.tau * self.W[i])
        if self.k > 0:  # at the first step A stays what the warm start made it
            for i in layers:
                batch_A = sum(np.outer(v, v) for v in inputs[i]) / len(x)
                self.A[i] = self.beta * self.A[i] + (1 - self.beta) * batch_A
        A_damped = [A + self.lambda_A * np.eye(len(A)) for A in self.A]
        if self.k == 0:
            self.H_a = [np.linalg.inv(A) for A in A_damped]
        P = [-self.H_g[i] @ self.M[i] @ self.H_a[i] for i in layers]
        new_W = [self.W[i] + self.lr * P[i] for i in layers]
        _, h_new, g_new, _, _ = self.evaluate(new_W, x, y)
        for i in layers:
            s = (h[i] - h_new[i]).mean(axis=0)  # both old minus new: BFGS is unchanged by the common sign
            y_ = (g[i] - g_new[i]).mean(axis=0)
            self.s_mean[i] = self.beta * self.s_mean[i] + (1 - self.beta) * s
            self.y_mean[i] = self.beta * self.y_mean[i] + (1 - self.beta) * y_
            s, y_ = self.double_damping(self.H_g[i], self.s_mean[i], self.y_mean[i])
            g_mean = g[i].mean(axis=0)
            if self.memory is None:
                self.H_g[i] = bfgs(self.H_g[i], s, y_, g_mean)
            elif worth_using(s, y_, g_mean):
                self.pairs[i] = [*self.pairs[i], (s, y_)][-self.memory :]
                H = np.eye(len(s))
                for pair in self.pairs[i]:
                    H = bfgs_formula(H, *pair)
                self.H_g[i] = H
            a_mean = inputs[i].mean(axis=0)
            s_a = self.H_a[i] @ a_mean
            self.H_a[i] = bfgs(self.H_a[i], s_a, A_damped[i] @ s_a, a_mean)
        self.W = new_W
        self.k += 1
        return loss

    def double_damping(self, H, s, y):
        Hy = H @ y
        if s @ y < self.mu1 * (y @ Hy):
            theta = (1 - self.mu1) * (y @ Hy) / (y @ Hy - s @ y)
            s = theta * s + (1 - theta) * Hy
        if s @ y < self.lambda_G * (s @ s):
            theta = (1 - self.lambda_G) * (s @ s) / (s @ s - s @ y)
            y = theta * y + (1 - theta) * s
        return s, y


def worth_using(s, y, v):
    return s @ y > 0 and s @ y > 1e-4 * (s @ s) * np.sqrt(v @ v)


def bfgs(H, s, y, v):
    return bfgs_formula(H, s, y) if worth_using(s, y, v) else H


def bfgs_formula(H, s, y):
    rho = 1 / (s @ y)
    left = np.eye(len(s)) - rho * np.outer(s, y)
    return left @ H @ left.T + rho * np.outer(s, s)
