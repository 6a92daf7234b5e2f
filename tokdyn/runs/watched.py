"""What is watched at the observed tokens of a record, as its run.json says: a log-probability where it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOG_PROB = {"label": "log-probability", "unit": "nats"}


def watched(about: Mapping[str, Any]) -> dict[str, str]:
    """Label and unit."""
    found = {**LOG_PROB, **(about.get("observable") or {})}
    return {"label": str(found["label"]), "unit": str(found["unit"])}


def is_log_prob(about: Mapping[str, Any]) -> bool:
    """Whether it is the log-probability of the token that stands there."""
    return watched(about)["label"] == LOG_PROB["label"]
