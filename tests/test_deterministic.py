"""Asking for deterministic kernels, and leaving PyTorch as it was."""

import logging

import pytest
import torch
import torch._inductor.config as inductor

from grass_lib.deterministic import deterministic_kernels, is_deterministic

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.cudnn_sdp_enabled(),
        inductor.deterministic,
    )


@pytest.mark.parametrize("strict", [True, False])
def test_everything_is_asked_for_and_restored(strict):
    before = settings()

    def fails():
        with deterministic_kernels(CUDA, strict=strict):
            assert settings() == (True, not strict, False, False, True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert settings() == before


def test_nothing_is_changed_on_a_cpu():
    before = settings()
    with deterministic_kernels(CPU):
        assert settings() == before


def test_a_step_without_deterministic_kernels_is_noticed(caplog):
    def fails():
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError("cumsum does not have a deterministic implementation\nand more")

    with caplog.at_level(logging.WARNING):
        assert not is_deterministic(CUDA, fails)
    assert "cumsum does not have a deterministic implementation" in caplog.text
    assert "and more" not in caplog.text
    assert is_deterministic(CUDA, lambda: None)


def test_other_errors_are_not_taken_for_that():
    def fails():
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        is_deterministic(CUDA, fails)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_repeats_itself_on_a_gpu(compiled):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(8, 8, 1024, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3))

    def step():
        parts = [part.clone().requires_grad_() for part in (q, k, v)]
        found = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        return torch.autograd.grad(found.square().sum(), parts)

    run = torch.compile(step) if compiled else step
    with deterministic_kernels(CUDA):
        first = run()
        for _ in range(5):
            assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))
