"""report.json against its schema, `elastic/report/report.schema.json`."""

import json
import pathlib
from typing import Any

import jsonschema

import elastic.report

SCHEMA = pathlib.Path(elastic.report.__file__).with_name("report.schema.json")


def read_report(folder: pathlib.Path) -> dict[str, Any]:
    """The report in a folder of results.

    Raises:
      jsonschema.ValidationError: a key is missing, unknown or of another type.
    """
    report = json.loads((folder / "report.json").read_bytes())
    schema = json.loads(SCHEMA.read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(report)
    return report
