"""How ranks meet: whether all have come, whether they agree, whether they see one directory.

All of it goes through the store, before anything that a rank which disagrees could hang in.
"""

import json
import logging
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

import sft_fast
from sft_fast.megatron.exchange import Ranks, StoreExchange
from sft_fast.metrics.trackers import flat
from sft_fast.runtime.versions import installed_version

logger = logging.getLogger(__name__)
TELL_EVERY_S = 15.0
LOOK_EVERY_S = 0.1
# Network file systems show a new file late.
SEEN_WITHIN_S = 30.0
PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "numpy")
# What may differ between machines: where they keep things, and how many cores they have.
OF_ONE_MACHINE = ("output_dir", "data.cache_dir", "data.num_processes")


def wait_for_all(ranks: Ranks, timeout_s: float) -> None:
    """Waits until every rank has come, and says who is missing.

    Raises:
        TimeoutError: not all came in time; names them.
    """
    store, began = ranks.store, time.monotonic()
    store.set(f"sft_fast/joined/{ranks.rank}", socket.gethostname())
    if store.add("sft_fast/num_joined", 1) == ranks.world_size:
        store.set("sft_fast/joined/all", "")
    next_told = began + TELL_EVERY_S
    while not store.check(["sft_fast/joined/all"]):
        now = time.monotonic()
        is_late = now > began + timeout_s
        if is_late or (ranks.rank == 0 and now > next_told):
            next_told = now + TELL_EVERY_S
            keys = [f"sft_fast/joined/{rank}" for rank in range(ranks.world_size)]
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            text = f"ranks {spans(missing)} of {ranks.world_size} have not joined after "
            text += f"{now - began:.0f} s"
            if is_late:
                raise TimeoutError(f"{text}; is the command running on all machines?")
            logger.warning("waiting: %s", text)
        time.sleep(LOOK_EVERY_S)


def spans(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, as text: "0, 8-15"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def agree(
    topic: str, facts: Mapping[str, str], timeout_s: float, ranks: Ranks | None = None
) -> None:
    """Compares facts over all ranks.

    Args:
        topic: what they are about.
        facts: name -> value, as a message shows them.
        timeout_s: how long a rank waits for the others.
        ranks: who takes part; None = those of the process group.

    Raises:
        ValueError: the ranks disagree, on every rank; names each fact and its values.
        TimeoutError: a rank did not answer in time.
    """
    exchange = StoreExchange(f"agree/{topic}", timeout_s, ranks)
    digest = xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
    if len(set(exchange.all_gather("digest", digest))) == 1:
        return
    everyone = exchange.all_gather("facts", [socket.gethostname(), dict(facts)])
    names = sorted(set().union(*(of_rank for _, of_rank in everyone)))
    lines = []
    for name in names:
        holders: dict[str, list[int]] = {}
        for rank, (_, of_rank) in enumerate(everyone):
            holders.setdefault(of_rank.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            values = [
                f"{value} on rank{'s' if len(held) > 1 else ''} {spans(held)} "
                f"({', '.join(sorted({everyone[rank][0] for rank in held}))})"
                for value, held in holders.items()
            ]
            lines.append(f"  {name}: {'; '.join(values)}")
    raise ValueError(
        f"the machines disagree about the {topic}; give them the same configuration, files and "
        "versions:\n" + "\n".join(lines)
    )


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal on all machines before the data is read: configuration, code, versions.

    Args:
        config: the configuration, as `model_dump` gives it.
    """
    facts = {key: json.dumps(value, default=str) for key, value in flat(config)}
    facts = {key: value for key, value in facts.items() if key not in OF_ONE_MACHINE}
    facts |= {f"contents of {path}": file_digest(Path(path)) for path in config["plugins"]}
    versions = {name: installed_version(name) or "not installed" for name in PACKAGES}
    python = ".".join(platform.python_version_tuple()[:2])
    return facts | versions | {"python": python, "sft_fast": code_version()}


def code_version() -> str:
    """Version of this package, and a hash of its Python files."""
    folder, hasher = Path(sft_fast.__file__).parent, xxhash.xxh3_64()
    for path in sorted(folder.rglob("*.py")):
        hasher.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{sft_fast.__version__} ({hasher.hexdigest()})"


def file_digest(path: Path) -> str:
    """xxh3_128 of a file; in words where it is missing."""
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def check_is_shared(folder: Path, timeout_s: float, ranks: Ranks | None = None) -> None:
    """Makes sure that all ranks see one directory.

    Raises:
        ValueError: some see another one, on every rank; names them.
        TimeoutError: a rank did not answer in time.
    """
    exchange = StoreExchange("shared", timeout_s, ranks)
    name = exchange.all_gather("name", f".seen-{uuid.uuid4().hex}")[0]
    file = folder / name
    if exchange.rank == 0:
        file.touch()
    try:
        exchange.all_gather("written", None)
        is_seen = appears(file)
        seen = exchange.all_gather("seen", [socket.gethostname(), is_seen])
    finally:
        if exchange.rank == 0:
            file.unlink(missing_ok=True)
    apart = [rank for rank, (_, is_seen) in enumerate(seen) if not is_seen]
    if apart:
        hosts = ", ".join(sorted({seen[rank][0] for rank in apart}))
        raise ValueError(
            f"output_dir: {folder} is another directory for ranks {spans(apart)} ({hosts}) than "
            f"for rank 0 ({seen[0][0]}); checkpoints are written by all of them, so it must be on "
            "a file system that all machines share"
        )


def appears(file: Path) -> bool:
    """Whether a file is there, or soon is."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_EVERY_S)
        # Makes a client of a network file system look again.
        next(file.parent.iterdir(), None)
    return True
