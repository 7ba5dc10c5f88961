"""What the verbs answer, as dataclasses.

Fields are those of the program's JSON. One that the program leaves out is `None`; one that this module does not know yet is
in `extra`. Intervals are `(low, high)`, at 95 %.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Type, TypeVar

R = TypeVar("R", bound="Record")
Interval = Tuple[float, float]


@dataclass(frozen=True)
class Record:
    """What all of them have."""

    #: Keys of the JSON that have no field.
    extra: Dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls: Type[R], value: Mapping[str, Any]) -> R:
        """Made of what `json.loads` reads."""
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {name: _kept(value[name]) for name in names if name in value}
        made = cls(**known, extra={key: kept for key, kept in value.items() if key not in names})
        for name, convert in cls._inner().items():
            if getattr(made, name) is not None:
                object.__setattr__(made, name, convert(getattr(made, name)))
        return made

    @classmethod
    def _inner(cls) -> Dict[str, Any]:
        """Fields that are records or paths, and what makes them."""
        return {}


def _kept(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Doubt(Record):
    """Something that weakens a measurement."""

    kind: str = ""
    message: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Machine(Record):
    """Where something was measured."""

    cpu: Optional[str] = None
    cpu_features: Tuple[str, ...] = ()
    logical_cpus: Optional[int] = None
    memory_bytes: Optional[int] = None
    os: Optional[str] = None
    load_average_1m: Optional[float] = None
    others_busy_share: Optional[float] = None
    #: What target and draft ran on, if not on the processor: `name`, `card`, `driver`, `row_exact`, …
    device: Optional[Dict[str, Any]] = None


@dataclass(frozen=True)
class BenchRecord(Record):
    """Accept length and speedup of a draft over all rows of all workloads."""

    #: Committed tokens per verify step, the target's own included; `None` without a step.
    accept_len: Optional[float] = None
    accept_len_ci95: Optional[Interval] = None
    #: Share of proposals accepted at each position, and of those that the position before was accepted of.
    accept_rate_at: Tuple[Optional[float], ...] = ()
    cond_accept_rate_at: Tuple[Optional[float], ...] = ()
    verify_steps: Optional[int] = None
    committed_tokens: Optional[int] = None
    plain_tokens_per_s: Optional[float] = None
    spec_tokens_per_s: Optional[float] = None
    #: Decode time per token without the draft over that with it.
    speedup: Optional[float] = None
    speedup_ci95: Optional[Interval] = None
    speedup_with_prefill: Optional[float] = None
    speedup_baseline: Optional[str] = None
    #: Every answer was that of the target alone, token for token.
    identical: Optional[bool] = None
    samples: Optional[int] = None
    identical_samples: Optional[int] = None
    rows: Optional[int] = None
    workloads: Tuple[str, ...] = ()
    doubts: Tuple[Doubt, ...] = ()
    machine: Optional[Machine] = None

    @classmethod
    def _inner(cls) -> Dict[str, Any]:
        return {"doubts": lambda all: tuple(Doubt.from_json(one) for one in all), "machine": Machine.from_json}


@dataclass(frozen=True)
class Generation(Record):
    """One answer."""

    text: str = ""
    token_ids: Tuple[int, ...] = ()
    prompt_ids: Tuple[int, ...] = ()
    #: `stop`, `length` or `stop_text`.
    finish_reason: Optional[str] = None
    #: `None` without a draft.
    accept_len: Optional[float] = None
    tokens_per_s: Optional[float] = None
    #: With `prove`: the answer is the one without the draft.
    identical: Optional[bool] = None
    #: What it was computed on, if not on the processor: `name`, `card`, `driver`, `row_exact`, …
    device: Optional[Dict[str, Any]] = None


@dataclass(frozen=True)
class DataRecord(Record):
    """What the stage `data` read."""

    rows: Optional[int] = None
    validation_rows: Optional[int] = None
    licenses: Tuple[str, ...] = ()
    origins: Tuple[str, ...] = ()


@dataclass(frozen=True)
class RegenerateRecord(Record):
    """What the target answered."""

    dialogues: Optional[int] = None
    generated_tokens: Optional[int] = None
    left_out_tokens: Optional[int] = None
    left_out_answers: Optional[int] = None
    empty_answers: Optional[int] = None
    cut_answers: Optional[int] = None
    looping_answers: Optional[int] = None
    validation_rows: Optional[int] = None
    token_rows: Optional[int] = None
    tokens: Optional[int] = None
    trained_tokens: Optional[int] = None
    tokens_sha256: Optional[str] = None


@dataclass(frozen=True)
class CaptureRecord(Record):
    """The stored states of the target."""

    rows: Optional[int] = None
    tokens: Optional[int] = None
    bytes: Optional[int] = None


@dataclass(frozen=True)
class TrainRecord(Record):
    """A training, and the draft that was kept."""

    steps: Optional[int] = None
    slots: Optional[int] = None
    #: Which draft was kept, of which step, or the mean of which steps.
    draft: Optional[str] = None
    draft_step: Optional[int] = None
    draft_mean_of: Tuple[int, ...] = ()
    #: Measured on held-out prompts.
    accept_len: Optional[float] = None
    accept_len_ci95: Optional[Interval] = None
    #: Share of the trained tokens that the draft's vocabulary has.
    vocab_coverage: Optional[float] = None


@dataclass(frozen=True)
class BundleRecord(Record):
    """The folder that is handed over."""

    path: Optional[Path] = None
    bytes: Optional[int] = None
    made_from: Optional[str] = None

    @classmethod
    def _inner(cls) -> Dict[str, Any]:
        return {"path": Path}


@dataclass(frozen=True)
class StageRecord(Record):
    """One stage of a run, as its folder keeps it."""

    stage: str = ""
    phase: Optional[str] = None
    #: Done by an earlier call, and still good.
    before: Optional[bool] = None
    seconds: Optional[float] = None
    progress: Optional[Any] = None
    key: Optional[str] = None
    #: What it was made from.
    inputs: Dict[str, str] = field(default_factory=dict, repr=False)
    #: What it says at its end, as JSON reads it; the fields of `RunRecord` have it typed.
    summary: Optional[Dict[str, Any]] = None


@dataclass(frozen=True)
class Verdict(Record):
    """Whether a run's draft is worth using where it was measured."""

    #: `yes`, `no`, `unknown`: the program's word.
    worth: str = ""
    #: The same in a sentence, with numbers.
    says: str = ""
    #: The fastest way to draft.
    setting: Optional[str] = None
    speedup: Optional[float] = None
    speedup_ci95: Optional[Tuple[float, float]] = None
    workloads: Tuple[str, ...] = ()
    #: What limited it.
    limits: Tuple[str, ...] = ()
    #: The next step as a command, and what it is for.
    next: Optional[str] = None
    next_is_for: Optional[str] = None


@dataclass(frozen=True)
class PlannedStage(Record):
    """What a stage was planned to take, and took."""

    stage: str = ""
    planned_seconds: Optional[float] = None
    seconds: float = 0.0
    planned_disk_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Planned(Record):
    """What a run was planned to take when `draftsmith make` began it, and took."""

    stages: Tuple[PlannedStage, ...] = ()
    planned_seconds: float = 0.0
    seconds: float = 0.0
    planned_disk_bytes: int = 0
    disk_bytes: int = 0
    planned_memory_bytes: Optional[int] = None
    #: Of the process that ended the run; `None` if others did some of the work.
    memory_bytes: Optional[int] = None

    @classmethod
    def _inner(cls) -> Dict[str, Any]:
        return {"stages": lambda stages: tuple(PlannedStage.from_json(stage) for stage in stages)}


@dataclass(frozen=True)
class RunRecord(Record):
    """A run: its folder and what each stage came to. Stages that the run file leaves out are `None`."""

    #: The run's folder.
    path: Path = Path()
    stages: Tuple[StageRecord, ...] = ()
    data: Optional[DataRecord] = None
    regenerate: Optional[RegenerateRecord] = None
    capture: Optional[CaptureRecord] = None
    train: Optional[TrainRecord] = None
    bundle: Optional[BundleRecord] = None
    bench: Optional[BenchRecord] = None
    #: `report.html` of the measurement.
    report: Optional[Path] = None
    verdict: Optional[Verdict] = None
    planned: Optional[Planned] = None

    @classmethod
    def of(cls, value: Mapping[str, Any], base: Path) -> RunRecord:
        """Made of the answer of `run`, whose paths count from `base`."""
        stages = tuple(StageRecord.from_json(stage) for stage in value["stages"])
        told: Dict[str, Dict[str, Any]] = {stage.stage: dict(stage.summary) for stage in stages if stage.summary}
        kinds: Dict[str, Type[Record]] = {
            "data": DataRecord,
            "regenerate": RegenerateRecord,
            "capture": CaptureRecord,
            "train": TrainRecord,
        }
        made: Dict[str, Any] = {name: kind.from_json(told[name]) for name, kind in kinds.items() if name in told}
        if "bundle" in told:
            summary = told["bundle"]
            made["bundle"] = BundleRecord.from_json({**summary, "path": str(base / summary["path"])})
        if "bench" in told:
            made["bench"] = BenchRecord.from_json(told["bench"]["results"])
            if told["bench"].get("report"):
                made["report"] = base / told["bench"]["report"]
        if value.get("verdict"):
            made["verdict"] = Verdict.from_json(value["verdict"])
        if value.get("planned"):
            made["planned"] = Planned.from_json(value["planned"])
        extra = {key: kept for key, kept in value.items() if key not in ("run", "stages", "verdict", "planned")}
        return cls(path=base / value["run"], stages=stages, extra=extra, **made)
