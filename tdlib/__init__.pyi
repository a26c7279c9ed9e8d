from . import data as data
from . import errors as errors
from . import layers as layers
from . import methods as methods
from . import models as models
from . import planning as planning
from . import tensor as tensor
from . import train as train
from .calibration import Statistics as Statistics
from .calibration import correct_bias as correct_bias
from .calibration import load_statistics as load_statistics
from .calibration import recalibrate_batchnorm as recalibrate_batchnorm
from .calibration import statistics as statistics
from .layers import decompose as decompose
from .layers import project as project
from .layers import to_dense as to_dense
from .methods import compress as compress
from .planning import Comparison as Comparison
from .planning import Cost as Cost
from .planning import Plan as Plan
from .planning import compare as compare
from .planning import count as count
from .planning import plan as plan
from .serialise import load as load
from .serialise import save as save

__version__: str
