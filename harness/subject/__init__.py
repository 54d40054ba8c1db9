"""What is under test and what it is judged by, each made when first asked for and kept.

`given` is what the user gave, `host`, `graph` and `bundle` are under test, `twin` is what the bundle is judged by.
"""

from __future__ import annotations

from harness.engines import streams
from harness.subject.given import recorded_folder
from harness.subject.graph import GraphSide, offered
from harness.subject.host import HostSide

__all__ = ["Subject", "offered", "recorded_folder", "streams"]


class Subject(GraphSide, HostSide):
    """Everything about one run; nothing of it is made before it is asked for."""
