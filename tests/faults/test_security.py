"""Files and configurations that want to do harm, and secrets that want to get out."""

import ast
import json
import os
import pickle
import re
import shutil
import stat
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.launcher import Launcher
from lone_rank import LoneRank
from sft_fast.runtime.kernel_cache import check_private, use_private_cache
from sft_fast.runtime.manifest import (
    complete,
    find_damage,
    read_manifest,
    staged_directory,
)
from sft_fast.runtime.rendezvous import public_address_warning

ROOT = Path(__file__).parents[2]
# Not the names alone: a model's own eval() is fine.
FORBIDDEN = re.compile(
    r"pickle(\.|$)|marshal\.|shelve\.|dill\.|joblib\.|torch\.(load|save)$|yaml\.(load|full_load|"
    r"unsafe_load|load_all)$|^(eval|exec|compile|__import__)$|os\.(system|popen)$"
)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def sealed(folder: Path) -> None:
    """Gives changed files a manifest that fits, as an attacker would."""
    (folder / "manifest.json").unlink()
    moved = folder.rename(folder.with_name(".incomplete_x"))
    complete(moved, folder, [], None)
    assert find_damage(folder) == []


def test_s1_a_pickle_in_place_of_any_file_of_a_checkpoint_is_not_run(launcher: Launcher) -> None:
    source = launcher.run("s1", steps=2).output / "checkpoints/step_00000002"
    names = [path.name for path in source.iterdir() if path.name != "manifest.json"]
    for name in names:
        run = launcher.folder / f"s1-{name}"
        target = run / "checkpoints/step_00000002"
        shutil.copytree(source, target)
        harm = launcher.folder / f"harm-{name}"
        (target / name).write_bytes(pickle.dumps(Payload(harm)))
        sealed(target)
        job = launcher.start(f"s1-{name}", steps=4)
        assert job.wait()[0] != 0
        assert not harm.exists()
        assert job.json("error.json")["phase"] in ("resume", "data", "model")


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_s2_nothing_in_the_package_can_run_what_it_reads() -> None:
    files = [*(ROOT / "sft_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 50
    for path in files:
        for name, node in calls(path):
            assert not FORBIDDEN.search(name), f"{path}:{node.lineno} calls {name}"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                assert keyword.arg not in ("shell", "trust_remote_code", "allow_pickle") or (
                    is_false
                ), f"{path}:{node.lineno} {keyword.arg}"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, path


def test_s3_nothing_is_unpickled_when_a_run_is_continued_and_exported(launcher: Launcher) -> None:
    launcher.run("s3", steps=2)
    record = launcher.folder / "unpickled"
    job = launcher.run("s3", hook=f"record_pickles:{record}", steps=4)
    assert "resumed from" in job.said() and "exported to" in job.said()
    found = record.read_text()
    assert "pathlib" in found, "the record works"
    readers = ("megatron/checkpoint/", "manifest.py", "megatron/hf.py", "data/store.py")
    assert not [line for line in found.splitlines() if any(name in line for name in readers)]


def foreign_model(folder: Path, harm: Path) -> None:
    """A model directory whose config.json and tokenizer want their own Python to be run."""
    from sft_fast.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("demo")
    tokenizer.save_pretrained(folder)
    (folder / "harm.py").write_text(f"open({str(harm)!r}, 'w')\nclass Harm: pass\n")
    own = {"AutoConfig": "harm.Harm", "AutoModelForCausalLM": "harm.Harm"}
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": ["harm.Harm", "harm.Harm"]}
    path.write_text(json.dumps(config))
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "auto_map": own,
        "_attn_implementation_internal": "someone/kernel",
        "_name_or_path": "x",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(values))


def test_s4_s5_code_of_a_model_directory_is_not_run_and_not_exported(
    launcher: Launcher, tmp_path: Path
) -> None:
    harm = tmp_path / "harm"
    foreign_model(tmp_path / "model", harm)
    options = (f"model.path={tmp_path / 'model'}", "model.shape=null", "model.random_init=true")
    job = launcher.start("s4", *options, "tokenizer.path=null", steps=2)
    code = job.wait()[0]
    assert not harm.exists()
    if code == 0:
        exported = json.loads((job.output / "export/config.json").read_text())
        assert not [key for key in exported if key.startswith("_") or key == "auto_map"]


# The first versions without the holes that pyproject.toml names.
SAFE = {
    "datasets": (4,),
    "jinja2": (3, 1, 6),
    "megatron-core": (0, 15, 3),
    "mlflow": (3, 11),
    "psutil": (5, 6, 6),
    "pyarrow": (23, 0, 1),
    "pydantic": (2, 4),
    "pyyaml": (5, 4),
    "torch": (2, 6),
    "transformers": (5, 3),
}


def test_s6_dependencies_have_floors_above_known_holes() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(extras[name] for name in extras if name != "dev")]
    floors = {}
    for text in (text for items in lists for text in items):
        match = re.match(r"([\w-]+)>=([\d.]+)(; .*)?$", text)
        assert match, f"{text} has no floor"
        floors[match[1].lower()] = tuple(map(int, match[2].split(".")))
    for name, least in SAFE.items():
        assert floors[name] >= least, name
    for name in project["dependencies"]:
        installed = metadata.version(re.split(">=", name)[0])
        found = tuple(map(int, re.findall(r"\d+", installed)[:3]))
        assert found >= floors[re.split(">=", name)[0].lower()], name


TEMPLATES = {
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}": "than 0.5 s",
    "{{ 'a' * 10 ** 9 }}": "256 MiB",
    "{% for m in messages %}{{ m.content | center(10 ** 9) }}{% endfor %}": "256 MiB",
    "{% for a in range(90000) %}{{ messages[0].content }}{% endfor %}": "characters of",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{{ 3 ** (10 ** 9) }}": "65536 bits",
    "{% set n = namespace(x=3) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}": (
        "65536 bits"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_s7_a_template_is_bounded(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_fast.data import template_limits
    from sft_fast.data.conversation import Message
    from sft_fast.data.render import ChatRenderer, TemplateContext
    from sft_fast.data.tokenizer import load_tokenizer

    # The one without end need not take two seconds; the others have to get to their own limit.
    monkeypatch.setattr(template_limits, "SECONDS", 0.5 if "0.5 s" in TEMPLATES[template] else 30)
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = template
    renderer = ChatRenderer(tokenizer)
    with pytest.raises(ValueError, match=TEMPLATES[template]):
        renderer._apply([Message("user", "hello"), Message("assistant", "you")], TemplateContext())


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: !!python/object/apply:os.system ['touch harm']", "tag"),
        ("seed: !!python/name:os.system", "tag"),
        (LAUGHS, "alias"),
        ("seed: 1\nseed: 2", "seed"),
        ("a: " + "[" * 200 + "]" * 200, "nested deeper"),
        ("a: " + "x" * 2_000_000, "1 MB"),
        ("seed: ${oc.env:HF_TOKEN}", "seed"),
    ],
)
def test_s8_yaml_runs_and_expands_nothing(tmp_path: Path, text: str, reason: str) -> None:
    from sft_fast.config.schema import load_config

    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_config(path, [])
    assert not (tmp_path / "harm").exists() and not Path("harm").exists()


def test_s9_a_dataset_script_is_not_run(launcher: Launcher, tmp_path: Path) -> None:
    folder = tmp_path / "mydata"
    folder.mkdir()
    (folder / "mydata.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    job = launcher.start("s9", f"data.train={folder}")
    assert job.wait() == [2]
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "", ".", "a\x00b"])
def test_s10_a_manifest_names_files_inside_its_directory_only(tmp_path: Path, name: str) -> None:
    from sft_fast.runtime.manifest import FileRecord, manifest_text

    record = FileRecord(name, 1, "0" * 32)
    (tmp_path / "manifest.json").write_text(manifest_text({name: record}))
    with pytest.raises(ValueError, match="not a plain name"):
        read_manifest(tmp_path)
    assert [damage.file.name for damage in find_damage(tmp_path)] == ["manifest.json"]


def test_s10_links_and_paths_out_of_a_directory_are_refused(tmp_path: Path) -> None:
    from sft_fast.models.weight_files import tensor_records

    with staged_directory(tmp_path / "a", LoneRank()) as stage:
        stage.write_text("b", "c")
    shutil.move(tmp_path / "a/b", tmp_path / "outside")
    (tmp_path / "a/b").symlink_to(tmp_path / "outside")
    assert "no regular file" in str(find_damage(tmp_path / "a")[0])
    index = {"weight_map": {"w": "../outside"}}
    (tmp_path / "a/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map names"):
        tensor_records(tmp_path / "a")


def safetensors_file(path: Path, header: bytes, size: int | None = None) -> None:
    length = size or len(header)
    path.write_bytes(length.to_bytes(8, "little") + header + b"\0" * 64)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (b"{}", 2**63),
        (b"{}", 200_000_000),
        (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}', None),
        (b'{"a": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4000000000]}}', None),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', None),
        (b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 0]}}', 0),
        (b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}', None),
        (b"\xff\xfe", None),
        (b"[" * 100000, None),
    ],
)  # fmt: skip
def test_s11_a_crafted_safetensors_header_is_an_error(
    tmp_path: Path, header: bytes, size: int | None
) -> None:
    from sft_fast.megatron.checkpoint.reading import ShardReader

    with staged_directory(tmp_path / "a", LoneRank()) as stage:
        safetensors_file(stage.path / "rank_00000.safetensors", header, size)
    with pytest.raises(ValueError, match=r"rank_00000.safetensors: expected a whole"):
        ShardReader(tmp_path / "a")


@pytest.fixture(scope="module")
def shards(launcher: Launcher) -> Path:
    return launcher.run("s11", steps=2).output / "checkpoints/step_00000002"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4))
def test_s11_a_header_with_any_bytes_changed_is_read_or_refused(
    shards: Path, changes: list[tuple[int, int]]
) -> None:
    from sft_fast.megatron.checkpoint.reading import ShardReader

    data = bytearray((shards / "rank_00000.safetensors").read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    for place, value in changes:
        data[place % length] = value
    folder = shards.with_name("fuzzed")
    with staged_directory(folder, LoneRank()) as stage:
        (stage.path / "rank_00000.safetensors").write_bytes(data)
    try:
        for saved in ShardReader(folder).shards.values():
            for shard, record in saved:
                assert record.shape == shard.shape
                assert record.start + record.num_bytes <= len(data)
    except ValueError as error:
        assert "rank_00000.safetensors" in str(error)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_s11_model_weights_cut_short_are_named(tmp_path: Path, size: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from sft_fast.models.weight_files import tensor_records

    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((8, 8), np.float32)}, path)
    os.truncate(path, size % path.stat().st_size)
    with pytest.raises(ValueError, match=r"model.safetensors: expected a whole.*download it again"):
        tensor_records(tmp_path)
    path.unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json: expected a weight_map"):
        tensor_records(tmp_path)


SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwx",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-proj-abcdefghijklmnop",
    "MY_PASSWORD": "correct horse battery",
}


def test_s12_no_secret_is_written_anywhere(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "https://user:hunter22@example.org/x"
    hook = "leak:" + ";".join(f"{name}={value}" for name, value in SECRETS.items())
    job = launcher.start("s12", f"tokenizer.chat_template={secret}", hook=hook)
    assert job.wait() == [2]
    good = launcher.start("s12-good", hook=hook, steps=2)
    assert good.wait() == [0]
    texts = [job.said(), good.said()]
    for run in (job.output, good.output):
        texts += [p.read_bytes().decode(errors="replace") for p in run.rglob("*") if p.is_file()]
    for value in (*SECRETS.values(), "hunter22"):
        assert not [text for text in texts if value in text], value


def test_s12_tracebacks_and_error_messages_hold_no_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_fast import train

    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    try:
        raise RuntimeError(f"401 for https://me:pw123@host with {SECRETS['WANDB_API_KEY']}")
    except RuntimeError:
        train.print_traceback()
    said = capsys.readouterr().err
    assert "RuntimeError" in said and "@host" in said
    assert "pw123" not in said and SECRETS["WANDB_API_KEY"] not in said


@pytest.mark.fault("F27")
def test_s13_the_kernel_cache_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        # Set first: what is not there is not restored, and use_private_cache sets it.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    use_private_cache()
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    assert folder.parents[1] == tmp_path / "cache" and str(os.getuid()) in folder.name
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="TRITON_CACHE_DIR.*writable by others"):
        use_private_cache()
    if os.geteuid() == 0:
        folder.chmod(0o700)
        os.chown(folder, 12345, 12345)
        with pytest.raises(ValueError, match="belongs to user 12345"):
            check_private(folder, "TRITON_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR")
    use_private_cache()
    other = Path(os.environ["TRITON_CACHE_DIR"])
    assert other.parent == tmp_path and stat.S_IMODE(other.stat().st_mode) == 0o700
    assert f"warning: compiled kernels go to {other}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be made"):
        check_private(tmp_path / "file" / "x", "TRITON_CACHE_DIR")


@pytest.mark.parametrize(
    ("address", "is_public"),
    [("8.8.8.8", True), ("127.0.0.1", False), ("10.1.2.3", False), ("", False)],
)
def test_s14_a_public_meeting_point_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, address: str, is_public: bool
) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    assert bool(public_address_warning()) == is_public


def test_s14_a_lone_process_listens_to_nobody_outside(launcher: Launcher) -> None:
    record = launcher.folder / "listeners"
    launcher.run("s14", hook=f"record_listeners:{record}", steps=2)
    looked, *addresses = record.read_text().splitlines()
    assert looked == "looked"
    assert all(address in ("127.0.0.1", "::1") for address in addresses), addresses


def test_s15_what_a_failure_says_is_not_for_everyone(launcher: Launcher) -> None:
    job = launcher.start("s15", hook="fail_in_step:1")
    assert job.wait() == [1]
    assert stat.S_IMODE((job.output / "error.json").stat().st_mode) & 0o007 == 0


def test_s16_a_run_talks_to_nobody(launcher: Launcher) -> None:
    record = launcher.folder / "connections"
    launcher.run("s16", hook=f"record_connections:{record}", steps=2)
    assert not record.exists(), record.read_text()


def test_s16_libraries_are_told_not_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_fast import cli, train
    from sft_fast.runtime import telemetry

    for main, arguments in ((train.main, ["--config", "nowhere.yaml"]), (cli.main, ["ls"])):
        for name in telemetry.VARIABLES:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setenv("DO_NOT_TRACK", "0")
        main(arguments)
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert os.environ["DO_NOT_TRACK"] == "0", "the user's own choice stays"


ORDERS = "\x1b]0;title\x07\x1b[2Jgone\rover\x9b2K\u202eback\n\tkept \x1b[31mred"


def test_s18_a_terminal_does_not_obey_what_is_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    from sft_fast.metrics.writer import MetricsWriter
    from sft_fast.runtime.terminal import PrintableStream, as_seen, printable

    shown = "\\x1b]0;title\\x07\\x1b[2Jgone\\rover\\x9b2K\\u202eback\n\tkept "
    assert printable(ORDERS) == shown + "\\x1b[31mred"
    assert "\x1b" not in as_seen(f"error: {ORDERS}", sys.stderr)
    stream = io.StringIO()
    print(ORDERS, end="", file=PrintableStream(stream))
    assert stream.getvalue() == shown + "\x1b[31mred", "colours are our own"
    MetricsWriter(tmp_path, True).log(ORDERS)
    assert "\x1b" not in capsys.readouterr().out


def test_s18_a_column_named_like_an_order_is_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_fast import cli

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"\x1b[2Jmessages": 1}) + "\n")
    assert cli.main(["preview", "demo", f"data.train={rows}"]) != 0
    said = capsys.readouterr()
    assert "\x1b[2J" not in said.out + said.err and "x1b[2Jmessages" in said.out + said.err


@pytest.mark.parametrize("command", ["check", "preview", "plan"])
def test_s19_the_code_of_a_run_directory_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    from sft_fast import cli
    from sft_fast.runtime.run_directory import RUN_MARKER

    (tmp_path / RUN_MARKER).touch()
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": []}) + "\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"output_dir: {tmp_path}\ntokenizer: {{path: demo}}\n"
        f"data: {{train: {rows}, format: {tmp_path / 'theirs.py'}}}\ntrain: {{steps: 1}}\n"
        "packing: {capacity: 64}\n"
        "model: {shape: {hidden_size: 16, num_layers: 1, num_attention_heads: 1, "
        "num_key_value_heads: 1, ffn_hidden_size: 16, max_position_embeddings: 64}}\n"
    )
    assert cli.main([command, str(config)]) != 0
    assert not (tmp_path / "ran").exists()
    assert "say --trust if it may" in capsys.readouterr().err
    assert cli.main([command, str(config), "--trust"]) != 0, "it registers no format"
    assert (tmp_path / "ran").exists()


def test_s19_the_process_of_an_export_may_be_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_fast import registry, train

    plugin = tmp_path / "theirs.py"
    plugin.write_text("raise SystemExit('ran')")
    try:
        assert train.main([f"plugins=[{plugin}]", "--distrust"]) == 2
    finally:
        registry.distrust(None)
    assert "say --trust if it may" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_s20_a_line_without_end_is_bounded(tmp_path: Path, suffix: str) -> None:
    import gzip

    from sft_fast.data import json_records
    from sft_fast.data.source import load_records

    path = tmp_path / f"rows.jsonl{suffix}"
    size = json_records.LONGEST_LINE_BYTES
    good = b'{"text": "good"}\n'
    with gzip.open(path, "wb", 1) if suffix else path.open("wb") as file:
        for length in (size, size + 1, 2 * size + 2, 3 * size):
            file.write(good + b" " * (length - 1) + b"\n")
        file.write(good + b"x" * (2 * size))
    found = list(load_records(str(path)).scan())
    bad = [record for record in found if isinstance(record, json_records.BadRecord)]
    assert [record.line for record in bad] == [4, 6, 8, 10]
    assert all("more than 32 MiB" in record.message for record in bad)
    assert [record.line for record in found if record not in bad] == [1, 3, 5, 7, 9]
