"""The list of faults, and the table of the README that is made of it.

`python tests/faults/scorecard.py` rewrites the table.
"""

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- faults -->\n", "<!-- /faults -->\n"
MARKS = r"((?:^@pytest\.mark\..*\n)+)"
# fault: (what is done to a run, what must come of it)
FAULTS = {
    "F1": ("kill -9 at random moments", "resumes by itself, final weights bit-identical"),
    "F2": ("kill -9 at each point inside a save", "an old or a new whole checkpoint, never none"),
    "F3": (
        "each file of a checkpoint truncated, deleted, one bit flipped",
        "file named, older checkpoint used",
    ),
    "F4": ("disk full", "named with path and bytes; training goes on, old checkpoints stay"),
    "F5": ("output directory not writable", "refused before anything is loaded"),
    "F6": (
        "one rank raises, or is killed",
        "all gone in 5 s; the right rank, its phase and cause on record",
    ),
    "F7": ("one rank hangs, or is stopped", "found in time; stacks of the ranks on record"),
    "F8": ("a killed rank and a restart of all", "the new ranks meet and go on"),
    "F9": (
        "SIGTERM, SIGUSR1, SIGINT in each phase; files SAVE and STOP",
        "saved within 25 s, status preempted, weights of the unbroken run",
    ),
    "F10": ("SIGTERM during a save in the background", "that save is finished"),
    "F11": ("kill -9 of the launcher", "ranks gone in 5 s"),
    "F12": (
        "the writer of a checkpoint breaks, or hangs",
        "all ranks know, training goes on, the last save must succeed; a hang ends the run by name",
    ),
    "F13": ("malformed, empty, oversized rows", "file and line named"),
    "F14": ("bytes that are no UTF-8", "file and line named, before training"),
    "F15": ("rows with nothing to learn, prompts too long", "counted per reason, limited"),
    "F16": ("a column of mixed types", "rows named"),
    "F17": ("a template without generation marks", "the mask is proven, or the run stops"),
    "F18": ("NaN or infinity in loss or gradient of one rank", "step skipped by all, batch kept"),
    "F19": ("a spike of the loss or the gradient norm", "step skipped by all, batch kept"),
    "F20": ("resume at the same size", "bit-identical"),
    "F21": (
        "resume with other data, tensor, pipeline parallel and micro-batch sizes",
        "loss of each step within 1e-6",
    ),
    "F22": ("resume at the end of an epoch, in the last step, of a finished run", "exact; done"),
    "F23": ("other data, seed, packing, model", "list of what changed; --allow-change resumes"),
    "F24": ("two jobs, one output directory", "the second is refused; dead jobs give way"),
    "F25": ("a new config in an old output directory", "refused"),
    "F26": (
        "the clock is set; ranks wait for data that one of them prepares",
        "no lock is lost, nobody is taken for dead; waiting has no time limit",
    ),
    "F27": (
        "kernel cache that others can write to, or nobody",
        "refused, or another one with a warning; own cache by default",
    ),
    "F28": ("out of device memory", "phase named, with what to change"),
    "F29": ("soak: saves and random faults without end", "memory and files flat, goodput measured"),
    "F30": (
        "SIGUSR1 and SIGHUP to `sft_fast train`, in a slow save too; a terminal that is closed",
        "saved, status preempted; under nohup it goes on",
    ),
    "F31": (
        "an output directory with files of others; `model.path` in the run's own export",
        "refused before anything is written, by `check` too",
    ),
    "F32": (
        "a tracker, pictures, metrics.jsonl, the evaluation file or a later manifest fails",
        "said, and the run goes on; what is finished stays finished",
    ),
    "F33": (
        "jobs, containers and builds of one name; a spoiled or deleted lock; no links on the disk",
        "told apart; the lock is written again, the watchdog lives, nobody's files are taken",
    ),
    "F34": (
        "a token store with flipped bits, on a failing disk, or of rows that grow meanwhile",
        "file named and the store built anew; nothing is deleted for a disk that does not answer",
    ),
    "F35": (
        "machines with other settings, versions, data, checkpoints or directories; a late one",
        "all ranks end before the first step, or say who is missing; key and values named",
    ),
    "F36": (
        "a copied run, a base model that changed, quantized or doubled tensors, odd config.json",
        "known by hashes and refused before the first step",
    ),
    "F37": ("a job is suspended for longer than its time limits", "it goes on; no hang is seen"),
    "F38": (
        "pipes in place of files, templates without end, variables of a job that is none",
        "refused, or bounded, or not heard; nothing waits",
    ),
    "F39": (
        "other users, disks without room for files, a machine that is gone, closed streams, -OO",
        "said with path and culprit; nothing is left behind",
    ),
    "F40": (
        "a token store cut off, or on a failing disk, while a run reads it from memory",
        "file and fix named for the rank that SIGBUS ended; the next start hashes or rebuilds it",
    ),
    "F41": (
        "a rank is killed, raises, hangs or is stopped, with `parallel.warm_restarts`",
        "all start again at once without importing; final weights bit-identical",
    ),
    "F42": (
        "a machine is lost while a checkpoint is saved",
        "the others leave and name it; the checkpoint before stays",
    ),
}


def count_tests() -> dict[str, tuple[int, int]]:
    """Fault -> (tests in CI, slow tests)."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path in (ROOT / "tests").rglob("test_*.py"):
        for marks in re.findall(MARKS, path.read_text(), re.MULTILINE):
            for fault in re.findall(r'fault\("(F\d+)"\)', marks):
                counts[fault]["@pytest.mark.slow\n" in marks] += 1
    return {fault: (fast, slow) for fault, (fast, slow) in counts.items()}


def table() -> str:
    """Markdown; a fault without a test is not in it."""
    tests = count_tests()
    assert tests.keys() <= FAULTS.keys(), tests.keys() - FAULTS.keys()
    lines = ["| | what is done to a run | what must come of it | in CI |", "|---|---|---|---|"]
    for fault, (done, outcome) in FAULTS.items():
        fast, slow = tests.get(fault, (0, 0))
        if fast or slow:
            lines.append(f"| {fault} | {done} | {outcome} | {'yes' if fast else 'by hand'} |")
    return "\n".join(lines) + "\n"


def readme_with_table() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_with_table(), encoding="utf-8")
