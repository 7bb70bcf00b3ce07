"""Which policy and how many chunks a budget gives."""

import pytest

from sft_fast.kernels.memory_plan import MemoryPlan

GIB = 1 << 30
HEAD_70B = (128256 * 2, 128256 * 8192 * 4)
"""bytes of a token's 16-bit logits, and of the weight's gradient in fp32"""


@pytest.mark.parametrize(
    ("num_tokens", "budget", "head", "summed", "main_grad", "policy", "num_chunks"),
    [
        (1000, 1, (512, 1), True, True, "stored", 1),  # fewer tokens than the smallest chunk
        (10000, 10000 * 512, (512, 1), True, True, "stored", 1),
        (10000, 5000 * 512, (512, 1), True, True, "gradient_in_forward", 2),
        (10000, 5000 * 512, (512, 1 << 40), True, True, "recompute", 2),
        (10000, 5000 * 512, (512, 1), False, True, "recompute", 2),
        (12288, 1, (512, 1), False, True, "recompute", 3),  # 4096 tokens, whatever the budget
        (12289, 1, (512, 1), False, True, "recompute", 4),
        (0, 1, (512, 1), False, True, "stored", 1),
        # Without main_grad recompute needs the buffer too, and stored takes less than either.
        (16384, 2 * GIB, HEAD_70B, True, False, "stored", 1),
        (16384, 2 * GIB, HEAD_70B, False, False, "stored", 1),
        (16384, 2 * GIB, HEAD_70B, True, True, "recompute", 2),
        (65536, 2 * GIB, HEAD_70B, True, False, "gradient_in_forward", 8),
        (65536, 2 * GIB, HEAD_70B, False, False, "recompute", 8),
        (16384, 2 * GIB, (128256 * 2, 0), True, True, "gradient_in_forward", 2),  # frozen head
    ],
)
def test_policy_follows_the_budget(
    num_tokens: int,
    budget: int,
    head: tuple[int, int],
    summed: bool,
    main_grad: bool,
    policy: str,
    num_chunks: int,
) -> None:
    plan = MemoryPlan.choose("auto", budget, num_tokens, *head, main_grad, summed)
    assert plan.policy == policy
    chunks = plan.chunks(num_tokens)
    assert len(chunks) == num_chunks
    covered = [token for chunk in chunks for token in range(num_tokens)[chunk]]
    assert covered == list(range(num_tokens))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert max(sizes) - min(sizes) < num_chunks, (
        "a chunk of a few tokens costs as much as a full one"
    )
    assert max(sizes) <= 4096 or num_chunks == 1 or max(sizes) * head[0] <= budget
