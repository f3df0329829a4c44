"""Models larger than memory, and runs of several processes: the same results, block by block.

:func:`load_streamed` opens a checkpoint without its weights; :func:`compress_blockwise`, :func:`perplexity_blockwise`,
:func:`reference_blockwise` and :func:`compare_blockwise` do with it what :func:`~cur.integrations.compress`,
:func:`~cur.integrations.perplexity` and :class:`~cur.integrations.Reference` do with a model in memory.
"""

from cur._lib.moved import former_names
from cur.integrations.blockwise.distributed import ProcessGroup, ProcessGroupError
from cur.integrations.blockwise.journal import JournalError
from cur.integrations.blockwise.memory import available_memory, fits
from cur.integrations.blockwise.run import compress_blockwise
from cur.integrations.blockwise.score import compare_blockwise, perplexity_blockwise, reference_blockwise
from cur.integrations.blockwise.streamed_model import StreamedModel, load_streamed
from cur.integrations.files.header import ShardError
from cur.integrations.files.shards import Shards

__all__ = [
    "JournalError",
    "ProcessGroup",
    "ProcessGroupError",
    "ShardError",
    "Shards",
    "StreamedModel",
    "available_memory",
    "compare_blockwise",
    "compress_blockwise",
    "fits",
    "load_streamed",
    "perplexity_blockwise",
    "reference_blockwise",
]

__getattr__ = former_names(
    __name__, ("cur.integrations.blockwise.streamed_model", "cur.integrations.blockwise.distributed")
)
