"""Lightning callbacks that watch a run and write down what it did; none of them changes the training."""

from gopo_lightning.training.callbacks.export import ExportHF
from gopo_lightning.training.callbacks.pairs import PairTable
from gopo_lightning.training.callbacks.progress import ProgressBar
from gopo_lightning.training.callbacks.samples import SampleTable
from gopo_lightning.training.callbacks.throughput import Throughput

__all__ = ["ExportHF", "PairTable", "ProgressBar", "SampleTable", "Throughput"]
