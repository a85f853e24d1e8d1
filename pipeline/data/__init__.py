"""Data sets, the order in which their rows are seen, augmentation and blocks. No torch, no ray."""

from pipeline.data.augment import AugmentParams, augment
from pipeline.data.blocks import decode_block, iterate_rows, read_blocks
from pipeline.data.decode import Decoder
from pipeline.data.order import BlockPlan, BlockPlanner, EpochOrder
from pipeline.data.params import DATASETS, DataParams
from pipeline.data.rows import RowGroups, RowSet
from pipeline.data.source import DataSource, SplitReader, TableReader

__all__ = [
    "DATASETS",
    "AugmentParams",
    "BlockPlan",
    "BlockPlanner",
    "DataParams",
    "DataSource",
    "Decoder",
    "EpochOrder",
    "RowGroups",
    "RowSet",
    "SplitReader",
    "TableReader",
    "augment",
    "decode_block",
    "iterate_rows",
    "read_blocks",
]
