"""What the k-SAE benchmarks compare with: the released step, dense; and the rows that all are given."""

import torch
from torch import Tensor, nn


class DenseStep:
    """The released step, plainly: dense code, dense decoder product, autograd, Adam's defaults."""

    def __init__(
        self,
        d: int,
        n: int,
        k: int,
        rows: Tensor,
        learning_rate: float = 4e-4,
        warmup: int = 500,
        device: torch.device | str = "cpu",
    ) -> None:
        self.k, self.learning_rate, self.warmup = k, learning_rate, warmup
        self.W_enc = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d, n, device=device)))
        self.b_enc = nn.Parameter(torch.zeros(n, device=device))
        self.W_dec = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(n, d, device=device)))
        self.b_dec = nn.Parameter(rows.mean(0).to(device))
        weights = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        # On a CPU as released; on a GPU with the fused form, the fastest that PyTorch has.
        self.adam = torch.optim.Adam(weights, lr=learning_rate, fused=self.W_enc.is_cuda or None)
        self.done = 0

    def step(self, x: Tensor) -> Tensor:
        """One released update; gives the loss."""
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        best = pre.topk(self.k, dim=1)
        code = torch.zeros_like(pre).scatter(1, best.indices, best.values)
        error = code @ self.W_dec + self.b_dec - x
        loss = error.square().mean() / (x - x.mean(0)).square().mean()
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradient = self.W_dec.grad
            assert gradient is not None
            gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec
        self.done += 1
        warm = min(1.0, (self.done + 1) / self.warmup)
        self.adam.param_groups[0]["lr"] = self.learning_rate * warm
        self.adam.step()
        return loss.detach()


def structured(rows: int, d: int) -> Tensor:
    """Rows made of 64 directions, a few strong in each, plus noise."""
    draw = torch.Generator().manual_seed(0)
    strengths = torch.rand(rows, 64, generator=draw) * (torch.rand(rows, 64, generator=draw) < 0.1)
    directions = torch.randn(64, d, generator=draw)
    return strengths @ directions + 0.1 * torch.randn(rows, d, generator=draw)
