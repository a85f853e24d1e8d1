"""The soft rank: hand numbers, limits, ties, blocks, and the GPU's kernel by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor

from pipeline.losses.cmkd import soft_spearman
from pipeline.losses.correlation import pearson
from pipeline.losses.soft_rank import _rank_by_sorting, average_ranks, degenerate_shares, soft_rank

STUDENT = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.2, -0.4, 1.5, 0.3]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 1.0, 0.0, -2.0], [0.5, -1.0, 3.0, 0.0]], dtype=torch.float64)


def random_values(rows: int, classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: object, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def test_ranks_have_the_fixtures_values() -> None:
    close(average_ranks(STUDENT), [[3, 4, 2, 1], [2, 1, 4, 3]])
    close(average_ranks(TEACHER), [[4, 3, 2, 1], [3, 1, 4, 2]])
    close(soft_rank(STUDENT, strength=1.0)[0][0], [17 / 6, 23 / 6, 7 / 3, 1.0])
    close(soft_rank(STUDENT, strength=0.5)[0][1], [7 / 3, 17 / 15, 4.0, 38 / 15])
    close(soft_rank(STUDENT, strength=1.0)[0][1], [2.3, 1.7, 3.6, 2.4])


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (0.1, [0.8, 0.8]),
        (0.5, [0.8, 0.9223902962]),
        (1.0, [0.7668115805, 0.9655286707]),
        (2.0, [0.8392740627, 0.9845454785]),
    ],
)
def test_soft_spearman_of_soft_ranks_has_the_fixtures_values(strength: float, expected: list[float]) -> None:
    ranks = [soft_rank(values, strength=strength)[0] for values in (STUDENT, TEACHER)]
    close(pearson(ranks[0], ranks[1], floor=1e-9), expected)


def test_soft_spearman_has_the_fixtures_gradient() -> None:
    student = STUDENT.clone().requires_grad_()
    rho = pearson(soft_rank(student, strength=1.0)[0], soft_rank(TEACHER, strength=1.0)[0], floor=1e-9)
    (gradient,) = torch.autograd.grad(rho.sum(), student)
    expected = [[0.249761, -0.153362, -0.096399, 0], [0.160869, -0.067341, -0.025876, -0.067652]]
    close(gradient, expected, 1e-6)


def test_a_gap_of_exactly_the_strength_is_not_pooled() -> None:
    values = torch.tensor([[1.0, 2, 3, 4, 5]], dtype=torch.float64, requires_grad=True)
    target, _ = soft_rank(torch.tensor([[5.0, 6, 7, 8, 7]], dtype=torch.float64), strength=1.0)
    ranks, num_blocks = soft_rank(values, strength=1.0)
    rho = pearson(ranks, target, floor=1e-9)
    assert rho.item() == pytest.approx(0.8321, abs=1e-4)
    assert num_blocks.tolist() == [5]
    (gradient,) = torch.autograd.grad(rho.sum(), values)
    assert not gradient.any()  # torchsort, which pools here, has the other one-sided gradient
    pooled = pearson(soft_rank(values * (1 - 1e-9), strength=1.0)[0], target, floor=1e-9)
    (gradient,) = torch.autograd.grad(pooled.sum(), values)
    close(gradient[0], [-0.0555, 0, 0.0555, 0.1109, -0.1109], 1e-4)


def test_large_gaps_give_hard_ranks_without_gradient_and_small_ones_a_linear_function() -> None:
    values = random_values(8, 6).requires_grad_()
    hard, num_blocks = soft_rank(values, strength=1e-6)
    close(hard, rankdata(values.detach().numpy(), axis=1), 1e-9)
    assert num_blocks.tolist() == [6] * 8
    assert not torch.autograd.grad((hard * hard.detach()).sum(), values)[0].any()
    linear, num_blocks = soft_rank(values, strength=1e3)
    close(linear, (values - values.mean(1, keepdim=True)).detach() / 1e3 + 3.5, 1e-9)
    assert num_blocks.tolist() == [1] * 8
    other = random_values(8, 6).flip(0)
    close(pearson(linear * 1e3, other), pearson(values, other), 1e-9)


@pytest.mark.parametrize("strength", [0.03, 0.3, 3.0])
def test_soft_ranks_gradient_is_that_of_finite_differences(strength: float) -> None:
    values = random_values(6, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_rank(x, strength=strength)[0], (values,))


def test_spearman_sees_the_order_only() -> None:
    teacher = random_values(5, 8)
    student = torch.linspace(0, 7, 8, dtype=torch.float64).expand(5, 8)[:, torch.randperm(8)]
    rho, _ = soft_spearman(student, teacher, strength=0.1)
    for same in (teacher.exp(), 3 * teacher + 5, teacher**3):
        assert torch.equal(soft_spearman(student, same, strength=0.1)[0], rho)
    close(soft_spearman(student, -teacher, strength=0.1)[0], -rho, 1e-9)
    close(soft_spearman(student, student.exp(), strength=0.1)[0], [1.0] * 5, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ties_share_their_rank_and_their_gradient(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 1.0, -0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]], dtype=dtype, requires_grad=True)
    ranks, num_blocks = soft_rank(values, strength=0.01)
    close(ranks, [[3.5, 3.5, 1.5, 1.5, 5.0], [3.0] * 5], 1e-6)
    assert num_blocks.tolist() == [3, 1]
    assert torch.equal(average_ranks(values), ranks.detach().round(decimals=3))
    (gradient,) = torch.autograd.grad(ranks[0, 0], values)
    close(gradient[0], [50.0, -50.0, 0, 0, 0], 1e-4)


def test_float32_has_the_ranks_of_float64_of_either_sign_and_any_size() -> None:
    values = random_values(50, 40) * torch.logspace(-20, 15, 50, dtype=torch.float64)[:, None]
    narrow = values.float()
    assert torch.equal(average_ranks(narrow).double(), average_ranks(narrow.double()))
    scale = values.abs().amax(1).median().item() / 40
    ranks, blocks = soft_rank(narrow, strength=scale)
    exact, exact_blocks = soft_rank(narrow.double(), strength=scale)
    assert torch.equal(blocks, exact_blocks)
    close(ranks / exact.abs().amax(1, keepdim=True), exact / exact.abs().amax(1, keepdim=True), 1e-6)


def test_rows_and_classes_may_be_permuted_and_rows_are_shared_out_to_threads() -> None:
    values = random_values(300, 500, torch.float32)
    ranks, blocks = soft_rank(values, strength=1 / 500)
    rows, columns = torch.randperm(300), torch.randperm(500)
    again, blocks_again = soft_rank(values[rows][:, columns], strength=1 / 500)
    assert torch.equal(again, ranks[rows][:, columns])
    assert torch.equal(blocks_again, blocks[rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(soft_rank(values, strength=1 / 500)[0], ranks)
    finally:
        torch.set_num_threads(threads)


def test_degenerate_rows_are_counted() -> None:
    shares = degenerate_shares(torch.tensor([1, 4, 4, 2]), 4)
    assert (shares.hard.item(), shares.linear.item()) == (0.5, 0.25)
    values = random_values(100, 100)
    _, blocks = soft_rank((values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True), strength=1 / 100)
    assert degenerate_shares(blocks, 100) == (0.0, 0.0)
    assert (blocks > 25).double().mean() > 0.99


def test_ranks_by_whole_tensors_are_the_same() -> None:
    values = torch.randint(-3, 4, (30, 9), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(_rank_by_sorting(values), average_ranks(values))


INTERPRETED = """
import torch
from pipeline.losses import soft_rank
generator = torch.Generator().manual_seed(0)
for strength in (0.05, 0.3, 2.0):
    values = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    values[0], values[1, ::2] = 1.0, values[1, 1]
    weights = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    ranks, blocks = soft_rank.soft_rank(values.requires_grad_(), strength=strength)
    (gradient,) = torch.autograd.grad((ranks * weights).sum(), values)
    on_gpu, blocks_on_gpu, order, starts = soft_rank._pool_on_gpu(values.detach(), strength)
    torch.testing.assert_close(on_gpu, ranks.detach(), atol=1e-12, rtol=0)
    assert torch.equal(blocks_on_gpu, blocks)
    centred = soft_rank._centre_on_gpu(weights, order, starts, strength)
    torch.testing.assert_close(centred, gradient, atol=1e-12, rtol=0)
"""


@pytest.mark.slow  # the interpreter takes a quarter of a minute
def test_the_gpus_kernels_agree_with_the_cpus() -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_the_gpus_kernels_can_be_compiled_without_a_gpu() -> None:
    """For an H100, to the machine code that it runs; of one class, a number that Triton treats apart, too."""
    triton = pytest.importorskip("triton", reason="Triton is published for Linux only")
    from triton.backends.compiler import GPUTarget

    from pipeline.losses.kernels import gpu

    kernels = {
        gpu._pool: ["*fp64", "*fp64", "*i32", "*fp64", "*i32", "*i64", "i32"],
        gpu._average: ["*fp64", "*i32", "*fp64", "i32"],
    }
    for kernel, types in kernels.items():
        for last in ("i32", "constexpr"):
            signature = dict(zip(kernel.arg_names, [*types[:-1], last], strict=True))
            known = {} if last == "i32" else {(len(types) - 1,): 1}
            source = triton.compiler.ASTSource(kernel, signature, constexprs=known)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=gpu.OPTIONS)
            assert compiled.asm["cubin"]
