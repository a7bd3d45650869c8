"""The C functions against the same in plain torch, and both against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lorasmith.native import is_enabled
from lorasmith.train.elementwise import NativeOperations, Operations, operations
from tests.support.tolerance import close

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


def both(dtype):
    native = operations(dtype, CPU)
    kinds = [Operations()]
    return [*kinds, native] if isinstance(native, NativeOperations) else kinds


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm64(x, w):
    x, w = x.double(), w.double()
    return w * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def test_a_compiler_gives_the_c_functions_and_nothing_else_does(monkeypatch):
    if is_enabled():
        assert {type(operations(d, CPU)) for d in DTYPES} <= {Operations, NativeOperations}
    assert type(operations(torch.float64, CPU)) is Operations
    monkeypatch.setenv("LORASMITH_NATIVE", "0")
    assert type(operations(torch.float32, CPU)) is Operations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 577])
def test_norm_and_its_gradient(dtype, width):
    x, w, dh, residual = (random(3, 5, width, dtype=dtype, seed=s) for s in range(4))
    w = w[0, 0].contiguous()
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(norm64(leaf, w), leaf, dh.double())
    for ops in both(dtype):
        close(ops.norm(x, w, EPS), norm64(x, w), dtype)
        close(ops.norm_backward(dh, x, w, EPS, residual), residual.double() + expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repeats", [True, False])
def test_rotation_is_the_models_bit_for_bit_and_turns_back(dtype, repeats):
    x = random(3, 11, 2, 8, dtype=dtype)
    angles = random(1 if repeats else 3, 11, 4, dtype=torch.float32, seed=1)
    angles = torch.cat([angles, angles], -1)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    a, b = x[..., :4], x[..., 4:]
    expected = x * cosine[:, :, None] + torch.cat([-b, a], -1) * sine[:, :, None]
    for ops in both(dtype):
        turned = ops.rotate_(x.clone(), cosine, sine)
        assert torch.equal(turned, expected)
        close(ops.rotate_(turned, cosine, sine, back=True), x.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotating_back_is_the_transpose_of_rotating(dtype):
    x, y = random(2, 5, 3, 8, dtype=dtype), random(2, 5, 3, 8, dtype=dtype, seed=1)
    cosine, sine = (
        random(1, 5, 8, dtype=dtype, seed=2),
        random(1, 5, 8, dtype=dtype, seed=3),
    )  # no angle's pair
    for ops in both(dtype):
        one = (ops.rotate_(x.clone(), cosine, sine).double() * y.double()).sum()
        other = (x.double() * ops.rotate_(y.clone(), cosine, sine, back=True).double()).sum()
        close(one / one.abs().clamp(min=100), other / one.abs().clamp(min=100), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_and_its_gradient(dtype):
    gate, up, dm = (random(3, 333, dtype=dtype, seed=s) for s in range(3))
    gate[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -30.0], dtype=dtype)
    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    expected = F.silu(leaves[0]) * leaves[1]
    gradients = torch.autograd.grad(expected, leaves, dm.double())
    for ops in both(dtype):
        close(ops.silu_mul(gate, up), expected.detach(), dtype)
        for found, wanted in zip(ops.silu_mul_backward(dm, gate, up), gradients, strict=True):
            close(found, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_its_gradient(dtype, smoothing):
    z, targets = random(6, 501, dtype=dtype) * 5, torch.tensor([0, 500, 3, 77, 77, 250])
    z[5] = -300.0
    z[5, 250] = 80.0  # certain
    leaf = z.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    for ops in both(dtype):
        given = z.clone()
        close(ops.cross_entropy_(given, targets, smoothing), losses.detach(), torch.float32)
        close(given, gradient, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_outside_the_vocabulary_is_refused_not_read(dtype, target):
    for ops in both(dtype):
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            ops.cross_entropy_(random(2, 5, dtype=dtype), torch.tensor([0, target]), 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_angles_of_another_dtype_rotate_the_same(dtype):
    x, angles = random(2, 5, 3, 8, dtype=dtype), random(1, 5, 8, dtype=torch.float64, seed=2)
    found = [ops.rotate_(x.clone(), angles.cos(), angles.sin()) for ops in both(dtype)]
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    x, w = random(9, 700, dtype=dtype), random(700, dtype=dtype, seed=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ops = operations(dtype, CPU)
            z = x.clone()
            losses = ops.cross_entropy_(z, torch.arange(9), 0.0)
            results.append([ops.norm(x, w, EPS), ops.norm_backward(x, x, w, EPS, x), losses, z])
    finally:
        torch.set_num_threads(before)
    if isinstance(operations(dtype, CPU), NativeOperations):
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
