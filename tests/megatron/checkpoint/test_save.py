"""What a checkpoint writer says and forgives, without a model."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from lone_rank import LoneRank
from rank_pool import RankPool
from sft_fast.config.sections import CheckpointConfig
from sft_fast.runtime.manifest import agree, find_damage, staged_directory
from sft_fast.runtime.phases import Phases
from sft_fast.runtime.run_files import list_checkpoints


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def writer(tmp_path: Path, said: list[str]) -> Any:
    from sft_fast.megatron.checkpoint.host_snapshot import HostCopier
    from sft_fast.megatron.checkpoint.save import CheckpointWriter
    from sft_fast.runtime.run_files import checkpoint_path

    for step in range(1, 6):
        with staged_directory(checkpoint_path(tmp_path, step), LoneRank()) as stage:
            stage.write_text("a", "b")
    return CheckpointWriter(
        tmp_path, CheckpointConfig(), said.append, HostCopier(), Phases.unwatched()
    )


def test_a_save_in_the_background_is_told_of_when_it_ends(writer: Any, said: list[str]) -> None:
    goes_on = threading.Event()
    writer.saving, writer.error = writer.folder / "step_00000006", OSError(28, "no space")
    writer.thread, writer.deadline = threading.Thread(target=goes_on.wait), float("inf")
    writer.thread.start()
    writer.poll()
    assert said == [] and writer.thread is not None
    goes_on.set()
    writer.thread.join()
    writer.poll()
    assert len(said) == 1 and "step_00000006 could not be saved (1 of 3" in said[0]
    writer.poll()
    writer.finish(is_last=True)
    assert len(said) == 1, "told once, and not held against a last save that is none"


def test_a_save_in_the_background_that_hangs_is_found_in_time(writer: Any) -> None:
    goes_on = threading.Event()
    writer.saving = writer.folder / "step_00000006"
    writer.thread, writer.deadline = threading.Thread(target=goes_on.wait), 0.0
    writer.thread.start()
    with pytest.raises(TimeoutError, match="step_00000006 has not ended in 3600"):
        writer.poll()
    goes_on.set()
    writer.thread.join()


def test_a_time_out_of_the_file_system_is_borne_and_one_of_a_rank_is_not(
    writer: Any, said: list[str]
) -> None:
    writer.handle_save_failure(
        OSError(errno.ETIMEDOUT, "rank 1: Connection timed out: /nfs/x"), is_last=False
    )
    assert len(said) == 1 and "Connection timed out: /nfs/x; training goes on" in said[0]
    with pytest.raises(TimeoutError, match="waited"):
        writer.handle_save_failure(TimeoutError("rank 0 waited 9 s"), is_last=False)


def test_an_old_checkpoint_that_cannot_be_deleted_fails_no_save(
    writer: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_fast.megatron.checkpoint import save

    remove = save.remove_directory

    def remove_but_first(folder: Path) -> None:
        if folder.name == "step_00000001":
            raise PermissionError(13, "Permission denied", str(folder))
        remove(folder)

    monkeypatch.setattr(save, "remove_directory", remove_but_first)
    writer.prune(5, 0)
    left = [path.name[-1] for path in list_checkpoints(writer.folder)]
    assert left == ["1", "4", "5"] and not any(map(find_damage, writer.folder.iterdir()))
    writer.thread = threading.Thread(target=int)
    writer.thread.start()
    writer.finish(is_last=True)
    assert len(said) == 1 and "step_00000001 could not be deleted" in said[0]
    assert writer.num_failures == 0


def test_what_breaks_in_a_save_is_an_error_that_other_ranks_are_told(tmp_path: Path) -> None:
    for error in (RuntimeError("r"), MemoryError(), AssertionError("a")):

        def fail(error: Exception = error) -> None:
            raise error

        with (
            pytest.raises(OSError, match=f"rank 0: {type(error).__name__}: ") as raised,
            staged_directory(tmp_path / "x", LoneRank()),
        ):
            agree(LoneRank(), "files", fail)
        assert raised.value.__cause__ is error and raised.value.errno == errno.EIO
    assert list(tmp_path.iterdir()) == []


def saves_of_a_rank_without_room(folder: str) -> list[bool]:
    """Whether saves go on in the background: where there is room, where rank 1 has none, and where
    there is room again."""
    import torch.distributed as dist

    from sft_fast.megatron.checkpoint.host_snapshot import HostCopier
    from sft_fast.megatron.checkpoint.save import CheckpointWriter
    from sft_fast.megatron.checkpoint.train_state import TrainState

    def copy(tensors: Any) -> Any:
        if dist.get_rank() == 1 and state.step == 2:
            raise MemoryError("no room")
        return []

    copier = HostCopier()
    copier.copy = copy  # type: ignore[method-assign]
    config = CheckpointConfig(asynchronous=True)
    writer = CheckpointWriter(Path(folder), config, print, copier, Phases.unwatched())
    found = []
    for step in (1, 2, 3):
        state = TrainState(step, {})
        writer.save(state, {"a": 1})
        found.append(writer.thread is not None)
        writer.finish()
    return found


def test_all_ranks_wait_for_a_save_of_which_one_has_no_copy(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    """One that trained on would take the other for hung."""
    found = rank_pool.run(2, saves_of_a_rank_without_room, str(tmp_path))
    assert found == [[True, False, True]] * 2
    assert len(list_checkpoints(tmp_path)) == 2, "keep_last"
