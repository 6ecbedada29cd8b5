"""Products with packed weights on the CPU against the plain decoder and double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_tools import BLOCKED, matrix, near

from quantkit.formats import get_format
from quantkit.kernels import host, product, repack
from quantkit.kernels.dequantize import dequantize, embedding
from quantkit.kernels.packing import Packing


@pytest.mark.parametrize("fmt", BLOCKED, ids=lambda fmt: fmt.name)
def test_all_formats_decode_to_the_bit_and_multiply(fmt):
    raw, weight = matrix(fmt, 37, 3)
    packing = Packing(fmt)
    decoded = dequantize(raw, packing)
    assert np.array_equal(decoded.numpy().view(np.uint32), weight.astype(np.float32).view(np.uint32))
    assert torch.equal(dequantize(repack.pack(raw, fmt), Packing(fmt, planes=True)), decoded)
    ids = torch.tensor([[3, 36], [0, 3]])
    assert torch.equal(embedding(ids, raw, packing, torch.bfloat16), decoded[ids].bfloat16())
    for tokens in (1, host.FEW, host.FEW + 1):
        x, back = torch.randn(tokens, weight.shape[1]), torch.randn(tokens, 37)
        near(product.matmul(x, raw, packing), x, weight, "rows")
        near(product.matmul_transposed(back, raw, packing), back, weight.T, "columns")


def test_large_matrices_in_parts_are_multiplied_whole(monkeypatch):
    """Several tiles and panels a thread, a low-rank addition, half precision, inputs that are not contiguous, no tokens."""
    monkeypatch.setattr(host, "TILE", 1 << 10)
    monkeypatch.setattr(host, "PANEL", 1 << 11)
    monkeypatch.setattr("quantkit.threads.CHUNK_WEIGHTS", 1 << 13)
    packing = Packing.of("Q4_K")
    raw, weight = matrix(packing.format, 67, 4)
    for tokens in (2, 30):
        x = torch.randn(tokens, 2 * weight.shape[1])[:, ::2]
        near(product.matmul(x, raw, packing), x, weight, "tiles")
        back = torch.randn(tokens, 67)
        near(product.matmul_transposed(back, raw, packing), back, weight.T, "transposed")
    low, up = torch.randn(30, 5), torch.randn(67, 5)
    near(product.matmul(x, raw, packing, low, up), x, weight, "low rank", (low.double() @ up.double().T).numpy())
    out = product.matmul(x.bfloat16(), raw, packing)
    assert out.dtype == torch.bfloat16 and torch.allclose(
        out.float(), x.bfloat16().float() @ torch.from_numpy(weight).float().T, rtol=0.02, atol=0.1
    )
    assert product.matmul(x[:0], raw, packing).shape == (0, 67)
    assert product.matmul(x.reshape(5, 6, -1), raw, packing).shape == (5, 6, 67)


def test_experts_get_their_own_tokens():
    packing, other = Packing.of("Q6_K"), Packing.of("Q4_0")
    raw, weight = matrix(packing.format, 3 * 13, 2)
    up, weight_up = matrix(other.format, 3 * 13, 16, seed=1)
    ends = torch.tensor([3, 3, 21], dtype=torch.int32)
    data, x = raw.reshape(3, 13, -1), torch.randn(21, 512)
    out = product.grouped(x, data, packing, ends)
    value = product.grouped(x, up.reshape(3, 13, -1), other, ends)
    made = product.swiglu(x, data, up.reshape(3, 13, -1), (packing, other), ends)
    assert torch.allclose(made, torch.nn.functional.silu(out) * value)
    for expert, part in ((0, slice(0, 3)), (2, slice(3, 21))):
        gate = weight.reshape(3, 13, -1)[expert]
        near(out[part], x[part], gate, "experts")
        near(value[part], x[part], weight_up.reshape(3, 13, -1)[expert], "experts, up")
    moved = product.grouped(x, repack.pack(data, packing.format), Packing(packing.format, planes=True), ends)
    assert torch.equal(moved, out)


def test_threads_change_no_bit():
    packing = Packing(get_format("Q4_K"))
    raw, weight = matrix(packing.format, 600, 8)
    for tokens in (1, 16):
        x, before, found = torch.randn(tokens, weight.shape[1]), torch.get_num_threads(), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(product.matmul(x, raw, packing))
        torch.set_num_threads(before)
        assert torch.equal(*found)
