"""Data sets, the order in which their rows are seen, augmentation and blocks. No torch, no ray."""

from pipeline.data.order.blocks import decode_block, iterate_rows, read_blocks
from pipeline.data.order.epochs import BlockPlan, BlockPlanner, EpochOrder
from pipeline.data.order.rows import RowGroups, RowSet
from pipeline.data.params import DATASETS, DataParams
from pipeline.data.pixels.augment import AugmentParams, augment
from pipeline.data.pixels.decode import Decoder
from pipeline.data.sources.source import DataSource, SplitReader, TableReader

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
