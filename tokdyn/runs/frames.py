"""Results as pandas tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def pandas() -> Any:
    """The package pandas.

    Raises:
        ImportError: it is not installed (`pip install "tokdyn[dataframe]"`).
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError('to_dataframe needs pandas: pip install "tokdyn[dataframe]"') from error
    return pandas


def pairs(observed: Any, updated: Any, **matrices: Tensor) -> Any:
    """A long table: one row for each pair of an observed and an update token, one column for each matrix [M, L].

    Args:
        observed, updated: row tables (pyarrow) of the two sides.
        matrices: name of the column -> [M, L].
    """
    o, u = observed["token"].to_pylist(), updated["token"].to_pylist()
    columns = {
        "m": [m for m in range(len(o)) for _ in u],
        "l": list(range(len(u))) * len(o),
        "observed": [token for token in o for _ in u],
        "updated": u * len(o),
    }
    return pandas().DataFrame(columns | {name: matrix.cpu().flatten().tolist() for name, matrix in matrices.items()})
