"""Training and evaluation loops: pure torch, no knowledge of Ray or of the tracker."""

from pipeline.training.context import BatchSource, Block, LocalContext, Worker, WorkerContext, check_block, find_local
from pipeline.training.job import (
    EvaluationSpec,
    FillHere,
    InProcessSource,
    RunSpec,
    TeacherArguments,
    build_job,
    compute_logits,
    evaluate_weights,
    make_plan,
    make_planner,
    open_training,
    teacher_arguments,
)
from pipeline.training.loop import TrainJob, train
from pipeline.training.params import OptimizerParams, TrainParams
from pipeline.training.plan import RunPlan
from pipeline.training.state import BestRecord, Outcome, TrainState, read_state
from pipeline.training.validation import Evaluation, EvaluationSet, open_test

__all__ = [
    "BatchSource",
    "BestRecord",
    "Block",
    "Evaluation",
    "EvaluationSet",
    "EvaluationSpec",
    "FillHere",
    "InProcessSource",
    "LocalContext",
    "OptimizerParams",
    "Outcome",
    "RunPlan",
    "RunSpec",
    "TeacherArguments",
    "TrainJob",
    "TrainParams",
    "TrainState",
    "Worker",
    "WorkerContext",
    "build_job",
    "check_block",
    "compute_logits",
    "evaluate_weights",
    "find_local",
    "make_plan",
    "make_planner",
    "open_test",
    "open_training",
    "read_state",
    "teacher_arguments",
    "train",
]
