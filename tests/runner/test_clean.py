import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

from grass_lib.runner.clean import clean_notebook


def cleaned(*outputs):
    notebook = new_notebook(cells=[new_code_cell("x", outputs=list(outputs))])
    nbformat.validate(clean_notebook(notebook))
    return notebook.cells[0].outputs


def stream(text, name="stderr"):
    return new_output("stream", name=name, text=text)


def test_progress_that_came_in_pieces_ends_as_one_line():
    (output,) = cleaned(stream("\r  10%"), stream("\r  50%"), stream("\r 100% done"), stream("\nnext\n"))
    assert output.text == " 100% done\nnext\n"


def test_progress_that_wipes_itself_leaves_nothing():
    assert cleaned(stream("\r 10%"), stream("\r 100%"), stream("\r     "), stream("\r")) == []


def test_shorter_text_covers_only_the_start_of_the_line():
    (output,) = cleaned(stream("abcdef\rxy", "stdout"))
    assert output.text == "xycdef"


def test_streams_stay_apart_and_in_order():
    outputs = cleaned(stream("a\n"), stream("b\n", "stdout"), stream("c\n"))
    assert [(output.name, output.text) for output in outputs] == [
        ("stderr", "a\n"),
        ("stdout", "b\n"),
        ("stderr", "c\n"),
    ]


def test_images_are_left_as_they_are_and_text_is_scrubbed():
    data = {
        "image/png": "/tmp/AAAA",
        "text/plain": "/tmp/ipykernel_1/2.py",
        "text/html": "<i>/tmp/ipykernel_1/2.py</i>",
    }
    (output,) = cleaned(new_output("display_data", data=data))
    assert output.data == {"image/png": "/tmp/AAAA", "text/plain": "<cell>", "text/html": "<i><cell></i>"}
