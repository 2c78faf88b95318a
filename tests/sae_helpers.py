"""Independent k-SAEs to compare with: numpy loops, and dense autograd with PyTorch's own Adam."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from revelio.sae.model import KSparseAutoencoder


def planted(rows: int, d: int, directions: int, active: int, seed: int = 0, noise: float = 0.0):
    """Rows that are sums of a few unit directions; gives (rows, directions)."""
    draw = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(directions, d, generator=draw)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    chosen = torch.rand(rows, directions, generator=draw).topk(active, dim=1).indices
    strengths = 1 + torch.rand(rows, active, generator=draw)
    code = torch.zeros(rows, directions).scatter(1, chosen, strengths)
    return code @ dictionary + noise * torch.randn(rows, d, generator=draw), dictionary


def random_model(d: int = 6, n: int = 20, k: int = 3, mode="fixed", seed: int = 0):
    """A k-SAE with random weights, decoder rows of unit length."""
    draw = torch.Generator().manual_seed(seed)
    model = KSparseAutoencoder(d, n, k, mode)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
    return model


def loop_encode(model: KSparseAutoencoder, x: Tensor) -> np.ndarray:
    """The dense (b n) code by loops over images and latents, in double precision."""
    W_enc, b_enc, b_dec = (
        t.detach().double().numpy() for t in (model.W_enc, model.b_enc, model.b_dec)
    )
    code = np.zeros((len(x), model.n))
    for i, row in enumerate(x.double().numpy()):
        pre = [
            sum(W_enc[j, c] * (row[c] - b_dec[c]) for c in range(model.d)) + b_enc[j]
            for j in range(model.n)
        ]
        for j in sorted(range(model.n), key=lambda j: -pre[j])[: model.k]:
            code[i, j] = max(pre[j], 0.0) if model.mode == "fixed" else pre[j]
    return code


def loop_decode(model: KSparseAutoencoder, code: np.ndarray) -> np.ndarray:
    """Eq. 4 by loops."""
    W_dec, b_dec = model.W_dec.detach().double().numpy(), model.b_dec.detach().double().numpy()
    out = np.zeros((len(code), model.d))
    for i in range(len(code)):
        for c in range(model.d):
            out[i, c] = sum(code[i, j] * W_dec[j, c] for j in range(model.n)) + b_dec[c]
    return out


class DenseKSAE(nn.Module):
    """A dense k-SAE under autograd and torch.optim.Adam, started from a sparse one's weights."""

    def __init__(self, model: KSparseAutoencoder, variance: float) -> None:
        super().__init__()
        self.k, self.mode, self.variance = model.k, model.mode, variance
        # As in the released code: the encoder is (d n).
        self.W_enc = nn.Parameter(model.W_enc.detach().T.clone())
        self.b_enc = nn.Parameter(model.b_enc.detach().clone())
        self.W_dec = nn.Parameter(model.W_dec.detach().clone())
        self.b_dec = nn.Parameter(model.b_dec.detach().clone())

    def loss(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = pre.topk(self.k, dim=1)
        if self.mode == "fixed":
            values = torch.relu(values)
        code = torch.zeros_like(pre).scatter(1, indices, values)
        reconstruction = code @ self.W_dec + self.b_dec
        if self.mode == "as_paper":
            return (reconstruction - x).pow(2).sum(1).mean()
        mse = nn.functional.mse_loss(reconstruction, x)
        if self.mode == "as_code":
            return mse / (x - x.mean(0)).pow(2).mean()
        return mse / self.variance

    def normalise(self) -> None:
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def train_on(
        self, batches: list[Tensor], learning_rate: float, warmup: int, aux=None
    ) -> Iterator[float]:
        """The released step for as_code; unit length after the update for the other modes."""
        adam = torch.optim.Adam(self.parameters(), lr=learning_rate)
        for t, x in enumerate(batches, start=1):
            if self.mode == "as_code":
                self.normalise()
            ahead = t + 1 if self.mode == "as_code" else t
            adam.param_groups[0]["lr"] = learning_rate * min(1.0, ahead / warmup)
            loss = self.loss(x)
            total = loss if aux is None else loss + aux(self, x)
            adam.zero_grad()
            total.backward()
            with torch.no_grad():
                along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
                self.W_dec.grad -= along * self.W_dec
            adam.step()
            if self.mode != "as_code":
                self.normalise()
            yield loss.item()


def differences(model: KSparseAutoencoder, dense: DenseKSAE) -> dict[str, float]:
    """The largest difference of each parameter."""
    pairs = {
        "W_enc": (model.W_enc, dense.W_enc.T),
        "b_enc": (model.b_enc, dense.b_enc),
        "W_dec": (model.W_dec, dense.W_dec),
        "b_dec": (model.b_dec, dense.b_dec),
    }
    return {name: float((a - b).detach().abs().max()) for name, (a, b) in pairs.items()}
