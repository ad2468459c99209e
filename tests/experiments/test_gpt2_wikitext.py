"""GPT-2 + WikiText-2: protocol, training, banks and checkpoint, on a model of a few hundred weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from grass_lib.errors import BankError, DataError, SpecError, UsageError
from grass_lib.evaluation import RetrainingBank, lds
from grass_lib.evaluation.plan import Member
from grass_lib.experiments import EXPERIMENTS, gpt2_banks, gpt2_trainer, gpt2_wikitext
from grass_lib.experiments.data.blocks import TextBlocks, blocks_hash
from grass_lib.experiments.data.tokenizers import train_tokenizer
from grass_lib.experiments.gpt2_trainer import TextRecipe, TextTrainer, training_fingerprint, weights_hash
from grass_lib.experiments.models import gpt2
from grass_lib.experiments.models.gpt2 import GPT2Sizes, build_gpt2, initial_weights, load_weights, weights_of
from grass_lib.gradients import FactoredGradients
from grass_lib.report.published import published_rows
from grass_lib.rng import Stream
from grass_lib.specs import CompressionSpec

SIZES = GPT2Sizes(layers=1, width=8, heads=2, vocabulary=270, positions=12)
PARAMETERS = {
    **{"seed": 0, "specs": "", "data": "wikitext-2-raw-v1", "base": "pretrained", "n_lds_models": 0, "gallery": 6},
    **{"device": "cpu", "hessian": "eFIM", "dtype": "float32", "batch_size": 32, "masks": "learned"},
}


@pytest.fixture(scope="module")
def blocks() -> TextBlocks:
    """Random tokens, so that training takes no time."""
    generator = torch.Generator().manual_seed(0)
    base, train, queries = (torch.randint(0, 270, (n, 12), generator=generator) for n in (10, 13, 6))
    tokenizer = train_tokenizer(iter(["the cat and the other cat and the dog"] * 3), 270)
    names = tuple("article" for _ in range(20))
    return TextBlocks(
        train, queries, base, names[:13], names[:6], tokenizer, "test", "embedded", 29, blocks_hash(base, train)
    )


TINY = replace(
    gpt2_wikitext.protocol("embedded", n_lds=4),
    **{"length": 12, "n_train": 13, "n_query": 6, "n_base": 10, "sizes": SIZES},
    recipe=TextRecipe(lr=1e-2, epochs=2, batch_size=4),
    base_recipe=TextRecipe(lr=1e-2, epochs=1, batch_size=4, schedule="cosine", warmup=0.2, reshuffle=True),
)


def bank(protocol, blocks, folder, **options):
    return gpt2_wikitext.train_lds_bank(protocol, blocks, folder, device="cpu", progress=False, **options)


def checkpoint(protocol, blocks, folder, **options):
    return gpt2_wikitext.attribution_checkpoint(protocol, blocks, folder, device="cpu", progress=False, **options)


def test_scales_are_those_of_the_design():
    full = gpt2_wikitext.protocol("paper")
    assert (full.n_train, full.n_query, full.n_lds, full.length) == (4656, 481, 50, 512)
    assert full.n_lds * full.second_seed_share == 25
    assert full.group_size == 1
    assert full.recipe == TextRecipe(lr=5e-5, epochs=3, batch_size=8, dropout=0.1, weight_decay=0.0)
    assert (full.recipe.schedule, full.recipe.warmup, full.recipe.reshuffle) == ("linear", 0.0, False)
    assert full.weights == "official"
    substitute = gpt2_wikitext.protocol("paper", data="validation+test", base="scratch")
    assert (substitute.n_train, substitute.n_query) == (876, 200)
    assert substitute.weights == "substitute"
    small = gpt2_wikitext.protocol("embedded")
    assert (small.data, small.base, small.weights) == ("wikipedia", "scratch", "substitute")
    assert (small.n_lds, small.length, small.n_query) == (10, 128, 50)
    assert len(small.damping_grid()) == 10


def test_specs_are_the_published_ones():
    full = gpt2_wikitext.protocol("paper")
    assert [str(spec) for spec in full.compressions()] == list(full.specs())
    published = {(row["sparsification"], row["projection"]) for row in published_rows("gpt2_wikitext")}
    assert {(str(spec.sparsification), str(spec.projection)) for spec in full.compressions()} == published
    small = gpt2_wikitext.protocol("embedded")
    assert [spec.k for spec in small.compressions()] == [16] * 5 + [64] * 5 + [256] * 5


@pytest.mark.parametrize("scale", ["embedded", "paper"])
def test_every_spec_fits_the_model(scale):
    chosen = gpt2_wikitext.protocol(scale)
    with torch.device("meta"):
        model = build_gpt2(replace(chosen.sizes, layers=1))
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters() if "c_" in name and "w" in name}
    assert min(min(shape) for shape in shapes.values()) == chosen.sizes.width
    small = replace(SIZES, width=16)
    for spec in gpt2_wikitext.protocol("embedded").compressions():
        if spec.needs_mask_file:
            continue  # the notebook test has masks
        stages = {"sparsification": str(spec.sparsification), "projection": str(spec.projection)}
        FactoredGradients(build_gpt2(small), gpt2_wikitext.causal_loss, **stages)


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        ("random_mask-4096->sjlt-256", "layer by layer"),
        ("random_mask-8*8->selective_mask-16", "as its stage 2"),
        ("normal-8*8->sjlt-9999", "it would be left out"),
        ("fjlt-100*8->identity", "needs 100 input coordinates"),
        ("normal-64*64", "nearest valid form"),
        ("random_mask-8*8->nothing-4", "not a type"),
    ],
)
def test_bad_specs(specs, match):
    with pytest.raises(SpecError, match=match):
        gpt2_wikitext.protocol("embedded").compressions(specs)


@pytest.mark.parametrize(
    "options", [{"n_lds": -1}, {"n_lds": 2}, {"data": "wikitext-103"}, {"base": "random"}, {"data": "validation+test"}]
)
def test_bad_protocols(options):
    with pytest.raises(UsageError, match=r"expected|embedded scale"):
        gpt2_wikitext.protocol("embedded", **options)
    with pytest.raises(UsageError, match="scale"):
        gpt2_wikitext.protocol("full")


def test_recipes():
    recipe = TextRecipe(lr=1.0)
    assert [recipe.rate(step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = TextRecipe(lr=2.0, schedule="cosine", warmup=0.5)
    assert [cosine.rate(step, 8) for step in range(6)] == pytest.approx([0, 0.5, 1, 1.5, 2, 1 + math.cos(math.pi / 4)])
    stream = Stream(3, "x", "order")
    kept = TextRecipe(epochs=3).orders(stream, 20)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert sorted(kept[0].tolist()) == list(range(20))
    drawn = TextRecipe(epochs=3, reshuffle=True).orders(stream, 20)
    assert torch.equal(drawn[0], kept[0])
    assert not torch.equal(drawn[1], drawn[2])
    for wrong in ({"lr": 0.0}, {"epochs": 0}, {"dropout": 1.0}, {"schedule": "step"}, {"warmup": 1.0}):
        with pytest.raises(UsageError, match="expected"):
            TextRecipe(**wrong)


def test_initial_weights():
    sizes = GPT2Sizes(layers=2, width=32, heads=4, vocabulary=300, positions=64)
    weights = initial_weights(sizes, Stream(0, "x", "init"))
    assert weights["transformer.wte.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert weights["transformer.h.1.mlp.c_proj.weight"].std() == pytest.approx(0.01, rel=0.05)
    assert not weights["transformer.h.0.attn.c_attn.bias"].any()
    assert (weights["transformer.h.0.ln_1.weight"] == 1).all()
    first, second = (weights[f"transformer.h.{layer}.mlp.c_fc.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    model = build_gpt2(sizes)
    assert torch.equal(torch.get_rng_state(), state)
    load_weights(model, weights)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(model).items())
    with pytest.raises(DataError, match="do not fit"):
        load_weights(model, {**weights, "more": torch.zeros(1)})
    with pytest.raises(DataError, match="do not fit"):
        load_weights(build_gpt2(SIZES), weights)


def test_attention_is_that_of_transformers():
    sizes = GPT2Sizes(layers=2, width=16, heads=4, vocabulary=40, positions=20)
    model = build_gpt2(sizes)
    load_weights(model, {name: 5 * value for name, value in initial_weights(sizes, Stream(0)).items()})
    ids = torch.randint(0, 40, (3, 20))
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        model.config._attn_implementation = "eager"
        torch.testing.assert_close(ours, model(input_ids=ids).logits)
    with pytest.raises(UsageError, match="no attention mask"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def plain_training(base, ids, recipe, order):
    """AdamW from its formula, on transformers' own loss, without dropout."""
    model = build_gpt2(SIZES)
    load_weights(model, base)
    parameters = list(model.parameters())
    first = [torch.zeros_like(parameter) for parameter in parameters]
    second = [torch.zeros_like(parameter) for parameter in parameters]
    batches = [part for _ in range(recipe.epochs) for part in order.split(recipe.batch_size)]
    for step, rows in enumerate(batches):
        loss = model(input_ids=ids[rows], labels=ids[rows]).loss
        rate = recipe.lr * (1 - step / len(batches))
        for parameter, gradient, m, v in zip(
            parameters, torch.autograd.grad(loss, parameters), first, second, strict=True
        ):
            m.mul_(0.9).add_(gradient, alpha=0.1)
            v.mul_(0.999).add_(gradient.square(), alpha=0.001)
            change = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            parameter.data.sub_(rate * change)
    return model


def test_training_follows_its_description(blocks):
    recipe = TextRecipe(lr=1e-3, epochs=2, batch_size=4, dropout=0.0)
    base = initial_weights(SIZES, Stream(5))
    member, subset = Member(0, "lds", 3), torch.tensor([0, 2, 3, 5, 8, 9])
    trained = TextTrainer(blocks, SIZES, base, recipe, device="cpu")(subset[None], [member])
    model = plain_training(base, blocks.train_ids[subset], recipe, member.stream("order").permutation(6))
    for name, value in weights_of(model).items():
        torch.testing.assert_close(trained.state_dicts[0][name], value, atol=2e-5, rtol=1e-3)
    logits = model(input_ids=blocks.query_ids).logits.double()
    token = functional.cross_entropy(logits[:, :-1].transpose(1, 2), blocks.query_ids[:, 1:], reduction="none")
    log_p = -token.mean(dim=1)
    expected = log_p - torch.log(1 - log_p.exp())
    torch.testing.assert_close(trained.outputs[0].double(), expected, atol=1e-4, rtol=1e-4)
    assert trained.metrics["perplexity"][0] == pytest.approx(float((-log_p).detach().mean().exp()), rel=1e-4)


def test_same_streams_same_model(blocks):
    base, subset = initial_weights(SIZES, Stream(5)), torch.arange(6)[None]
    trainer = TextTrainer(blocks, SIZES, base, TINY.recipe, device="cpu")
    state = torch.get_rng_state()
    first = trainer(subset, [Member(0, "lds", 1)])
    torch.manual_seed(99)
    other = trainer(subset, [Member(0, "lds", 1, repeat=1)])
    again = trainer(subset, [Member(0, "lds", 1)])
    assert torch.equal(first.outputs, again.outputs)
    assert not torch.equal(first.outputs, other.outputs)
    torch.set_rng_state(state)
    trainer(subset, [Member(0, "lds", 2)])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    no_dropout = TextTrainer(blocks, SIZES, base, replace(TINY.recipe, dropout=0.0), device="cpu")
    assert not torch.equal(no_dropout(subset, [Member(0, "lds", 1)]).outputs, first.outputs)


def test_streams_belong_to_the_model(blocks, monkeypatch):
    seen = []
    monkeypatch.setattr(gpt2_trainer.TrainingLoop, "fit", lambda self, start, ids, *streams: seen.append(streams))
    trainer = TextTrainer(blocks, SIZES, initial_weights(SIZES, Stream(5)), TINY.recipe, device="cpu")
    members = [Member(4, "lds", 1), Member(4, "lds", 1, repeat=1), Member(4, "lds", 2)]
    trainer(torch.arange(6).expand(3, 6), members)
    assert seen == [(member.stream("order"), member.stream("dropout")) for member in members]


def test_dropout_is_seeded_by_its_stream(blocks):
    loop = gpt2_trainer.TrainingLoop(SIZES, TINY.recipe, device="cpu")
    base, order = initial_weights(SIZES, Stream(5)), Stream(0, "x", "order")
    found = []
    for stream in (Stream(0, "x", "dropout"), Stream(0, "y", "dropout"), Stream(0, "x", "dropout")):
        loop.fit(base, blocks.train_ids, order, stream)
        found.append(weights_hash(weights_of(loop.model)))
    assert found[0] == found[2]
    assert found[0] != found[1]


def test_models_of_a_group_do_not_depend_on_each_other(blocks):
    base = initial_weights(SIZES, Stream(5))
    trainer = TextTrainer(blocks, SIZES, base, TINY.recipe, device="cpu")
    subsets, members = torch.stack([torch.arange(6), torch.arange(5, 11)]), [Member(0, "lds", 0), Member(0, "lds", 1)]
    both = trainer(subsets, members)
    assert torch.equal(trainer(subsets[1:], members[1:]).outputs[0], both.outputs[1])


def test_bank_and_checkpoint(blocks, tmp_path):
    found = bank(TINY, blocks, tmp_path)
    assert found.outputs.shape == (4, 2, 6)
    assert found.metrics["loss"].shape == (4, 2)
    assert int(found.outputs[:, 1, 0].isnan().sum()) == 2
    assert (found.subsets.sum(dim=1) == 6).all()
    assert lds(torch.randn(13, 6), found).n_models == 4
    weights = checkpoint(TINY, blocks, tmp_path)
    model = gpt2_wikitext.make_model(TINY, weights)
    assert not model.training
    outputs = torch.cat(
        [gpt2_wikitext.causal_margin(model, batch) for batch in gpt2_wikitext.batches(blocks.query_ids, 4)]
    )
    torch.testing.assert_close(outputs.detach(), found.outputs[0, 0])


def test_a_killed_bank_ends_the_same(blocks, tmp_path, monkeypatch):
    whole = bank(TINY, blocks, tmp_path / "whole")
    fit, calls = gpt2_trainer.TrainingLoop.fit, []

    def killed(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        fit(self, *arguments, **options)

    monkeypatch.setattr(gpt2_trainer.TrainingLoop, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        bank(TINY, blocks, tmp_path / "part")
    resumed = bank(TINY, blocks, tmp_path / "part")
    # The base model, six models, and the one that was killed.
    assert len(calls) == 1 + 6 + 1
    assert torch.equal(resumed.outputs.nan_to_num(9.0), whole.outputs.nan_to_num(9.0))


def test_nothing_is_trained_twice(blocks, tmp_path, monkeypatch):
    found, weights = bank(TINY, blocks, tmp_path), checkpoint(TINY, blocks, tmp_path)

    def fail(*arguments, **options):
        raise AssertionError("built again")

    monkeypatch.setattr(gpt2_banks, "TextTrainer", fail)
    monkeypatch.setattr(gpt2_banks, "train_base", fail)
    assert torch.equal(bank(TINY, blocks, tmp_path).outputs.nan_to_num(9.0), found.outputs.nan_to_num(9.0))
    again = checkpoint(TINY, blocks, tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in again.items())


def test_the_base_model_learns_and_is_checked(blocks, tmp_path):
    weights = gpt2_wikitext.base_weights(TINY, blocks, tmp_path, device="cpu", progress=False)
    start = initial_weights(SIZES, Stream(0, "base", "init"))
    losses = []
    for state in (start, weights):
        model = gpt2_wikitext.make_model(TINY, state)
        losses.append(float(model(input_ids=blocks.base_ids, labels=blocks.base_ids).loss.detach()))
    assert losses[1] < losses[0] - 0.01
    (file,) = tmp_path.glob("base-*/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(BankError, match="damaged"):
        gpt2_wikitext.base_weights(TINY, blocks, tmp_path, device="cpu", progress=False)
    # Without its checksum the file counts as not finished, and is trained again to the same weights.
    (tmp_path / file.parent.name / "model.json").unlink()
    again = gpt2_wikitext.base_weights(TINY, blocks, tmp_path, device="cpu", progress=False)
    assert weights_hash(again) == weights_hash(weights)


def test_a_checkpoint_of_another_model_is_refused(blocks, tmp_path, monkeypatch):
    bank(TINY, blocks, tmp_path)
    monkeypatch.setattr(gpt2_trainer.Member, "stream", lambda self, stage: Stream(7, self.name, stage))
    with pytest.raises(BankError, match="not the bank's first model"):
        checkpoint(TINY, blocks, tmp_path)


def test_everything_that_decides_the_models_names_their_folder(blocks, tmp_path):
    other = replace(blocks, train_ids=blocks.train_ids.flip(0), sha256="1" * 64)
    changes = [
        ({}, TINY, blocks),
        ({"seed": 1}, TINY, blocks),
        ({}, replace(TINY, recipe=replace(TINY.recipe, lr=2e-2)), blocks),
        ({}, replace(TINY, base_recipe=replace(TINY.base_recipe, epochs=2)), blocks),
        ({}, replace(TINY, n_lds=3), blocks),
        ({}, TINY, other),
    ]
    for number, (options, protocol, data) in enumerate(changes, start=1):
        bank(protocol, data, tmp_path, **options)
        assert len(list(tmp_path.glob("lds-*"))) == number
    # The base model depends on its own recipe and blocks alone.
    assert len(list(tmp_path.glob("base-*"))) == 2
    assert all(RetrainingBank.load(folder).n_query == 6 for folder in tmp_path.glob("lds-*"))


def test_training_fingerprints():
    given = (SIZES, TINY.recipe, "data", "start", "cpu", False)
    changed = [
        given,
        (replace(SIZES, layers=2), *given[1:]),
        (SIZES, replace(TINY.recipe, dropout=0.2), *given[2:]),
        (*given[:2], "other", *given[3:]),
        (*given[:3], "other", *given[4:]),
        (*given[:5], True),
    ]
    assert len({training_fingerprint(*arguments) for arguments in changed}) == len(changed)
    assert training_fingerprint(*given[:5], None) == training_fingerprint(*given)


def test_pretrained_weights_that_are_not_there(blocks, tmp_path, monkeypatch):
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"model.safetensors and no gpt2/config.json.*-p base=scratch"):
        bank(replace(TINY, base="pretrained"), blocks, tmp_path)


def test_pretrained_weights_from_a_folder(tmp_path, monkeypatch):
    weights = initial_weights(SIZES, Stream(2))
    model = build_gpt2(SIZES)
    load_weights(model, weights)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    found = gpt2.pretrained_weights()
    assert weights_hash(found) == weights_hash(weights)


def test_validate(tmp_path, monkeypatch):
    gpt2_wikitext.validate("embedded", PARAMETERS)
    wrong = {
        **{"specs": "sjlt", "hessian": "GGN", "dtype": "int4", "batch_size": 0, "gallery": 7, "device": "tpu"},
        **{"n_lds_models": 1, "base": "none", "data": "validation+test", "masks": "energie"},
    }
    for name, value in wrong.items():
        with pytest.raises(UsageError):
            gpt2_wikitext.validate("embedded", {**PARAMETERS, name: value})
    for folder, names in {"wikitext2": ("validation", "test"), "gpt2": ()}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}-00000-of-00001.parquet").write_bytes(b"x")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "gpt2" / name).write_text("{}")
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no wikitext2/train.*run with -p data=validation\+test -p base=scratch"):
        gpt2_wikitext.validate("paper", PARAMETERS)
    substitute = {**PARAMETERS, "data": "validation+test"}
    with pytest.raises(DataError, match=r"model.safetensors.*run with -p base=scratch"):
        gpt2_wikitext.validate("paper", substitute)
    gpt2_wikitext.validate("paper", {**substitute, "base": "scratch"})


def test_masks_are_fitted_once_for_every_size(blocks, tmp_path):
    torch.manual_seed(0)
    model = build_gpt2(SIZES).eval()
    train = replace(blocks, train_ids=torch.randint(0, 270, (40, 12), generator=torch.Generator().manual_seed(1)))
    specs = [
        CompressionSpec.parse(text)
        for text in ("selective_mask-2*3->identity", "selective_mask-4*4->sjlt-8", "normal-2*2->identity")
    ]
    options = {"scale": "embedded", "method": "energy", "batch_size": 8, "progress": False}
    found = gpt2_wikitext.fit_masks(model, train, specs, tmp_path / "masks", **options)
    assert [str(stage) for stage in found] == ["selective_mask-2*3", "selective_mask-4*4"]
    assert not any(one.reused for one in found.values())
    again = gpt2_wikitext.fit_masks(model, train, specs, tmp_path / "masks", **options)
    assert all(one.reused for one in again.values())
    for spec in specs[:2]:
        stages = {"sparsification": str(spec.sparsification), "projection": str(spec.projection)}
        FactoredGradients(model, gpt2_wikitext.causal_loss, masks=again[spec.sparsification].masks, **stages)
    other = gpt2_wikitext.fit_masks(model, train, specs, tmp_path / "masks", **{**options, "method": "random"})
    assert not any(one.reused for one in other.values())
    assert gpt2_wikitext.fit_masks(model, train, specs[2:], tmp_path / "none", **options) == {}
    assert not (tmp_path / "none").exists()


def test_check(tmp_path, monkeypatch):
    assert gpt2_wikitext.check("embedded") == []
    with pytest.raises(UsageError):
        gpt2_wikitext.check("full")
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problems = gpt2_wikitext.check("paper")
    assert "no wikitext2/train" in problems[0]
    assert "needs a CUDA GPU" in problems[-1]
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "gpt2").mkdir()
    for name in ("validation", "test"):
        (tmp_path / "wikitext2" / f"{name}-00000-of-00001.parquet").write_bytes(b"x")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "gpt2" / name).write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpt2_wikitext.check("paper") == []


def test_data_fingerprint(tmp_path, monkeypatch):
    embedded = gpt2_wikitext.data_fingerprint("embedded")
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    assert gpt2_wikitext.data_fingerprint("embedded") == embedded
    with pytest.raises(DataError, match="wikitext2"):
        gpt2_wikitext.data_fingerprint("paper")
    (tmp_path / "wikitext2").mkdir()
    file = tmp_path / "wikitext2" / "test-00000-of-00001.parquet"
    file.write_bytes(b"x")
    first = gpt2_wikitext.data_fingerprint("paper")
    file.write_bytes(b"y")
    assert gpt2_wikitext.data_fingerprint("paper") not in (first, embedded)


def test_task(blocks, tmp_path, monkeypatch):
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path))
    monkeypatch.setattr(gpt2_wikitext, "protocol", lambda scale, **options: TINY)
    monkeypatch.setattr(gpt2_wikitext, "load_data", lambda protocol: blocks)
    experiment = EXPERIMENTS["gpt2_wikitext"]
    task = experiment.attribution_task("embedded", {"batch_size": 5, "seed": 3}, "cpu")
    assert task.n_train == 13
    assert [len(batch["labels"]) for batch in task.train] == [5, 5, 3]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in task.train]), blocks.train_ids)
    assert task.data_sha256 == blocks_hash(blocks.train_ids)
    assert task.passage(2) == blocks.tokenizer.decode(blocks.train_ids[2].tolist())
    batch = task.encode("the cat and the dog and the cat and the dog and so on and on")
    assert batch["input_ids"].shape == (1, 12)
    assert torch.equal(batch["input_ids"], batch["labels"])
    has, taken = task.tokens("the cat and the dog and the cat and the dog and so on and on")
    assert has > taken == 12
    assert task.tokens("the cat") == (len(blocks.tokenizer.encode("the cat")),) * 2
    assert task.target(task.model, batch).shape == (1,)
    with pytest.raises(UsageError, match="expected 2 or more"):
        task.encode("")
    gradients, values = FactoredGradients(task.model, task.loss, layers=task.layers)(task.train[0])
    assert len(gradients) == 4
    assert values.shape == (5,)
    assert task.parameters["seed"] == 3
    again = experiment.attribution_task("embedded", task.parameters, "cpu")
    assert weights_hash(weights_of(again.model)) == weights_hash(weights_of(task.model))
    assert (tmp_path / "shared" / "gpt2_wikitext-embedded-networks").is_dir()
    assert not task.include_head
    assert experiment.attribution_task("embedded", {**task.parameters, "head": True}, "cpu").include_head


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_compiled_training_repeats_itself(blocks):
    base, subset = initial_weights(SIZES, Stream(5)), torch.arange(8)[None]
    trainer = TextTrainer(blocks, SIZES, base, TINY.recipe, device="cuda")
    first = trainer(subset, [Member(0, "lds", 1)])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    other = trainer(subset, [Member(0, "lds", 1, repeat=1)])
    again = trainer(subset, [Member(0, "lds", 1)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert torch.equal(first.outputs, again.outputs)
    assert not torch.equal(first.outputs, other.outputs)
