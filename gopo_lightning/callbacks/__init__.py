"""Lightning callbacks that watch a run and write down what it did; none of them changes the training."""

from gopo_lightning.callbacks.export import ExportHF
from gopo_lightning.callbacks.progress import ProgressBar
from gopo_lightning.callbacks.samples import SampleTable
from gopo_lightning.callbacks.throughput import Throughput

__all__ = ["ExportHF", "ProgressBar", "SampleTable", "Throughput"]
