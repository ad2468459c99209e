"""Spec strings: every parse rule, the round trip, the slug and the errors."""

import dataclasses
import re

import pytest
from toy_project import REPOSITORY

from grass_lib.errors import SpecError, UsageError
from grass_lib.specs import FAMILIES, HESSIANS, TYPES, CompressionSpec, StageSpec, parse_hessian, parse_specs


@pytest.mark.parametrize(
    ("text", "family", "dims", "param", "canonical"),
    [
        ("normal-64*64", "normal", (64, 64), None, "normal-64*64"),
        ("rademacher-8", "rademacher", (8,), None, "rademacher-8"),
        ("sjlt-4096", "sjlt", (4096,), 1, "sjlt-4096"),
        ("sjlt_1-4096", "sjlt", (4096,), 1, "sjlt-4096"),
        ("sjlt_4-4096", "sjlt", (4096,), 4, "sjlt_4-4096"),
        ("fjlt-1", "fjlt", (1,), None, "fjlt-1"),
        ("random_mask-128*64", "random_mask", (128, 64), None, "random_mask-128*64"),
        ("selective_mask-16", "selective_mask", (16,), None, "selective_mask-16"),
        ("grass-512", "grass", (512,), 4, "grass-512"),
        ("grass_4-512", "grass", (512,), 4, "grass-512"),
        ("grass_8-512", "grass", (512,), 8, "grass_8-512"),
        ("selective_grass_4-2", "selective_grass", (2,), 4, "selective_grass-2"),
        ("selective_grass_16-2", "selective_grass", (2,), 16, "selective_grass_16-2"),
        ("identity", "identity", (), None, "identity"),
        ("  sjlt-7\n", "sjlt", (7,), 1, "sjlt-7"),
    ],
)
def test_stage_round_trip(text, family, dims, param, canonical):
    stage = StageSpec.parse(text)
    assert (stage.family, stage.dims, stage.param) == (family, dims, param)
    assert str(stage) == canonical
    assert StageSpec.parse(str(stage)) == stage
    assert "*" not in stage.slug


def test_stage_properties():
    assert StageSpec.parse("random_mask-128*64").k == 8192
    assert StageSpec.parse("identity").k is None
    assert StageSpec.parse("random_mask-128*64").is_factored
    assert not StageSpec.parse("random_mask-128").is_factored
    assert [
        name for name in ("random_mask-1", "selective_mask-1", "grass-1", "sjlt-1") if StageSpec.parse(name).is_mask
    ] == [
        "random_mask-1",
        "selective_mask-1",
    ]
    assert StageSpec.parse("selective_grass-3").needs_mask_file
    assert not StageSpec.parse("grass-3").needs_mask_file
    assert StageSpec.parse("grass_8-3").mask_size == 24
    assert StageSpec.parse("random_mask-3").mask_size == 3
    assert StageSpec.parse("sjlt-3").mask_size is None
    assert StageSpec("sjlt", (3,)) == StageSpec("sjlt", (3,), 1)


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("SJLT-4096", "'SJLT' is not a type", "sjlt-4096"),
        ("Random-64*64", "not a type", "random_mask-64*64"),
        ("grass4-10", "'grass4' is not a type", "grass-10"),
        ("grass_8_2-10", "'grass_8_2' is not a type", "grass_8-10"),
        ("grass_x-10", "not a type", "grass-10"),
        ("grass_-10", "not a type", "grass-10"),
        ("grass_0-10", "'0' is not a whole number", "grass-10"),
        ("selective_grass8-10", "not a type", "selective_grass_8-10"),
        ("selectve_mask-5", "not a type", "selective_mask-5"),
        ("normal-64*64*64", "3 dimensions", "normal-64*64"),
        ("normal", "dimension is missing", "normal-4096"),
        ("normal-", "dimension is missing", "normal-4096"),
        ("normal-a*a", "'a*a' is not a dimension", "normal-4096"),
        ("normal-64x32", "'64x32' is not a dimension", "normal-64*32"),
        ("normal-64*", "not a dimension", "normal-64"),
        ("a-b-3*3", "not a type", "sjlt-3*3"),
        ("sjlt--4", "'-4' is not a dimension", "sjlt-4"),
        ("sjlt-4_096", "not a dimension", "sjlt-4096"),
        ("sjlt-4.5", "not a dimension", "sjlt-4*5"),
        ("sjlt-\u0664", "not a dimension", "sjlt-4096"),
        ("sjlt-0", "'0' is not a whole number", "sjlt-4096"),
        ("sjlt-007", "leading zeros", "sjlt-7"),
        ("sjlt-99999999999", "not a whole number from 1 to", "sjlt-4096"),
        ("sjlt_99999999999-4", "not a whole number", "sjlt-4"),
        ("rademacher_3-4", "takes no number after its name", "rademacher-4"),
        ("identity-5", "identity takes no dimension", "identity"),
        ("identity-", "identity takes no dimension", "identity"),
        ("", "it is empty", "sjlt-4096"),
        ("sjlt-4->sjlt-2", "two stages", "sjlt-2"),
    ],
)
def test_bad_stage_says_what_and_the_nearest_form(text, wrong, nearest):
    with pytest.raises(SpecError) as caught:
        StageSpec.parse(text)
    message = str(caught.value)
    assert repr(text) in message
    assert wrong in message
    assert f"nearest valid form: {nearest}. " in message
    assert message.endswith(", ".join(TYPES))
    StageSpec.parse(nearest)


@pytest.mark.parametrize("bad", [None, 5, b"sjlt-4"])
def test_not_a_string(bad):
    with pytest.raises(SpecError, match="expected a string"):
        StageSpec.parse(bad)


@pytest.mark.parametrize(
    "fields",
    [
        ("hash", (4,)),
        ("sjlt", ()),
        ("sjlt", (1, 2, 3)),
        ("sjlt", (0,)),
        ("sjlt", (2.0,)),
        ("sjlt", (True,)),
        ("sjlt", (4,), 0),
        ("normal", (4,), 2),
        ("identity", (4,)),
    ],
)
def test_fields_are_checked_at_construction(fields):
    with pytest.raises(SpecError):
        StageSpec(*fields)


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        StageSpec.parse("sjlt-4").family = "normal"


@pytest.mark.parametrize(
    ("text", "canonical", "slug", "k", "factored"),
    [
        ("sjlt-4096", "sjlt-4096", "sjlt-4096", 4096, False),
        ("identity->sjlt_1-4096", "sjlt-4096", "sjlt-4096", 4096, False),
        (
            " random_mask-128*128 -> sjlt-4096 ",
            "random_mask-128*128->sjlt-4096",
            "random_mask-128x128__sjlt-4096",
            4096,
            True,
        ),
        ("random_mask-16*16->identity", "random_mask-16*16->identity", "random_mask-16x16__identity", 256, True),
        ("random_mask-32768->sjlt-8", "random_mask-32768->sjlt-8", "random_mask-32768__sjlt-8", 8, False),
        ("identity", "identity", "identity", None, False),
    ],
)
def test_compression_round_trip(text, canonical, slug, k, factored):
    spec = CompressionSpec.parse(text)
    assert str(spec) == canonical
    assert CompressionSpec.parse(str(spec)) == spec
    assert (spec.slug, spec.k, spec.is_factored) == (slug, k, factored)
    assert CompressionSpec.parse(sparsification=str(spec.sparsification), projection=str(spec.projection)) == spec


def test_compression_by_stages():
    spec = CompressionSpec.parse(sparsification="random_mask-128*128", projection=StageSpec("sjlt", (4096,)))
    assert str(spec) == "random_mask-128*128->sjlt-4096"
    assert CompressionSpec.parse(projection="selective_mask-4").needs_mask_file
    assert str(CompressionSpec.parse()) == "identity"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("sjlt-64*64", "nearest valid form: sjlt-4096 (or 'sjlt-64*64->identity')"),
        ("a->b->c", "3 stages"),
        ("->sjlt-4", "it is empty"),
        ("sjlt-4->", "it is empty"),
        ("random_mask-10->fjlt-11", "needs 11 input coordinates or more, and there are 10"),
        ("random_mask-16->grass-5", "nearest valid form: grass-4. "),
        ("random_mask-4*4->random_mask-17", "nearest valid form: random_mask-16. "),
    ],
)
def test_bad_compression(text, wrong):
    with pytest.raises(SpecError) as caught:
        CompressionSpec.parse(text)
    assert wrong in str(caught.value)
    assert str(caught.value).endswith(", ".join(TYPES))


def test_more_outputs_than_inputs_where_allowed():
    for text in ("random_mask-4->sjlt-9", "random_mask-4->normal-9", "random_mask-4->rademacher-9"):
        assert CompressionSpec.parse(text).k == 9


def test_one_string_or_two_stages():
    with pytest.raises(SpecError, match="either one string or the two stages"):
        CompressionSpec.parse("sjlt-4", projection="sjlt-4")
    with pytest.raises(SpecError, match="expected a string"):
        CompressionSpec.parse(4)


def test_hessians():
    assert [parse_hessian(f" {name} ") for name in HESSIANS] == list(HESSIANS)
    for bad, nearest in (("efim", "eFIM"), ("IDENTITY", "Identity"), ("ekfac", "eFIM"), (None, "")):
        with pytest.raises(UsageError, match=f"nearest valid form: {nearest}.*Hessians: eFIM, Identity"):
            parse_hessian(bad)


def test_every_type_is_in_the_tables_of_the_readme_and_the_book():
    for file, missing in (("README.md", set()), ("book/method.md", {"identity", "selective_mask", "selective_grass"})):
        lines = [line for line in (REPOSITORY / file).read_text().splitlines() if line.startswith("| ")]
        typed = {name for line in lines for name in re.findall(r"`(\w+?)(?:_[cN])?(?:-K)?`", line)}
        assert set(FAMILIES) - typed == missing, file


def test_lists_of_specs():
    pair = CompressionSpec.parse("random_mask-8->sjlt-4")
    assert parse_specs("sjlt-4, random_mask-8->sjlt-4") == [CompressionSpec.parse("sjlt-4"), pair]
    assert parse_specs(["sjlt-4", pair]) == [CompressionSpec.parse("sjlt-4"), pair]
    assert parse_specs(" ") == []
    assert parse_specs([]) == []
    with pytest.raises(SpecError, match="it is empty"):
        parse_specs("sjlt-4,,fjlt-2")
    with pytest.raises(SpecError, match="have sjlt-4 twice"):
        parse_specs("sjlt-4, fjlt-2, sjlt_1-4")


def test_a_second_stage_that_would_be_left_out():
    for text in ("normal-8*8->sjlt-9999", "random_mask-8*8->sjlt-64"):
        with pytest.raises(SpecError, match=r"it would be left out; .*nearest valid form: \w+-8\*8->identity"):
            CompressionSpec.parse(text).check_shorter()
    for text in ("normal-8*8->sjlt-63", "normal-8*8->identity", "random_mask-8->sjlt-9", "sjlt-9"):
        CompressionSpec.parse(text).check_shorter()
