"""The texts under the fields of a dataclass, which Python itself forgets."""

from __future__ import annotations

import ast
import inspect
import textwrap


def field_texts(kind: type) -> dict[str, str]:
    """By field, as it is written there.

    Raises:
        OSError: no source is installed.
    """
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    texts, name = {}, ""
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            texts[name] = str(statement.value.value)
    return texts
