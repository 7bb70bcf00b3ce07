"""Everything that touches megatron-core; README.md here lists where megatron and torch are bent."""

import warnings

# megatron warns of optional packages that nobody asked for, and torch of calls that megatron makes;
# both while they are imported, so this comes first.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
