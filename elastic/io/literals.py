"""Options written as `dict(a=1)`: parsed as literals, never run."""

import ast
from typing import Any


def parse_dict(text: str) -> dict[str, Any]:
    """The options in a `dict(a=1, b='x')` or `{'a': 1}` string. Values are literals; nothing is run.

    Raises:
      ValueError: the text is anything else.
    """
    try:
        return _literal_dict(ast.parse(text.strip(), mode="eval").body)
    # The last two come from text that is nested too deeply.
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f'{text[:200]!r} is not a dict of literals, such as "dict(min_toks=256, patch_size=(1, 8, 8))": {error}.'
        ) from error


def _literal_dict(node: ast.expr) -> dict[str, Any]:
    if isinstance(node, ast.Dict):
        pairs = [
            (getattr(key, "value", None), value)
            for key, value in zip(node.keys, node.values, strict=True)
        ]
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict" and not node.args:
        pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
    else:
        raise ValueError("it must map names to values")
    names = [name for name, _ in pairs]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError("every value needs a name of its own")
    return {str(name): _literal(str(name), value) for name, value in pairs}


def _literal(name: str, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"{name}={ast.unparse(node)} is no literal") from None
