"""What commands print on: a terminal that obeys control characters, ASCII, a pipe nobody reads."""

import csv
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from running import ROOT, arguments, assert_close
from tqdm import tqdm

from catversion_jax.cli import main
from catversion_jax.cli.terminal import SafeStream, printable
from catversion_jax.runtime.atomic_files import write_atomically
from catversion_jax.runtime.spreadsheet_cells import harmless_cell, plain_cell
from catversion_jax.training.run.index import Index, read_index

COMMAND = "import sys; from catversion_jax.cli import main; sys.exit(main(sys.argv[1:]))"
EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\r\x9b31m\udcff"


def test_nothing_that_a_terminal_obeys_is_shown() -> None:
    shown = printable(EVIL)
    assert shown.isprintable()
    assert json.loads(f'"{shown}"') == EVIL  # the escapes of JSON
    assert printable("naïve 東京 🎈 tab\there\nnext") == "naïve 東京 🎈 tab\there\nnext"


def test_escapes_for_an_encoding_that_lacks_a_character() -> None:
    assert json.loads(f'"{printable("é 東 🎈", "ascii")}"') == "é 東 🎈"
    assert printable("é 東", "latin-1") == "é \\u6771"


def test_progress_bars_pass_as_they_are() -> None:
    plain, safe = io.StringIO(), io.StringIO()
    for file in (plain, SafeStream(safe)):
        with (
            tqdm(total=2, file=file, ascii=True, bar_format="{desc} {n}", desc="outer") as outer,
            tqdm(total=2, file=file, ascii=True, bar_format="{desc} {n}", desc="inner") as inner,
        ):
            inner.update(2)
            outer.update(1)
    assert safe.getvalue() == plain.getvalue()
    assert "\x1b[A" in plain.getvalue()


@pytest.mark.parametrize("closed", [None, "stream"])
def test_a_closed_stream_takes_everything(closed: str | None) -> None:
    inner = None
    if closed:
        inner = io.StringIO()
        inner.close()
    stream = SafeStream(inner)
    assert stream.write("lost\n") == 5
    stream.flush()
    stream.close()  # as loggers do at exit with what they took
    assert not stream.isatty()
    assert stream.failure is None


def run_command(*args: object, shell: str = "", **variables: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, in a shell that may redirect its streams."""
    line = f'"{sys.executable}" -c "$PROGRAM" {" ".join(map(str, args))} {shell}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PROGRAM": COMMAND, **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose concepts have names and reasons of all kinds."""
    (tmp_path / "out").mkdir()
    index = Index(tmp_path / "out" / "index.csv")
    reason = f"{EVIL} 東京 " + "very long " * 50
    for i in range(3000):
        index.set({"name": f"naïve{i}", "state": "quarantined", "reason": reason})
    index.write()
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("| head -1", 0),
        (">&-", 0),
        ("2>&-", 0),
        (">&- 2>&-", 0),
        ("> /dev/full", 2),
    ],
)
def test_where_nobody_reads(run_folder: Path, shell: str, code: int) -> None:
    done = run_command("status", run_folder, shell=shell, PYTHONIOENCODING="ascii")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if shell == "> /dev/full":
        assert "standard output: cannot be written (No space left on device)" in done.stderr


@pytest.mark.slow
def test_training_goes_on_where_nobody_reads(finished: Path, toys, one_block_sd_folder, tmp_path):
    """``train | head -1``: what is left of a run is trained all the same."""
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "checkpoints")
    (file,) = output.glob("concepts/teal_cup/catversion.safetensors")
    file.unlink()
    told = {"validation_steps": 12, "validation_inference_steps": 2, "num_validation_images": 1}
    told["report_to"] = "tensorboard"
    given = arguments(one_block_sd_folder, toys, output, **told)
    done = run_command("train", *given, shell="| head -1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert_close(output, finished)


def test_status_shows_what_it_was_told_harmlessly(run_folder: Path, capsys) -> None:
    assert main(["status", str(run_folder)]) == 0
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.splitlines())
    assert "\\u001b]0;owned" in text
    assert "naïve0" in text


# ---- Ctrl-C


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("status nowhere", signal.SIGINT, 130),
        ("status nowhere", signal.SIGTERM, -signal.SIGTERM),  # as the system has it
        ("train", signal.SIGTERM, 75),
        ("teach nowhere --base_class cup", signal.SIGTERM, 75),
        ("serve", signal.SIGTERM, 0),
    ],
)
def test_a_signal_while_modules_are_imported_ends_the_process(
    tmp_path: Path, command: str, number: signal.Signals, code: int
) -> None:
    """Even if a module that is being imported swallows everything, as some of JAX's may."""
    (tmp_path / "stubborn.py").write_text(
        "import time\n"
        "print('importing', flush=True)\n"
        "for _ in range(100):\n"
        "    try:\n"
        "        time.sleep(0.1)\n"
        "    except BaseException:\n"
        "        print('swallowed', flush=True)\n"
    )
    program = (
        "import sys\n"
        f"import catversion_jax.cli.{command.split()[0]} as command\n"
        "command.run = lambda args: __import__('stubborn') and 0\n" + COMMAND
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command.split()],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell lets what runs in its background ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "importing\n"
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert process.returncode == code
    assert "swallowed" not in out
    if code >= 0:
        assert "interrupted; finished files are kept. Run the same command again" in err
    assert "Traceback" not in err


def test_the_command_gives_ctrl_c_back(capsys) -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGINT) is before


# ---- files


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_are_for_those_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "new", b"x")
        (tmp_path / "usual").write_bytes(b"x")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "usual")}
    assert modes == {0o666 & ~umask}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "usual"]


@pytest.mark.parametrize(
    "text",
    [
        '=HYPERLINK("http://x")', "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "'=1",
        "''", "'tis", "plain", "", "a=b", "'", '"', "naïve, with\nlines",
    ],
)  # fmt: skip
def test_spreadsheets_run_no_cell_and_we_read_it_back(tmp_path: Path, text: str) -> None:
    cell = harmless_cell(text)
    assert cell[:1] not in {*"=+-@\t\r\uff1d\uff0b\uff0d\uff20"}
    assert plain_cell(cell) == text
    if not text or "\r" in text:  # no name and no line of a reason has one
        return
    index = Index(tmp_path / "index.csv")
    index.set({"name": text, "state": "queued", "reason": text})
    index.write()
    assert [(row["name"], row["reason"]) for row in read_index(tmp_path / "index.csv")] == [
        (text, text)
    ]
    with (tmp_path / "index.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["name"] == cell


def test_a_locale_that_is_not_utf_8_is_named(capsys, monkeypatch) -> None:
    assert main(["--version"]) == 0
    assert "PYTHONUTF8" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert main(["--version"]) == 0
    assert "names of files as ascii. Set PYTHONUTF8=1" in capsys.readouterr().err


def test_a_platform_that_is_not_here_is_named(toys: Path, tmp_path: Path) -> None:
    """``JAX_PLATFORMS=tpu`` in a shell that was set up for another machine."""
    command = ["fit-start", toys, "--out", tmp_path / "start.safetensors"]
    ended = run_command(*command, JAX_PLATFORMS="nowhere")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: JAX_PLATFORMS=nowhere: Unable to initialize backend")
    assert "unset the variable" in ended.stderr
