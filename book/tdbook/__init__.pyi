from .records import read_record as read_record
from .records import record as record
from .records import records as records
