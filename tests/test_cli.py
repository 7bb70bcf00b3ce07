"""What the command itself says: mistakes on the command line, terminals, failing ranks."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_fast.cli import main
from sft_fast.runtime import launcher
from sft_fast.runtime.terminal import as_seen

ROOT = Path(__file__).parents[1]
PROBLEM = """\
error: 1 problem in my.yaml
my.yaml:3  data.formt
  found:    an unknown key with the string 'messages'
  expected: a known key, and much more to say about it, so that the line has to be broken somewhere
  fix:      did you mean data.format?"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bare_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "sft_fast train demo" in text
    # A command and its meaning share a line, also the longest.
    assert all(" " in line.strip() for line in text.split("commands:")[1].splitlines()[2:] if line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command trian; did you mean train?"),
        (["xyz"], "there is no command xyz; `sft_fast --help` lists them"),
        (["check"], "the following arguments are required: config\n"),
        (["ls", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_a_mistake_in_the_arguments_is_told_first_and_the_usage_below(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {message}") and "\nusage: sft_fast" in text


def test_a_file_that_is_not_there_has_a_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.yaml").write_text("")
    for command in ("check", "train", "preview", "plan"):
        assert main([command, str(tmp_path / "mi.yaml")]) == 2
        assert f"did you mean {tmp_path}/my.yaml?" in capsys.readouterr().err
    assert main(["plan", "demo", "--gpu", "MI300"]) == 2
    assert "did you mean MI300X?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "demo", "--nproc-per-node", "0"],
        ["plan", "demo", "--ranks", "-1"],
        ["check", "demo", "--ranks", "two"],
        ["preview", "demo", "--rows", "0"],
        ["chat", "x", "--max-new-tokens", "1.5"],
    ],
)
def test_counts_are_whole_numbers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert f"error: argument {arguments[2]}: '{arguments[3]}'; expected a whole number" in text


def test_files_that_cannot_be_written_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", "demo", "--rows", "2", "--html", "/nowhere/x.html"]) == 2
    assert capsys.readouterr().err == "error: /nowhere/x.html: No such file or directory\n"


@pytest.mark.parametrize("arguments", [["--debug", "plan"], ["plan", "--debug"]])
def test_debug_stands_anywhere(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "demo", "--gpu", "x"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_errors_on_a_terminal_are_broken_at_words_and_keep_their_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    lines = as_seen(PROBLEM, Terminal()).splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines).split()) == " ".join(PROBLEM.split())
    broken = lines.index(next(line for line in lines if line.startswith("  expected")))
    assert lines[broken + 1].startswith(" " * 12)
    assert as_seen(PROBLEM, io.StringIO()) == PROBLEM


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    text = as_seen(PROBLEM, Terminal())
    assert "\x1b[31m  found" in text and "\x1b[32m  fix" in text
    # Every colour ends where it should: nothing leaks into the next line.
    assert all(line.endswith("\x1b[0m") for line in text.splitlines() if "\x1b[3" in line)
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in as_seen(PROBLEM, Terminal())


RANK = "import os, sys, time, signal\nif os.environ['RANK'] == '1':\n    {ends}\ntime.sleep(60)\n"


def launch(tmp_path: Path, ends: str) -> subprocess.Popen[str]:
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(ends=ends))
    command = [sys.executable, "-m", "sft_fast.runtime.launcher", str(tmp_path), "--standalone"]
    command += ["--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("print('error: mine', file=sys.stderr); sys.exit(2)", 2, "error: mine\n"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            1,
            "error: rank 1 was ended by SIGKILL: by someone, or by the system for want of memory\n",
        ),
    ],
)
def test_what_a_failing_rank_says_is_the_last_word(
    tmp_path: Path, ends: str, code: int, said: str
) -> None:
    process = launch(tmp_path, ends)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", said)


def test_a_launcher_that_is_told_to_end_passes_it_on(tmp_path: Path) -> None:
    began = tmp_path / "began"
    process = launch(tmp_path, f"open({str(began)!r}, 'w').close()")
    while not began.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")


def test_a_folder_of_our_name_is_not_taken_for_us(tmp_path: Path) -> None:
    """Such as another clone, in which the command is run."""
    (tmp_path / "sft_fast").mkdir()
    (tmp_path / "sft_fast" / "__init__.py").touch()
    (tmp_path / "sft_fast" / "launcher.py").write_text("raise SystemExit(7)")
    # The installed command does not look into the working directory either.
    command = [sys.executable, "-P", "-c", "from sft_fast.cli import main; main()"]
    command += ["train", "demo", "plugins=[/no/where.py]"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "error: plugins[0]" in result.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sft_fast", "ls"]
    with open(write, "w") as pipe:
        result = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, cwd=ROOT)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize("name", ["nothere.jsonl", "./nothere/*.jsonl"])
def test_training_does_not_start_without_its_data(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = [f"data.train={name}", f"output_dir={output}", "evaluation.exact_match_samples=0"]
    assert main(["train", "demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.train: ") and name in error and error.count("\n") == 1
    assert not output.exists()


def test_the_recorded_failure_is_of_this_start(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    assert launcher.recorded_failure(tmp_path, 0.0) == ""
    path.write_text(json.dumps({"rank": 3, "phase": "save", "cause": "no space"}))
    found = launcher.recorded_failure(tmp_path, time.time() - 9)
    assert found == f"rank 3, phase save: no space ({path})"
    assert launcher.recorded_failure(tmp_path, time.time() + 9) == ""


def test_every_exit_code_is_in_the_docs() -> None:
    from sft_fast import exit_codes

    codes = [value for value in vars(exit_codes).values() if isinstance(value, int)]
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \|", text.split("| exit code |")[1].split("\n\n")[0], re.M)
    assert sorted(codes) == [int(code) for code in listed if code != "0"]
