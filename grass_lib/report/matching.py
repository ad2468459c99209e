"""Which result row of ours belongs to a published one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grass_lib.report.schema import RunRecord

#: Parameters of notebooks whose default, 0, stands for the paper's own number.
PROTOCOL_PARAMETERS = ("n_lds_models", "n_trak_models")
#: Studies whose rows stand for those of a pair: the published masks were one for all networks, and learned.
STUDIES = {"mlp_masks": "mlp_mnist"}
#: Parameters that choose other data, another model or another training than the paper's, quoted in reasons.
CHOICES = ("data", "base", "recipe", "masks")
#: Pairs whose published rows leave the output layer out.
WITHOUT_HEAD = ("gpt2_wikitext",)


@dataclass(frozen=True)
class Measured:
    """A result row of ours with the record that it comes from."""

    record: RunRecord
    row: Mapping[str, Any]

    @property
    def substitute(self) -> str | None:
        """What stands in for the paper's data or weights, if anything."""
        if self.record.data["kind"] == "substitute":
            return "data"
        return "weights" if self.record.extra.get("weights") == "substitute" else None

    @property
    def changed(self) -> str:
        """Parameters that make the run another protocol than the paper's, as ``name=value``."""
        given = self.record.parameters
        return ", ".join(f"{name}={given[name]}" for name in PROTOCOL_PARAMETERS if given.get(name))

    @property
    def choices(self) -> str:
        """The parameters `CHOICES` in brackets where the run has them, such as `` (data=official, base=hub)``."""
        return choices_text(self.record)


def choices_text(record: RunRecord) -> str:
    """The values of `CHOICES` among a run's parameters, in brackets; nothing where it has none."""
    found = ", ".join(f"{name}={record.parameters[name]}" for name in CHOICES if record.parameters.get(name))
    return f" ({found})" if found else ""


def with_more_layers(experiment: str, row: Mapping[str, Any]) -> bool:
    """Whether a result row has the output layer's gradients, which the published rows of its pair have not."""
    return experiment in WITHOUT_HEAD and bool(row.get("head_included"))


def like_for_like(projection: str) -> str:
    """The projection of ours that computes what the published one did.

    The published rows called ``fjlt`` were made with ``fast_jl``, a dense Rademacher projection (TRAK's package).

    Args:
        projection: a published projection.
    """
    return projection.replace("fjlt-", "rademacher-", 1) if projection.startswith("fjlt-") else projection


class RowIndex:
    """Result rows by experiment, attributor and compression; the first record that has one wins."""

    def __init__(self, records: Iterable[RunRecord]) -> None:
        """Keeps the records of scale ``paper``.

        Args:
            records: Run records, the preferred ones first.
        """
        self.records = [record for record in records if record.scale == "paper"]

    @cached_property
    def rows(self) -> dict[tuple[str, str, str, str], list[Measured]]:
        """By experiment, attributor, sparsification and projection."""
        found: dict[tuple[str, str, str, str], list[Measured]] = {}
        for record in self.records:
            pair = STUDIES.get(record.experiment, record.experiment)
            for row in record.results:
                if "way" in row and not (row["way"] == "learned" and row["shared"]):
                    continue
                if with_more_layers(pair, row):
                    continue
                key = (pair, row["attributor"], row["sparsification"], row["projection"])
                found.setdefault(key, []).append(Measured(record, row))
        return found

    def find(self, published: Mapping[str, Any], projection: str, metric: str) -> Measured | None:
        """Ours for a published row: of the first record that has one, the paper's damping convention if it has both."""
        key = (published["experiment"], published["attributor"], published["sparsification"], projection)
        having = [item for item in self.rows.get(key, ()) if item.row.get(metric) is not None]
        same = [item for item in having if item.record is having[0].record]
        return min(same, key=lambda item: item.row.get("damping_convention") != "paper", default=None)

    def known(self, experiment: str) -> RunRecord | None:
        """The first record of an experiment."""
        return next((record for record in self.records if record.experiment == experiment), None)
