"""Everything that touches megatron-core. Importing this package first makes megatron run without a GPU."""

import warnings

from sft_fast.megatron.device import install_cpu_shim

warnings.filterwarnings("ignore", message="Apex is not installed")
install_cpu_shim()
