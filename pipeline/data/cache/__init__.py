"""The logits cache: what a teacher says of every view of every row, kept as files and refused when stale."""

from pipeline.data.cache.blocks import PartAssembler, PartBlocks
from pipeline.data.cache.build import CacheBuild, open_build
from pipeline.data.cache.check import CacheEntry, find_deviations, list_caches, remove_cache, tolerance, verify_files
from pipeline.data.cache.encoding import LogitsDecoder, decode_logits
from pipeline.data.cache.filling import FILL, FillWriter, rewrite_blocks
from pipeline.data.cache.folder import open_folder
from pipeline.data.cache.key import CacheKey
from pipeline.data.cache.manifest import MANIFEST, BuildRecord, Manifest, write_build
from pipeline.data.cache.opened import Cache, open_cache, open_manifest
from pipeline.data.cache.params import CacheParams, check_classes
from pipeline.data.cache.parts import PartLayout, PartWriter
from pipeline.data.cache.reading import LoadedLogits, LogitsReader, LogitsToCome, WindowedLogits, load_logits
from pipeline.data.cache.sizes import CachePlan, TopkError, estimate_bytes, measure_topk_error, plan_cache, row_bytes
from pipeline.data.cache.topk import check_temperature

__all__ = [
    "FILL",
    "MANIFEST",
    "BuildRecord",
    "Cache",
    "CacheBuild",
    "CacheEntry",
    "CacheKey",
    "CacheParams",
    "CachePlan",
    "FillWriter",
    "LoadedLogits",
    "LogitsDecoder",
    "LogitsReader",
    "LogitsToCome",
    "Manifest",
    "PartAssembler",
    "PartBlocks",
    "PartLayout",
    "PartWriter",
    "TopkError",
    "WindowedLogits",
    "check_classes",
    "check_temperature",
    "decode_logits",
    "estimate_bytes",
    "find_deviations",
    "list_caches",
    "load_logits",
    "measure_topk_error",
    "open_build",
    "open_cache",
    "open_folder",
    "open_manifest",
    "plan_cache",
    "remove_cache",
    "rewrite_blocks",
    "row_bytes",
    "tolerance",
    "verify_files",
    "write_build",
]
