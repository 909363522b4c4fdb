"""JSON files with a format mark: they come back without it, and everything else is refused."""

import pytest

from elastic.io.json_file import read_marked, write_json

MARK = {"format": "elastictok-example", "version": 1}


def test_a_marked_file_comes_back_without_its_mark(tmp_path):
    write_json(tmp_path / "x.json", MARK | {"values": [1, 2]})
    assert read_marked(tmp_path / "x.json", MARK) == {"values": [1, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "elastictok-example", "version": 2}', "its format is another one"),
        ("{}", "its format is another one"),
        ("[1]", "it holds a list and no object"),
        ("{", "Expecting"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_with_another_mark_or_none_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_marked(tmp_path / "x.json", MARK)
