"""KF-QN for convolutional networks, slow and independent of `kfqn_core`.

The method as reconstructed from public sources: every patch is formed explicitly, by slicing; groups are separate
matrices; `A` is never averaged, its action is that of the mini-batch's own patches; pairs are means over samples and
locations, damped by Powell's rule and then by adding `lambda_G s`; BFGS is the three-factor product of
`reference_kbfgs`.
"""

import math

import numpy as np
import torch

from tests.reference_kbfgs import bfgs


class ReferenceKFQN:
    """`layers`: dicts with `W` `[groups, d_out, d_in]` (bias last), `bias`, and for convolutions `kernel`, `stride`,
    `padding`, `dilation`, each a pair. Tanh between layers, flattening before the first linear one."""

    def __init__(self, layers, loss, lr, *, damping, locations, beta=0.9, mu1=0.2):
        self.layers, self.loss, self.lr = layers, loss, lr
        self.damping, self.locations, self.beta, self.mu1 = damping, locations, beta, mu1
        for layer in layers:
            groups, d_out, _ = layer["W"].shape
            layer["M"] = np.zeros_like(layer["W"])
            layer["s"], layer["y"] = np.zeros((groups, d_out)), np.zeros((groups, d_out))
            layer["H_g"] = np.stack([np.eye(d_out)] * groups)
            layer["H_a"] = None

    def patches(self, layer, x):
        """`[N, groups, T, d_in]`."""
        if "kernel" not in layer:
            a = x.flatten(1)[:, None, None]
        else:
            groups = len(layer["W"])
            (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (layer[k] for k in ("kernel", "stride", "padding", "dilation"))
            x = torch.nn.functional.pad(x, (pw, pw, ph, ph))
            rows = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
            columns = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
            layer["size"] = rows, columns
            shifted = [
                x[:, :, i * dh : i * dh + (rows - 1) * sh + 1 : sh, j * dw : j * dw + (columns - 1) * sw + 1 : sw]
                for i in range(kh)
                for j in range(kw)
            ]
            a = torch.stack(shifted, 2).reshape(len(x), groups, -1, rows * columns).transpose(2, 3)
        return torch.cat([a, torch.ones_like(a[..., :1])], -1) if layer["bias"] else a

    def evaluate(self, weights, x, y):
        Ws = [torch.tensor(W, requires_grad=True) for W in weights]
        inputs, pre = [], []
        for i, (layer, W) in enumerate(zip(self.layers, Ws, strict=True)):
            a = self.patches(layer, x)
            h = torch.einsum("god,ngtd->ngto", W, a)
            h.retain_grad()
            inputs.append(a.detach().numpy())
            pre.append(h)
            x = h.transpose(2, 3).flatten(1, 2)  # [N, channels, T]
            x = x.reshape(*x.shape[:2], *layer["size"]) if "kernel" in layer else x[..., 0]
            x = torch.tanh(x) if i < len(Ws) - 1 else x
        loss = self.loss(x, y)
        loss.backward()
        g = [len(y) * h.grad.numpy() for h in pre]
        return inputs, [h.detach().numpy() for h in pre], g, [W.grad.numpy() for W in Ws], loss.item()

    def step(self, x, y):
        inputs, h, g, grads, loss = self.evaluate([layer["W"] for layer in self.layers], x, y)
        for layer, a, grad in zip(self.layers, inputs, grads, strict=True):
            T = a.shape[2] if self.locations else 1
            layer["lambda_A"], layer["lambda_G"] = math.sqrt(self.damping * T), math.sqrt(self.damping / T)
            layer["M"] = self.beta * layer["M"] + (1 - self.beta) * grad
            layer["A"] = np.einsum("ngti,ngtj->gij", a, a) / len(a)
            if layer["H_a"] is None:
                layer["H_a"] = np.linalg.inv(layer["A"] + layer["lambda_A"] * np.eye(a.shape[-1]))
        moved = [layer["W"] - self.lr * layer["H_g"] @ layer["M"] @ layer["H_a"] for layer in self.layers]
        _, h_new, g_new, _, _ = self.evaluate(moved, x, y)
        for i, layer in enumerate(self.layers):
            layer["W"] = moved[i]
            s, y_ = (h_new[i] - h[i]).mean((0, 2)), (g_new[i] - g[i]).mean((0, 2))
            layer["s"] = self.beta * layer["s"] + (1 - self.beta) * s
            layer["y"] = self.beta * layer["y"] + (1 - self.beta) * y_
            for k in range(len(layer["W"])):
                self.update_group(layer, k, inputs[i][:, k].mean((0, 1)), g[i][:, k].mean((0, 1)))
        return loss

    def update_group(self, layer, k, a_mean, g_mean):
        H, s, y = layer["H_g"][k], layer["s"][k], layer["y"][k]
        Hy = H @ y
        if s @ y < self.mu1 * (y @ Hy):
            theta = (1 - self.mu1) * (y @ Hy) / (y @ Hy - s @ y)
            s = theta * s + (1 - theta) * Hy
        layer["H_g"][k] = bfgs(H, s, y + layer["lambda_G"] * s, g_mean)
        s_a = layer["H_a"][k] @ a_mean
        y_a = layer["A"][k] @ s_a + layer["lambda_A"] * s_a
        layer["H_a"][k] = bfgs(layer["H_a"][k], s_a, y_a, a_mean)
