"""JSON files with a format mark: they come back without it, and everything else is refused."""

import pytest

from elastic.io.json_file import last_numbers, read_marked, write_json

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


def test_the_last_numbers_of_a_log_are_read_past_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3.5, "name": "a"}\n{"step": 2, "psnr": null}\n{"step": 3, "lo'
    )
    assert last_numbers(path) == {"step": 2, "loss": 3.5}
