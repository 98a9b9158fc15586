"""Data of the public benchmarks: what there is (`catalog`), where it lies (`locate`), records (`sources`), fetching (`download`)."""

from minicpmv.evaluate.data_sets.catalog import DATA_SETS, DataSet, UnknownDataSetError, find_data_set, other_file
from minicpmv.evaluate.data_sets.locate import MissingDataError
from minicpmv.evaluate.data_sets.records import BrokenRecordError, Record, Records
from minicpmv.evaluate.data_sets.sources import Data, open_data, read_subtitles


__all__ = [
    "DATA_SETS",
    "BrokenRecordError",
    "Data",
    "DataSet",
    "MissingDataError",
    "Record",
    "Records",
    "UnknownDataSetError",
    "find_data_set",
    "open_data",
    "other_file",
    "read_subtitles",
]
