"""Draft models for speculative decoding: make them, measure them, serve with them.

A thin, typed layer over the program of the same name, which comes in the same wheel. Every function runs one verb with
`--json` and hands its answer over as a dataclass; what the verb does, and what its options mean, `draftsmith VERB --help`
says. Nothing is computed here.

>>> import draftsmith
>>> made = draftsmith.run("run.toml", {"train.epochs": 2})
>>> made.bench.speedup, made.bench.speedup_ci95
>>> with draftsmith.serve(bundle=made.bundle.path) as server:
...     print(server.base_url)
"""

from ._errors import Error, NotHeld
from ._program import call, program
from ._records import (
    BenchRecord,
    BundleRecord,
    CaptureRecord,
    DataRecord,
    Doubt,
    Generation,
    Machine,
    Planned,
    PlannedStage,
    RegenerateRecord,
    RunRecord,
    StageRecord,
    TrainRecord,
    Verdict,
)
from ._server import Server, serve
from ._verbs import bench, generate, run
from ._version import __version__

__all__ = [
    "BenchRecord",
    "BundleRecord",
    "CaptureRecord",
    "DataRecord",
    "Doubt",
    "Error",
    "Generation",
    "Machine",
    "NotHeld",
    "Planned",
    "PlannedStage",
    "RegenerateRecord",
    "RunRecord",
    "Server",
    "StageRecord",
    "TrainRecord",
    "Verdict",
    "__version__",
    "bench",
    "call",
    "generate",
    "program",
    "run",
    "serve",
]
