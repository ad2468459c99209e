"""`grass masks` as users type it: on the embedded MLP, and layer by layer on a toy experiment."""

from types import SimpleNamespace

import pytest
import torch
import zoo
from torch.nn import functional

from grass_lib.cli import main
from grass_lib.commands import mask_tasks
from grass_lib.commands.tasks import StoreSource, influence_of
from grass_lib.experiments.base import AttributionTask
from grass_lib.gradients import FactoredGradients
from grass_lib.masks import load_masks
from grass_lib.projection import Mask
from grass_lib.specs import StageSpec
from grass_lib.store import GradientStore

N = 40


def loss(model, batch) -> torch.Tensor:
    (ids,) = batch
    following = functional.pad(ids[:, 1:], (0, 1), value=-100)
    losses = functional.cross_entropy(model(ids).flatten(0, 1), following.flatten(), reduction="none")
    return losses.view(ids.shape).sum(dim=1)


def task_of(model) -> AttributionTask:
    (ids,) = zoo.make_samples("text", N)
    return AttributionTask(
        model=model,
        loss=loss,
        target=None,
        layers="linear",
        include_head=False,
        train=[(part,) for part in ids.split(8)],
        n_train=N,
        data_sha256="0" * 64,
        encode=lambda text: (ids[:1],),
        passage=str,
        parameters={},
    )


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A model that tests may change, and what the command line asks about it."""
    model = zoo.make_model("text")
    experiment = SimpleNamespace(attribution_task=lambda scale, parameters, device, progress=True: task_of(model))
    monkeypatch.setattr("grass_lib.runner.planning.experiments_by_name", lambda: {"toy": experiment})
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path / "runs"))

    def planned(name, scale, assignments, *, k, method, recipe, seed):
        stage = StageSpec.parse(f"selective_mask-{k}")
        return mask_tasks.MaskRequest(name, scale, {"seed": seed}, stage, method, recipe, seed)

    monkeypatch.setattr(mask_tasks, "planned_masks", planned)
    return model


@pytest.fixture
def grass(capsys):
    def call(*words):
        code = main(["masks", *words, "-q"])
        streams = capsys.readouterr()
        return code, streams.out, " ".join(streams.err.split())

    return call


def test_layers_are_fitted_reported_and_used_again(toy, grass, tmp_path):
    file = tmp_path / "masks.safetensors"
    code, out, err = grass("toy", "--k", "3*3", "--out", str(file))
    assert code == 0, err
    assert "written to" in out
    assert "blocks.0.up/output: 3 of 10" in out
    assert "30.0%" in out
    assert out.splitlines()[-2].startswith("mean")
    assert "at least 100.0%" in out
    before, when = file.read_bytes(), file.stat().st_mtime_ns
    masks = load_masks(file)
    facts = masks["blocks.1.down/input"].provenance
    assert float(facts["held_out_correlation"]) >= float(facts["energy_correlation"]) - 0.005
    FactoredGradients(toy, loss, sparsification="selective_mask-3*3", masks=masks)
    code, again, _ = grass("toy", "--k", "3*3", "--out", str(file))
    assert code == 0
    assert "used again" in again
    assert again.splitlines()[1:] == out.splitlines()[1:]
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, when)


def test_a_store_of_selective_masks_is_rebuilt_with_the_same_masks(toy, tmp_path):
    source = StoreSource(
        "toy", "embedded", {}, "selective_mask-3*3", "identity", "Identity", seed=0, dtype="float32", masks="energy"
    )
    task, influence = influence_of(source, tmp_path / "store", device="cpu", progress=False)
    influence.cache(task.train, n_samples=task.n_train)
    (file,) = (tmp_path / "runs/shared/toy-embedded-masks").iterdir()
    when = file.stat().st_mtime_ns
    found = StoreSource.of_store(GradientStore.open(tmp_path / "store"))
    assert found == source
    again, asked = influence_of(found, tmp_path / "store", device="cpu", progress=False)
    assert file.stat().st_mtime_ns == when
    torch.testing.assert_close(asked.attribute(again.train), influence.attribute(task.train))
    full = FactoredGradients(toy, loss, layers="linear")
    masks = load_masks(file)
    rows = GradientStore.open(tmp_path / "store").read(0)
    whole = full(task.train[0])[0]
    for name, row in rows.items():
        kept = masks[f"{name}/output"].indices, masks[f"{name}/input"].indices
        shape = full.layers[name]
        wanted = whole[name].view(8, shape.d_out, shape.d_in)[:, kept[0]][:, :, kept[1]].flatten(1)
        torch.testing.assert_close(row[:8], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsification", "random_mask-3*3", "--masks", "energy"], "leave it out"),
        (["--sparsification", "selective_mask-3*3", "--masks", "leverage"], "random, energy, learned"),
        (["--seed", "-1"], "--seed is -1; expected a whole number"),
        (["--sparsification", "normal-3*3", "--projection", "sjlt-10"], "it would be left out"),
    ],
)
def test_settings_of_a_store_are_checked_first(capsys, tmp_path, words, message):
    code = main(["store", "cache", "gpt2_wikitext", "--store", str(tmp_path / "store"), *words])
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "store").exists()


def test_a_file_of_another_request_or_model_is_refused(toy, grass, tmp_path):
    file = str(tmp_path / "masks.safetensors")
    assert grass("toy", "--k", "3*3", "--method", "energy", "--out", file)[0] == 0
    code, _, err = grass("toy", "--k", "3*3", "--method", "energy", "--out", file, "--seed", "1")
    assert code == 2
    assert "another seed: expected seed 1" in err
    with torch.no_grad():
        next(toy.parameters()).add_(1.0)
    code, _, err = grass("toy", "--k", "3*3", "--method", "energy", "--out", file)
    assert code == 2
    assert "another model: expected model" in err


@pytest.mark.system
def test_the_embedded_mlp(grass, tmp_path, monkeypatch):
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path))
    words = ["mlp_mnist", "--k", "256", "--method", "energy", "-p", "n_trak_models=1"]
    code, out, err = grass(*words)
    assert code == 0, err
    (file,) = (tmp_path / "masks").iterdir()
    mask = Mask.load(file)
    assert (mask.k, mask.p) == (256, 109_386)
    assert "256 of 109,386 coordinates (0.23%)" in out
    assert "also kept by energy: 100.0%" in out
    facts = mask.provenance
    assert float(facts["query_correlation"]) > float(facts["random_query_correlation"]) + 0.05
    code, again, _ = grass(*words)
    assert code == 0
    assert "used again" in again
    assert again.splitlines()[1:] == out.splitlines()[1:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mlp_minst", "--k", "256"], "did you mean 'mlp_mnist'"),
        (["mlp_mnist", "--k", "16*16"], "the form K, such as 256"),
        (["gpt2_wikitext", "--k", "256"], r"K*K, such as 16*16"),
        (["gpt2_wikitext", "--k", "16*16", "--method", "leverage"], "random, energy, learned"),
        (["mlp_mnist", "--k", "256", "--method", "energie"], "random, energy, leverage, learned"),
        (["mlp_mnist", "--k", "many"], "many"),
        (["mlp_mnist", "--k", "0"], "0"),
        (["mlp_mnist", "--k", "256", "--seed", "-1"], "--seed is -1; expected a whole number"),
        (["mlp_mnist", "--k", "200000"], "109386"),
        (["mlp_mnist", "--k", "256", "--recipe", "papers"], "default, paper"),
        (["mlp_mnist", "--k", "256", "--recipe", "paper", "--method", "energy"], "--method learned"),
        (["mlp_mnist", "--k", "256", "-p", "n_trak_model=1"], "n_trak_models"),
        (["mlp_mnist", "--k", "256", "--scale", "huge"], "huge"),
        (["mlp_mnist", "--k", "256", "--out", "no/such/folder/mask"], "whose folder does not exist"),
        (["mlp_mnist", "--k", "256", "--device", "tpu"], "tpu"),
    ],
)
def test_wrong_words_end_with_one_sentence(grass, words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path))
    code, out, err = grass(*words)
    assert code == 2
    assert message.replace(",", "") in err.replace(",", "")
    assert not out
