"""The sMLP block on fused Triton kernels: forward, backward and derivatives of any order."""

from smlp_kernels._requirements import require_cache_folder, require_versions

require_versions()
_cache_folder = require_cache_folder()  # kept as long as the process

from smlp_kernels import table  # noqa: E402
from smlp_kernels.functional import fallback_reason, fused_smlp  # noqa: E402
from smlp_kernels.modules import FusedSMLPBlock  # noqa: E402
from smlp_kernels.surgery import fuse_model, unfuse_model  # noqa: E402
from smlp_kernels.testing import check_block  # noqa: E402
from smlp_kernels.warmup import warmup  # noqa: E402

__all__ = [
    "FusedSMLPBlock",
    "check_block",
    "fallback_reason",
    "fuse_model",
    "fused_smlp",
    "table",
    "unfuse_model",
    "warmup",
]
