"""The native kernel: the same interface as :mod:`revelio.sae.kernels.base`, in C++ for x86 and Arm.

- Encoding is a search. A copy of ``W_enc`` in few bits a number (bfloat16 for AMX's tiles, int8 or int16
  for AVX-512, AVX-VNNI, AVX2 and NEON), with each row's norm and a bound of its rounding error, bounds every
  pre-activation (Cauchy-Schwarz); latents whose upper bound is below the k-th best score found so far are
  out, the others are scored in float32, the most promising first. The chosen latents are those of the
  float32 scores, ties going to the lower index, and no (b n) matrix is written. ``native/encode.cpp`` has
  the bound. What the k-th best score was in the searches before, beside the norms of what was encoded, is
  the first guess of it; images that score lower than guessed are searched again.
  int8's product takes half the time of int16's (0.55 of it by AVX2), and its copy half the memory. Where
  a trained k-SAE's k-th best score lies among those of most latents, bounds of bfloat16 and int8 leave
  many in; from then on int16 is multiplied, whose bounds are closer.
- An update is one pass over the rows that can change (:mod:`revelio.sae.optim`); it renews their copies.

All sums have one fixed order, so results depend neither on the number of threads nor on the machine or its
instructions. Compiled on first use: :mod:`revelio.sae.kernels.build`.
"""

import ctypes
from math import inf
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int16, UInt8
from torch import Tensor

from revelio.sae.kernels.base import Codes, Gradient, Weights, writes
from revelio.sae.kernels.build import INSTRUCTION_SETS, instruction_set, library
from revelio.sae.optim import AdamRows, AdamStep, update_vector

_ROWS, _WIDTH = 96, 32  # multiples that the copy is padded to: whole tiles (native/products.h)
# What share of the latents wide bounds may leave to be scored, beyond twice k: more takes longer than int16's
# product (measured with AMX: 0.2 % at d = 320, n = 10,240, 0.9 % at d = 1,280, n = 81,920).
_MOST_LEFT = 1 / 200
# The same of int8, which multiplies many more again by then (AVX2, d = 1,280: as fast as int16 at 0.09 %
# left for n = 20,480 and 81,920; at 0.28 % it takes 1.3 times as long).
_MOST_LEFT_BY_INT8 = 1 / 1000
_INT8 = ("avx2-int8", "avx-vnni-int8", "avx512-int8", "neon-int8")
# Of wide bounds: what is multiplied where they leave many in.
_CLOSER = {
    "avx2-int8": "avx2",
    "avx-vnni-int8": "avx2",
    "avx512-int8": "avx512",
    "amx": "avx512",
    "neon-int8": "neon",
}
_MOST_OF_INT8 = 2**17  # columns, so that as many products of int8 fit into int32
_RISE = 1 / 8  # of a guess, in a search: it falls at once, as what it misses is searched twice
_STALE = 3
_ERRORS = {
    1: "the activations hold NaN or infinite numbers: clean them before training",
    2: "a pre-activation overflows to NaN: scale the activations down",
    _STALE: "W_enc was changed while a kernel was using it: make a new NativeKernel",
}


class _Copy(NamedTuple):
    """Rows of ``W_enc``, quantised as ``instructions`` multiply; ``source`` keeps its address its own."""

    instructions: str
    source: Tensor
    writes: int | None
    integers: Int16[Tensor, "rows width"] | UInt8[Tensor, "rows width"]
    rows: Float[Tensor, "n 3"]


class NativeKernel:
    """See :class:`revelio.sae.kernels.base.Kernel`; weights, inputs and moments are float32 on the CPU.

    A kernel keeps a copy of one model's ``W_enc`` and renews it with every update it makes itself; after
    writes by PyTorch, such as another optimizer's, it is made anew.

    Args:
        threads: how many to use; None: PyTorch's number. Results do not depend on it.

    Attributes:
        instructions: what it multiplies with, one of
            :data:`~revelio.sae.kernels.build.INSTRUCTION_SETS`; ``amx`` and ``avx512-int8`` may become
            ``avx512``, ``avx2-int8`` and ``avx-vnni-int8`` ``avx2``, ``neon-int8`` ``neon``.
        scored: how many float32 scores the last search took.

    Raises:
        NativeUnavailable: no compiler, a processor that it is not written for, or switched off.
        ValueError: ``REVELIO_NATIVE`` names no instruction set.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.library = library()
        self.instructions = instruction_set()
        self.threads = threads
        self.scored = 0
        self._copy: _Copy | None = None
        self._guesses: dict[int, float] = {}  # by k: see encode.cpp

    @torch.no_grad()
    def encode(
        self,
        centred: Float[Tensor, "b d"],
        weights: Weights,
        k: int,
        among: Bool[Tensor, " n"] | None = None,
        k_among: int = 0,
        only: Bool[Tensor, " n"] | None = None,
        least: float = -inf,
    ) -> tuple[Codes, Codes | None]:
        """See :class:`~revelio.sae.kernels.base.Kernel`; larger first, ties to the lower index.

        With ``only`` and ``least``, of the k those that :meth:`encode_some` gives.

        Raises:
            ValueError: activations or weights that are not finite.
        """
        n, d = weights.W_enc.shape
        if self.instructions in _INT8 and (only is not None or d > _MOST_OF_INT8):
            # Bounds tell how others rank beside `only`.
            self.instructions = _CLOSER[self.instructions]
        # Held by a name as long as the library reads it: an address keeps nothing alive.
        centred = centred.contiguous()
        copy = self._copied(weights.W_enc)
        b, k = len(centred), min(k, n)
        k_among = min(k_among, int(among.sum())) if among is not None else 0
        best, others = _empty(b, k), _empty(b, k_among)
        mask, wanted = (
            one.to(torch.uint8).contiguous() if one is not None else None for one in (among, only)
        )
        scored = ctypes.c_int64()
        before = self._guesses.get(k, -inf)
        guess = ctypes.c_float(before)
        status = self.library.revelio_encode(
            *(_float(centred), _long(b), _long(d)),
            *(_float(weights.W_enc), _float(weights.b_enc), _long(n)),
            *(_address(copy.integers), _long(copy.integers.shape[1]), _float(copy.rows), _long(k)),
            *(_address(mask) if mask is not None else None, _long(k_among)),
            *(_address(wanted) if wanted is not None else None, ctypes.c_float(least)),
            *(_float(best.values), _address(best.indices)),
            *(_float(others.values), _address(others.indices)),
            *(
                ctypes.byref(scored),
                ctypes.byref(guess) if only is None else None,
                _number(copy.instructions),
                self._threads(),
            ),
        )
        if status:
            raise ValueError(_ERRORS[status])
        self.scored = scored.value
        if only is None:
            rises = -inf < before < guess.value
            self._guesses[k] = before + _RISE * (guess.value - before) if rises else guess.value
        most = _MOST_LEFT_BY_INT8 if self.instructions in _INT8 else _MOST_LEFT
        if self.scored > b * (2 * (k + k_among) + n * most):
            self.instructions = _CLOSER.get(self.instructions, self.instructions)
        return best, others if among is not None else None

    def encode_some(
        self,
        centred: Float[Tensor, "b d"],
        weights: Weights,
        k: int,
        only: Bool[Tensor, " n"],
        least: float,
    ) -> Codes:
        """See :class:`~revelio.sae.kernels.base.Selective`: bounds tell of most others how they rank."""
        return self.encode(centred, weights, k, only=only, least=least)[0]

    @torch.no_grad()
    def decode(self, codes: Codes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """See :class:`~revelio.sae.kernels.base.Kernel`."""
        values, indices = codes.values.contiguous(), codes.indices.contiguous()
        (b, k), d = indices.shape, rows.shape[1]
        out = torch.empty(b, d)
        self.library.revelio_decode(
            *(_float(values), _address(indices), _long(b), _long(k), _float(rows), _long(d)),
            *(_float(out), self._threads()),
        )
        return out

    @torch.no_grad()
    def code_gradients(
        self, codes: Codes, outputs: Float[Tensor, "b d"], rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, "b k"]:
        """See :class:`~revelio.sae.kernels.base.Kernel`."""
        indices, outputs = codes.indices.contiguous(), outputs.contiguous()
        (b, k), d = indices.shape, rows.shape[1]
        out = torch.empty(b, k)
        self.library.revelio_code_gradients(
            *(_float(outputs), _address(indices), _long(b), _long(k), _float(rows), _long(d)),
            *(_float(out), self._threads()),
        )
        return out

    @torch.no_grad()
    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        """See :class:`~revelio.sae.kernels.base.Kernel`."""
        n, d = weights.W_dec.shape
        self.library.revelio_unit_norm(
            *(_float(weights.W_dec), _address(moments.last), _long(n), _long(d), self._threads())
        )

    @torch.no_grad()
    def update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        """See :class:`~revelio.sae.kernels.base.Kernel`.

        Raises:
            ValueError: a weight is no longer finite.
        """
        n, d = weights.W_enc.shape
        copy = self._copied(weights.W_enc)
        gradient = gradient.by_latent()
        latents = gradient.latents
        places = [latents, gradient.images, gradient.output_rows]
        factors = [gradient.values, gradient.gradients]
        tables = [gradient.inputs.contiguous(), gradient.outputs.contiguous()]
        matrices = [weights.W_enc, weights.W_dec, moments.W_enc.mean, moments.W_enc.square]
        matrices += [moments.W_dec.mean, moments.W_dec.square]
        bad = self.library.revelio_update(
            *(_pointers(map(_float, matrices)), _address(moments.last), _long(n), _long(d)),
            *(_address(copy.integers), _long(copy.integers.shape[1]), _float(copy.rows)),
            *(_pointers(map(_address, places)), _pointers(map(_float, [*factors, *tables]))),
            *(_long(len(latents)), _long(step.t), ctypes.c_double(step.learning_rate)),
            *(ctypes.c_double(step.beta1), ctypes.c_double(step.beta2), ctypes.c_double(step.eps)),
            *(ctypes.c_int(step.unit_norm), _number(copy.instructions), self._threads()),
        )
        if bad:
            raise ValueError(f"weights overflowed in step {step.t}: lower learning_rate")
        d_b_enc = torch.zeros_like(weights.b_enc).index_add_(0, latents, factors[1])
        update_vector(weights.b_enc, d_b_enc, moments.b_enc, step)
        update_vector(weights.b_dec, gradient.b_dec, moments.b_dec, step)

    def _threads(self) -> ctypes.c_int:
        return ctypes.c_int(self.threads or torch.get_num_threads())

    def _copied(self, W_enc: Float[Tensor, "n d"]) -> _Copy:
        """The copy of these weights, made at their first use."""
        held, used = self._copy, self.instructions
        same = held and (held.source.data_ptr(), held.writes) == (W_enc.data_ptr(), writes(W_enc))
        if held and same and held.instructions == used:
            return held
        n, d = W_enc.shape
        self._copy = held = None
        size = torch.uint8 if used in _INT8 else torch.int16
        integers = torch.zeros(-(-n // _ROWS) * _ROWS, -(-d // _WIDTH) * _WIDTH, dtype=size)
        copy = _Copy(used, W_enc, writes(W_enc), integers, torch.empty(n, 3))
        bad = self.library.revelio_quantise(
            *(_float(W_enc), _long(n), _long(d), _long(integers.shape[1])),
            *(_address(integers), _float(copy.rows), _number(copy.instructions), self._threads()),
        )
        if bad:
            raise ValueError("W_enc holds NaN or infinite numbers: load another checkpoint")
        self._copy = copy
        return copy


def _number(instructions: str) -> ctypes.c_int:
    return ctypes.c_int(INSTRUCTION_SETS.index(instructions))


def _empty(b: int, k: int) -> Codes:
    return Codes(torch.empty(b, k), torch.empty(b, k, dtype=torch.int64))


def _address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _float(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.dtype == torch.float32
    return _address(tensor)


def _long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _pointers(addresses) -> ctypes.Array:
    held = list(addresses)
    return (ctypes.c_void_p * len(held))(*held)
