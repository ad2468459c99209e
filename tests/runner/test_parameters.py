import json

import pytest

from grass_lib.errors import GrassError, UsageError
from grass_lib.runner.parameters import (
    check_value,
    describe,
    from_text,
    parameter_hash,
    read_parameters,
    resolve,
    split_assignments,
)


@pytest.fixture
def parameters(toy):
    return read_parameters(toy.template)


def test_cell_is_read_with_types_defaults_and_help(parameters):
    assert list(parameters) == ["scale", "run_id", "act", "seed", "rate", "fast", "ks", "specs"]
    ks = parameters["ks"]
    assert (ks.type, ks.default, ks.help) == ("list[int]", [256, 512], "dimensions")
    text = describe(parameters, "toy")
    assert "seed: int = 0" in text
    assert "# " not in text
    assert "run_id" not in text


def test_agrees_with_papermill_on_names_and_help(toy, parameters):
    import papermill

    notebook = json.loads(toy.template.read_text())
    notebook["metadata"]["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    toy.template.write_text(json.dumps(notebook))
    inferred = papermill.inspect_notebook(str(toy.template))
    assert {name: item["help"] for name, item in inferred.items()} == {n: p.help for n, p in parameters.items()}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "7", 7),
        ("seed", "-7", -7),
        ("rate", "1e-3", 0.001),
        ("rate", "2", 2.0),
        ("fast", "True", True),
        ("fast", "no", False),
        ("act", "007", "007"),
        ("act", "a=b", "a=b"),
        ("ks", "1,2", [1, 2]),
        ("ks", "[3, 4]", [3, 4]),
        ("ks", "5", [5]),
        ("ks", "", []),
        ("specs", "random_mask-16*16->sjlt-4096,normal-2", "random_mask-16*16->sjlt-4096,normal-2"),
    ],
)
def test_text_becomes_the_declared_type(parameters, name, text, value):
    got = from_text(parameters[name], text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("seed", "2.5", "a whole number"),
        ("seed", "abc", "a whole number"),
        ("seed", "", "a whole number"),
        ("rate", "fast", "a finite number"),
        ("rate", "nan", "a finite number"),
        ("rate", "inf", "a finite number"),
        ("fast", "perhaps", "true or false"),
        ("ks", "1,x", "a list such as"),
        ("ks", "[1, 2.5]", "a list such as"),
        ("ks", "[1, true]", "a list such as"),
        ("ks", "[1,", "a list such as"),
        ("act", "two\nlines", "without line breaks"),
    ],
)
def test_wrong_text_says_what_was_expected_and_lists_the_parameters(parameters, name, text, expected):
    with pytest.raises(UsageError) as caught:
        resolve(parameters, {name: text}, experiment="toy")
    message = str(caught.value)
    assert f"parameter '{name}' is " in message
    assert expected in message
    assert "Parameters of toy:\n  act: str = 'good'" in message


@pytest.mark.parametrize(
    "text", ["../up", "a/../../b", "/etc/passwd", "~/x", "..", "a\\..\\b", "C:\\x", "\\\\host\\x", "file:///x"]
)
def test_no_path_leaves_the_run_folder(parameters, text):
    with pytest.raises(UsageError, match="no path that leaves"):
        from_text(parameters["act"], text)
    with pytest.raises(UsageError, match="no path that leaves"):
        check_value(parameters["act"], text)


def test_dots_inside_names_are_fine(parameters):
    assert from_text(parameters["act"], "v1..2/mask.safetensors") == "v1..2/mask.safetensors"


@pytest.mark.parametrize(
    ("name", "value"), [("seed", True), ("seed", "1"), ("rate", "x"), ("fast", 1), ("ks", 3), ("act", 3)]
)
def test_python_values_are_checked_too(parameters, name, value):
    with pytest.raises(UsageError):
        resolve(parameters, {name: value}, experiment="toy", typed=True)


def test_unknown_and_reserved_names(parameters):
    with pytest.raises(UsageError, match="did you mean 'seed'"):
        resolve(parameters, {"sede": "1"}, experiment="toy")
    with pytest.raises(UsageError, match="give it as --scale"):
        resolve(parameters, {"scale": "paper"}, experiment="toy")
    with pytest.raises(UsageError, match="cannot be set with -p"):
        resolve(parameters, {"run_id": "../x"}, experiment="toy")


@pytest.mark.parametrize("text", ["seed", "=1", "a b=1", "1x=2", ""])
def test_assignments(text):
    with pytest.raises(UsageError, match="expected name=value"):
        split_assignments([text])


def test_one_name_twice():
    assert split_assignments(["a=1", "a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(UsageError, match="given twice"):
        split_assignments(["a=1", "a=2"])


def test_hash_knows_values_and_not_their_order():
    assert parameter_hash({"a": 1, "b": [2]}) == parameter_hash({"b": [2], "a": 1})
    assert parameter_hash({"a": 1}) != parameter_hash({"a": 1.0}) != parameter_hash({"a": "1"})


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("k: int = two()", "not a plain value"),
        ("k: int = 2.5", "wrong default"),
        ("k: dict = {}", "has type 'dict'"),
        ("k = None", "has type 'NoneType'"),
        ("k: int = (", "not valid Python"),
    ],
)
def test_defects_of_a_template_are_named(toy, cell, message):
    toy.write(parameters=cell)
    with pytest.raises(GrassError, match=message):
        read_parameters(toy.template)


def test_defects_of_the_file_are_named(toy):
    with pytest.raises(GrassError, match="is missing"):
        read_parameters(toy.root / "notebooks" / "none.ipynb")
    toy.template.write_text("{")
    with pytest.raises(GrassError, match="not a readable notebook"):
        read_parameters(toy.template)
    toy.template.write_text(json.dumps({"cells": []}))
    with pytest.raises(GrassError, match="0 cells tagged 'parameters'"):
        read_parameters(toy.template)
