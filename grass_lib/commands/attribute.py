"""The command ``grass attribute``."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from grass_lib.errors import UsageError
from grass_lib.files import check_output

_EXCERPT = 300


def attribute(
    query: Annotated[str, typer.Option("--query", metavar="TEXT|FILE", help="A prompt, or a text file with one.")],
    store: Annotated[Path, typer.Option("--store", help="A finished gradient store.")],
    k: Annotated[int, typer.Option("-k", help="How many proponents and opponents.")] = 5,
    damping: Annotated[float, typer.Option(help="Times the mean eigenvalue of the curvature.")] = 0.1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write everything to this file.")
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bars.")] = False,
) -> None:
    """Print the training passages that made a prompt likelier, and those that made it less likely.

    Of a prompt longer than what the model was trained on at once the beginning is taken, and said to be.
    Of a store of Llama's: those that made the model's own answer to the prompt likelier, or less likely.
    """
    text = read_query(query)
    if k < 1:
        raise UsageError(f"-k is {k}; expected at least 1")
    if not 0.0 < damping < math.inf:
        raise UsageError(f"--damping is {damping}; expected a finite number above 0, for example 0.1")
    check_output(as_json)
    # Imported here, so that `grass --help` does not wait for torch.
    from grass_lib.commands.tasks import StoreSource, influence_of
    from grass_lib.experiments.base import resolve_device
    from grass_lib.ranks import started_by_torchrun
    from grass_lib.store import GradientStore
    from grass_lib.store.base import shard_list

    found = GradientStore.open(store)
    source = StoreSource.of_store(found)
    if k > found.n_samples:
        raise UsageError(f"-k is {k}; expected at most {found.n_samples}, the samples of {store}")
    if missing := found.missing():
        raise UsageError(
            f"{len(missing)} of {found.n_shards} shards are missing in {store} ({shard_list(missing)}); `grass store "
            "cache` with its settings computes them, `grass store merge` puts the stores of several workers together"
        )
    with started_by_torchrun(resolve_device(device)) as (ranks, place):
        task, influence = influence_of(source, store, device=place, ranks=ranks, progress=not quiet)
        asked = task.encode(text)
        top = influence.topk([asked], k=k, **_damping(source.hessian, damping))
    if ranks.rank:
        return
    result: dict[str, Any] = {
        "query": text,
        "store": source.to_json(),
        "damping": damping if source.hessian == "eFIM" else None,
    }
    if task.tokens is not None:
        has, taken = task.tokens(text)
        result["tokens"] = {"prompt": has, "asked": taken}
        if has > taken:
            cut = f"the prompt has {has:,} tokens, and the model was trained on {taken:,} at once"
            typer.echo(f"{cut}: only the first {taken:,} were asked about", err=True)
    if task.answer is not None:
        result["answer"] = task.answer(asked)
        typer.echo(f"the model's answer, which these passages made likelier or less likely:\n{result['answer']}")
    for place, side in enumerate(("proponents", "opponents")):
        pairs = zip(top.indices[0, place].tolist(), top.scores[0, place].tolist(), strict=True)
        result[side] = [{"index": index, "score": score, "text": task.passage(index)} for index, score in pairs]
    for side in ("proponents", "opponents"):
        typer.echo(f"\n{side}")
        for item in result[side]:
            excerpt = " ".join(item["text"].split())
            excerpt = excerpt if len(excerpt) <= _EXCERPT else excerpt[:_EXCERPT].rsplit(" ", 1)[0] + " ..."
            typer.echo(f"{item['score']:+.4g}  [{item['index']}]  {excerpt}")
    if as_json is not None:
        from grass_lib.report.files import json_bytes, write_atomic

        write_atomic(as_json, json_bytes(result))


def read_query(query: str) -> str:
    """The prompt itself: the content of a file where the words name one.

    Raises:
        UsageError: It is empty, names a file that is not there, or the file is not readable text.
    """
    path = Path(query)
    is_path = not re.search(r"\s", query) and (
        query.startswith(("/", "./", "../", "~")) or path.suffix in (".txt", ".md", ".json")
    )
    try:
        if is_path and path.is_dir():
            raise UsageError(f"--query is the folder {query!r}; expected a prompt, or the path of a text file with one")
        is_file = len(query) < 1024 and "\n" not in query and path.is_file()
        text = path.read_text(encoding="utf-8") if is_file else query
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--query names the file {query!r}, which is not readable UTF-8 text ({error})") from error
    if is_path and not is_file:
        raise UsageError(f"--query is {query!r}, and there is no such file; expected a prompt, or a text file with one")
    if not text.strip():
        raise UsageError("--query is empty; expected a prompt, or the path of a text file with one")
    return text


def _damping(hessian: str, damping: float) -> dict[str, float]:
    return {"damping": damping} if hessian == "eFIM" else {}
