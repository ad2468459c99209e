"""LogIX (logix-ai), through its core API: watch, add_lora, covariance, influence."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.baselines.adapters.base import Adapter
from grass_lib.baselines.models import sequence_losses
from grass_lib.baselines.systems import LogIXOptions
from grass_lib.baselines.workload import Workload

DEFAULT_DAMPING = 0.1


class LogIXAdapter(Adapter):
    """The loop of LogIX's documentation, with the scheduler that sets up each pass.

    Damping: LogIX takes one absolute value for all layers and divides by what it has computed first, whatever is passed
    later. To give it the same relative grid as the others, the inverse of each layer is put in by LogIX's own default
    formula, ``cov + 0.1 * tr(cov) / d * I``, with another number in place of 0.1.
    """

    options: LogIXOptions

    def _start(self, name: str) -> Any:
        logix = importlib.import_module("logix")
        config = self.folder / f"{name}.yaml"
        dtype = self.options.log_dtype
        config.write_text(
            f"root_dir: {self.folder / 'logs'}\nlogging:\n  log_dtype: {dtype}\n"
            f"lora:\n  init: {self.options.init}\n  rank: {self.options.rank}\n",
            encoding="utf-8",
        )
        run = logix.LogIX(name, str(config))
        run.watch(self.model, name_filter=self.layers)
        return run

    def _walk(self, run: Any, ids: Tensor, first: int = 0) -> None:
        for part in self.batches(ids):
            names = [str(first + row) for row in range(len(part))]
            first += len(part)
            with run(data_id=names, mask=None):
                self.model.zero_grad(set_to_none=True)
                sequence_losses(self.model, part).sum().backward()

    def cache(self) -> None:
        """As many passes as the scheduler asks for; the last one logs the gradients."""
        self._run = run = self._start("cache")
        hessian = self.options.hessian
        scheduler = importlib.import_module("logix").LogIXScheduler(
            run, lora=self.options.init, hessian=hessian, save="grad"
        )
        passes = len(scheduler)
        for number in range(passes):
            last = number == passes - 1
            with self.phases("set-up"), _default_dtype(self.workload.shape.dtype):
                next(scheduler)
            if last and self.workload.warm_up:
                self._walk(run, self.workload.train_ids[: self.workload.warm_up * self.workload.batch_size])
                self._forget(run)
            with self.phases("gradients" if last else "more passes"):
                self._walk(run, self.workload.train_ids)
                run.finalize()
        if hessian == "raw":
            with self.phases("curvature"):
                self._put_inverse(DEFAULT_DAMPING)
        elif hessian in ("kfac", "ekfac"):
            with self.phases("curvature"):
                run.state.get_covariance_svd_state()
        self.details = {"passes": passes, "layers": len(self.layers), "init": run.lora_handler.init_strategy}
        if self.options.keep_matrices:
            self.tensors = self._matrices()

    def _forget(self, run: Any) -> None:
        """Takes the warm-up out of the log and of what the last pass sums."""
        state = run.state
        sums = ["ekfac_eigval_state", "ekfac_counter"] if self.options.hessian == "ekfac" else []
        if self.options.hessian in ("raw", "kfac"):
            sums = ["covariance_state", "covariance_counter"]
        for name in sums:
            getattr(state, name).clear()
        run.logger.log_saver.buffer_clear()

    def _matrices(self) -> dict[str, Tensor]:
        """The encoder as an input side ``(d_in + bias, rank)``, the decoder as an output side ``(d_out, rank)``."""
        found = {}
        for name in self.layers:
            module = self.model.get_submodule(name)
            right = module.logix_lora_A.weight.detach().float().mT.cpu()
            if module._linear.bias is not None:  # LogIX has no gradient of biases: their row is zero
                right = torch.cat([right, right.new_zeros(1, right.shape[1])])
            found[f"{name}/input"] = right
            found[f"{name}/output"] = module.logix_lora_C.weight.detach().float().cpu()
        return found

    def _put_inverse(self, damping: float) -> None:
        state = self._run.state
        state.register_state("covariance_inverse_state", save=True)
        state.covariance_inverse_state.clear()
        for module, found in state.get_covariance_state().items():
            cov = found["grad"].float()
            unit = torch.eye(len(cov), device=cov.device)
            state.covariance_inverse_state[module]["grad"] = torch.inverse(
                cov + damping * torch.trace(cov) / len(cov) * unit
            ).to(found["grad"].dtype)

    def attribute(self) -> Tensor:
        """Gradients of the queries, preconditioned, against the log."""
        run = self._run
        run.eval()
        run.setup({"grad": ["log"]})
        with self.phases("queries"):
            logs = []
            for number, part in enumerate(self.batches(self.workload.query_ids)):
                with run(data_id=[f"q{number}-{row}" for row in range(len(part))], mask=None):
                    self.model.zero_grad(set_to_none=True)
                    sequence_losses(self.model, part).sum().backward()
                logs.append(run.get_log(copy=True))
            queries = importlib.import_module("logix.utils").merge_logs(logs)
        loader = run.build_log_dataloader(batch_size=64)
        return torch.stack([self._scores(queries, loader, damping) for damping in self.dampings])

    def _scores(self, queries: Any, loader: Any, damping: float | None) -> Tensor:
        run, hessian = self._run, self.options.hessian
        with self.phases("scoring"):
            if hessian in ("kfac", "ekfac"):
                queries = (queries[0], self._factored(queries[1], DEFAULT_DAMPING if damping is None else damping))
            elif hessian == "raw":
                self._put_inverse(DEFAULT_DAMPING if damping is None else damping)
            result = run.compute_influence_all(queries, loader, precondition=hessian == "raw")
        order = torch.tensor([int(name) for name in result["tgt_ids"]])
        scores = result["influence"].mT.float()
        return scores[torch.argsort(order)]

    def _factored(self, queries: Any, damping: float) -> Any:
        """Layer by layer: LogIX computes its default damping from the first layer and uses it for all of them.

        Eigenvalues are handed over as copies, since LogIX adds the damping to them in place.
        """
        utilities = importlib.import_module("logix.analysis.influence_function_utils")
        values, vectors = self._run.state.get_covariance_svd_state()
        found: dict[str, Any] = {}
        for module, log in queries.items():
            own = values[module]
            grid = own if isinstance(own, Tensor) else torch.outer(own["backward"], own["forward"])
            alone = _OneLayer({module: grid.clone()}, {module: vectors[module]})
            found |= utilities.precondition_kfac({module: log}, alone, damping=damping * float(grid.mean()))
        return found


@contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    """LogIX makes its adapters in torch's default type, whatever the model's is, and a bfloat16 model then fails."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _OneLayer:
    """What ``precondition_kfac`` asks of a state."""

    def __init__(self, values: dict[str, Any], vectors: dict[str, Any]) -> None:
        self._found = values, vectors

    def get_covariance_svd_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._found


def facts(workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """See `logix_facts`."""
    return importlib.import_module("grass_lib.baselines.adapters.logix_facts").facts(workload, folder)


ADAPTER = LogIXAdapter
