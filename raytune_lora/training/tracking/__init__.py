"""Where a trial's numbers go: one class for each kind of tracker, found by its name."""

from raytune_lora.training.tracking.base import TrackedTrial, Tracker, kinds, problems, tracker_class
from raytune_lora.training.tracking.fanout import Trackers
from raytune_lora.training.tracking.gauges import RayGauges
from raytune_lora.training.tracking.jsonl import StepLog
from raytune_lora.training.tracking.mlflow import Mlflow
from raytune_lora.training.tracking.tensorboard import TensorBoard
from raytune_lora.training.tracking.wandb import Wandb

__all__ = [
    "Mlflow",
    "RayGauges",
    "StepLog",
    "TensorBoard",
    "TrackedTrial",
    "Tracker",
    "Trackers",
    "Wandb",
    "kinds",
    "problems",
    "tracker_class",
]
