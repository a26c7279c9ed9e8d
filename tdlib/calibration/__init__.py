"""What calibration inputs tell about a network: moments of its layers' inputs, sensitivity of its output, and
the BatchNorm statistics and biases that compression shifted. No labels are needed.
"""

from tdlib.calibration.batchnorm import correct_bias, recalibrate_batchnorm, shift_output
from tdlib.calibration.outputs import divergence, logits
from tdlib.calibration.passes import calibration_batches, call_order
from tdlib.calibration.sensitivity import TEMPERATURE, damped, fisher, paired
from tdlib.calibration.statistics import Statistics, load_statistics, statistics

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
