"""What calibration inputs tell about a network: moments of its layers' inputs, sensitivity of its output, and
the BatchNorm statistics and biases that compression shifted. No labels are needed.
"""

from tdlib.calibration.batches import calibration_batches
from tdlib.calibration.batchnorm import correct_bias, recalibrate_batchnorm, shift_output
from tdlib.calibration.file import Statistics, load_statistics
from tdlib.calibration.fisher import TEMPERATURE, damped, fisher
from tdlib.calibration.outputs import divergence, logits
from tdlib.calibration.paired import paired
from tdlib.calibration.passes import call_order
from tdlib.calibration.statistics import statistics

__all__ = [
    "TEMPERATURE",
    "Statistics",
    "calibration_batches",
    "call_order",
    "correct_bias",
    "damped",
    "divergence",
    "fisher",
    "load_statistics",
    "logits",
    "paired",
    "recalibrate_batchnorm",
    "shift_output",
    "statistics",
]
