"""Masked passes recorded as CUDA graphs on a GPU, against passes as they are and whole gradients."""

import gc
import logging

import pytest
import torch
from torch import nn

from grass_lib.errors import GrassError
from grass_lib.gradients import MaskedGradients, PerSampleGradients, margin
from grass_lib.gradients.capturing import CapturedGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def images(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 16, 16, generator=generator)
    return x.cuda(), torch.randint(0, 10, (n,), generator=generator).cuda()


def image_model(seed: int = 0, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 32, 3, stride=2, padding=1, groups=2),
        nn.GroupNorm(4, 32),
        nn.Dropout(0.5),
        nn.Flatten(2),
        nn.LayerNorm(64),
        nn.Linear(64, 10),
        nn.AdaptiveAvgPool2d((1, 10)),
        nn.Flatten(),
    ).cuda()
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    return model


class Text(nn.Module):
    """Token and position embeddings; tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(50, 24, padding_idx=0), nn.Embedding(20, 24)
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)[None])
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


def likelihood(model, batch):
    ids = batch[0]
    return model(ids).log_softmax(dim=2)[:, :-1].gather(2, ids[:, 1:, None]).sum(dim=(1, 2))


def some(p: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randperm(p, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def close(rows, full, indices):
    scale = float(full.abs().max())
    torch.testing.assert_close(rows, full[:, indices.to(full.device)], atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "kernel"])
def test_two_checkpoints_in_turn_and_two_sizes(backend):
    model, other = image_model(), image_model(seed=1)
    whole = PerSampleGradients(model, margin)
    indices = some(whole.p, 3000)
    gradients = MaskedGradients(model, margin, indices, backend=backend, micro_batch=16)
    eager = MaskedGradients(model, margin, indices, backend=backend, micro_batch=16, graph=False)
    for turn in range(4):
        batch = images(37, seed=turn)
        for state in (model, other):
            rows, values = gradients(state.state_dict(), batch)
            full, wanted = whole(state.state_dict(), batch)
            close(rows, full, indices)
            torch.testing.assert_close(values, wanted, atol=1e-4, rtol=1e-5)
            plain = eager(state.state_dict(), batch)[0]
            torch.testing.assert_close(rows, plain, atol=5e-6 * float(full.abs().max()), rtol=1e-5)
    assert gradients.recorded == 2  # 16 and 5
    assert eager.recorded == 0
    assert set(gradients.routes.values()) == {"layer"}
    assert gradients.model_calls == eager.model_calls == 24


@pytest.mark.parametrize("backend", ["torch", "kernel"])
def test_weights_changed_in_place_and_other_coordinates(backend):
    model, batch = image_model(), images(16)
    whole = PerSampleGradients(model, margin)
    first, second = some(whole.p, 2000), some(whole.p, 500, seed=2)
    gradients = MaskedGradients(model, margin, first, backend=backend)
    gradients(None, batch)
    other = gradients.keeping(second)
    for turn in range(4):
        full, _ = whole(None, batch)
        close(gradients(None, batch)[0], full, first)
        close(other(None, batch)[0], full, second)
        with torch.no_grad():
            for value in (*model.parameters(), model[1].running_mean):
                value.mul_(1.05).add_(0.01 * turn)
    assert gradients.recorded == other.recorded == 1


@pytest.mark.parametrize("backend", ["torch", "kernel"])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_text(backend, share):
    torch.manual_seed(0)
    model = Text().cuda()
    whole = PerSampleGradients(model, likelihood)
    indices = some(whole.p, int(share * whole.p))
    gradients = MaskedGradients(model, likelihood, indices, backend=backend)
    for turn in range(4):
        ids = torch.randint(0, 50, (9, 20), generator=torch.Generator().manual_seed(turn)).cuda()
        close(gradients(None, (ids,))[0], whole(None, (ids,))[0], indices)
    assert gradients.recorded == 1


@pytest.mark.parametrize("backend", ["torch", "kernel"])
def test_half_weights_and_autotuned_convolutions(backend):
    model = image_model().bfloat16()
    indices = some(PerSampleGradients(model, margin).p, 1000)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        found = []
        for graph in (True, False):
            gradients = MaskedGradients(model, margin, indices, backend=backend, graph=graph)
            for turn in range(4):
                x, y = images(16, seed=turn)
                rows, _ = gradients(None, (x.bfloat16(), y))
            found.append(rows)
            assert gradients.recorded == int(graph)
    finally:
        torch.backends.cudnn.benchmark = before
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-2


def test_settings_are_followed():
    model, indices = image_model(width=64), some(11000, 3000)
    gradients = MaskedGradients(model, margin, indices)
    eager = MaskedGradients(model, margin, indices, graph=False)
    batch = images(64)
    for allowed in (False, True) * 4:
        torch.backends.cudnn.allow_tf32 = allowed
        wanted = eager(None, batch)[0]
        scale = float(wanted.abs().max())
        # Rounded factors carry a change of order in a sum further.
        atol = (1e-3 if allowed else 1e-5) * scale
        torch.testing.assert_close(gradients(None, batch)[0], wanted, atol=atol, rtol=1e-5)
    assert gradients.recorded == 2


class Waiting(nn.Module):
    """Cannot be recorded: the host waits for the device, openly or behind PyTorch's back, or draws numbers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.hidden, self.head = how, nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        if self.how == "item":
            x = x * (2.0 if x.abs().sum().item() > 0 else 1.0)
        elif self.how == "copy":
            x = x * torch.tensor([2.0] * 6, device=x.device)
        elif self.how == "mask":
            x = torch.zeros_like(x).masked_scatter(x > 0, x[x > 0])
        elif self.how == "synchronize":
            torch.cuda.synchronize()
        elif self.how == "python" and torch.cuda.is_current_stream_capturing():
            raise ArithmeticError("not now")
        return self.head(torch.tanh(self.hidden(x)))


@pytest.mark.parametrize("how", ["item", "copy", "mask", "synchronize", "python"])
def test_what_cannot_be_recorded_runs_as_it_is_and_leaves_cuda_in_order(how, caplog):
    torch.manual_seed(0)
    model = Waiting(how).cuda()
    indices = torch.arange(0, 53, 2)
    gradients = MaskedGradients(model, margin, indices)
    reference = Waiting("").cuda()
    reference.load_state_dict(model.state_dict())
    stream, device = torch.cuda.current_stream(), torch.cuda.current_device()
    torch.cuda.manual_seed(5)
    numbers = torch.cuda.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="grass_lib"):
        for turn in range(4):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(turn)).cuda()
            y = torch.arange(8, device="cuda") % 3
            rows, _ = gradients(None, (x, y))
            seen = {"item": 2 * x, "copy": 2 * x, "mask": x.clamp(min=0)}.get(how, x)
            inner, _ = MaskedGradients(reference, margin, torch.arange(53), graph=False)(None, (seen, y))
            if how in ("synchronize", "python"):
                torch.testing.assert_close(rows, inner[:, indices.cuda()], atol=1e-6, rtol=1e-5)
            else:
                assert bool(torch.isfinite(rows).all())
    assert gradients.recorded == 0
    warnings = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert len(warnings) == 1
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.current_device() == device
    assert torch.cuda.get_sync_debug_mode() == 0
    # Random numbers, allocations and other recordings go on as if nothing had been tried.
    assert torch.equal(torch.cuda.get_rng_state(), numbers)
    torch.rand(1000, device="cuda")
    torch.cuda.empty_cache()
    again = MaskedGradients(reference, margin, indices)
    for _ in range(3):
        rows, _ = again(None, (x, y))
    assert again.recorded == 1
    torch.cuda.synchronize()


def test_a_model_that_draws_random_numbers_is_not_recorded(caplog):
    class Noisy(Waiting):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    gradients = MaskedGradients(Noisy("").cuda(), margin, torch.arange(10))
    batch = torch.randn(8, 6).cuda(), torch.arange(8).cuda() % 3
    with caplog.at_level(logging.WARNING, logger="grass_lib"):
        found = [gradients(None, batch)[0] for _ in range(4)]
    assert gradients.recorded == 0
    assert not torch.equal(found[2], found[3])
    torch.rand(10, device="cuda")


def test_memory_goes_back_with_the_object():
    batch = images(64)
    model = image_model(width=64)
    indices = some(11000, 3000)

    def reserved() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    eager = MaskedGradients(model, margin, indices, graph=False)
    for _ in range(3):
        eager(None, batch)
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        before = reserved()
        gradients = MaskedGradients(model, margin, indices)
        for _ in range(3):
            gradients(None, batch)
        assert gradients.recorded == 1
        assert reserved() > before + 8 * 2**20
        del gradients
        torch._C._cuda_clearCublasWorkspaces()
        # PyTorch may keep two numbers of its random generator in a small segment of their own.
        assert reserved() <= before + 2 * 2**20
    finally:
        gc.enable()


def test_graphs_share_memory_and_errors_name_the_reason():
    graphs = CapturedGraphs(CUDA)
    x, out = torch.ones(1 << 20, device="cuda"), torch.zeros(2, device="cuda")

    def step(factor: float, place: int) -> None:
        out[place] = (x * factor + 1).sum()

    for place in range(2):
        step(1.0, place)
    one, two = graphs(lambda: step(2.0, 0)), graphs(lambda: step(3.0, 1))
    for first, second in ((one, two), (two, one)):
        x.add_(1)
        first()
        second()
        n = float(x[0])
        assert out.tolist() == [(2 * n + 1) * (1 << 20), (3 * n + 1) * (1 << 20)]
    with pytest.raises(GrassError, match="ZeroDivisionError"):
        graphs(lambda: out.fill_(1 / 0))
    with pytest.raises(GrassError):
        graphs(lambda: out.fill_(float(x[0])))
    one()
    torch.cuda.synchronize()
