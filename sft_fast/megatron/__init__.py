"""Everything that touches megatron-core; importing it makes megatron run without a GPU."""

import warnings

from sft_fast.megatron.device import install_cpu_shim

# megatron warns of optional packages that nobody asked for, and torch of calls that megatron makes.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
install_cpu_shim()
