"""The command line, as a user types it."""

import contextlib
import json
import os
import pty
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tilewright as tw
from tilewright.cli import demo, main, session
from tilewright.training import Checkpoint, Log

TINY = ("--layers=1", "--heads=2", "--width=16", "--context=16", "--batch=4", "--lr=1e-2")


def tilewright(*arguments, **environment):
    """Run `python -m tilewright` in a process of its own."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(*arguments, cwd=None, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tilewright", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """The folder of a finished run of 300 steps, never interrupted."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", str(text), "--steps=300", f"--out={out}", *TINY]) == 0
    return out


def assert_same_model(run, other):
    a, b = (tw.load(folder / "model.safetensors") for folder in (run, other))
    assert set(a) == set(b)
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


# The report ---------------------------------------------------------------------------------------


def test_without_a_command_it_reports(capsys):
    assert main([]) == 0
    report = capsys.readouterr().out
    assert tw.__version__ in report
    assert "GPU        not used: this build has no CUDA; to build it: TILEWRIGHT_CUDA=ON" in report
    assert f"threads    {tw.get_num_threads()}: " in report
    for level in tw.isas():
        assert level.name in report
    assert "TILEWRIGHT_NUM_THREADS" in report


def test_the_report_shows_what_the_environment_forces():
    done = tilewright(TILEWRIGHT_ISA="generic", TILEWRIGHT_NUM_THREADS="1")
    assert done.returncode == 0
    assert "generic (active)" in done.stdout
    assert "TILEWRIGHT_NUM_THREADS 1" in done.stdout


def test_an_unknown_command_is_one_clear_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fly"])
    assert "fly" in capsys.readouterr().err.splitlines()[-1]


# Training -----------------------------------------------------------------------------------------


def test_training_leaves_a_model_a_checkpoint_a_log_and_a_plot(trained):
    assert Checkpoint(trained / "checkpoint.safetensors").step == 300
    log = Log(trained / "log.jsonl")
    steps, validation = log.entries("step"), log.entries("validation")
    assert [e["step"] for e in steps] == list(range(1, 301))
    assert steps[-1]["loss"] < 2 < steps[0]["loss"]
    assert len(validation) == 21
    assert validation[-1]["bits_per_byte"] < 2
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_saves_and_resume_ends_with_the_same_bits(trained, text, tmp_path):
    out = tmp_path / "run"
    process = start("train", text, "--steps=300", "--out", out, *TINY)
    wait_for_step(process, out, 20)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    stopped = Checkpoint(out / "checkpoint.safetensors").step
    assert 20 <= stopped < 300
    assert f"stopped at step {stopped} and saved" in printed
    assert "Traceback" not in errors

    assert main(["train", "--resume", f"--out={out}"]) == 0
    assert_same_model(out, trained)
    assert [e["step"] for e in Log(out / "log.jsonl").entries("step")] == list(range(1, 301))


def test_the_printed_command_resumes_files_that_were_named_relatively(trained, text, tmp_path):
    (tmp_path / "fox.txt").write_bytes(text.read_bytes())
    words = ("train", "fox.txt", "--steps=300", "--out=my run", *TINY)
    process = start(*words, cwd=tmp_path)
    wait_for_step(process, tmp_path / "my run", 20)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    command = shlex.split(re.search(r"continue with: tilewright (.*)", printed)[1])
    done = tilewright(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_model(tmp_path / "my run", trained)


def test_the_same_text_resumes_under_another_name(trained, text, tmp_path):
    out, moved = tmp_path / "run", tmp_path / "moved.txt"
    out.mkdir()
    moved.write_bytes(text.read_bytes())
    for name in ("checkpoint.safetensors", "log.jsonl"):
        (out / name).write_bytes((trained / name).read_bytes())
    assert main(["train", str(moved), "--resume", f"--out={out}", "--steps=301"]) == 0


def test_ctrl_c_during_the_final_save_loses_nothing(text, tmp_path, capfd, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    left = out / ".model.safetensors.0123456789ab.tmp"  # by a run that was killed
    left.touch()
    save = session.save_checkpoint

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        save(*arguments)

    monkeypatch.setattr(session, "save_checkpoint", interrupted)
    assert main(["train", str(text), "--steps=20", f"--out={out}", *TINY]) == 130
    assert Checkpoint(out / "checkpoint.safetensors").step == 20
    assert tw.models.load(out / "model.safetensors")
    assert not left.exists()
    assert "stopped after the last step, 20, and saved" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_kill_at_any_moment_of_saving_loses_no_checkpoint(trained, text, tmp_path):
    out = tmp_path / "run"
    path = out / "checkpoint.safetensors"
    command = ("train", text, "--steps=300", "--out", out, "--checkpoint-every=1", *TINY)
    moment = random.Random(0)
    reached = 0
    for _ in range(5):
        process = start(*command)
        wait_for_step(process, out, reached + 2)  # with one checkpoint at least
        time.sleep(moment.uniform(0, 0.05))
        process.kill()
        process.communicate()
        step = Checkpoint(path).step  # whole, whatever was going on
        assert step > reached
        reached = step
        command = ("train", "--resume", "--out", out, "--checkpoint-every=1")
    assert main(["train", "--resume", f"--out={out}"]) == 0
    assert_same_model(out, trained)
    assert not list(out.glob(".*"))  # what the killed ones left is gone


def wait_for_step(process, out, step):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        entries = Log(out / "log.jsonl").entries("step")
        if entries and entries[-1]["step"] >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"no step {step} within a minute")


def test_a_finished_run_is_extended_by_more_steps(trained, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("checkpoint.safetensors", "log.jsonl"):
        (out / name).write_bytes((trained / name).read_bytes())
    assert main(["train", "--resume", f"--out={out}"]) == 2
    assert "finished after 300 steps" in capsys.readouterr().err
    assert main(["train", "--resume", f"--out={out}", "--steps=310"]) == 0
    assert Checkpoint(out / "checkpoint.safetensors").step == 310


def test_on_a_terminal_a_bar_shows_loss_speed_and_time_left(text, tmp_path):
    terminal, end = pty.openpty()
    words = ["train", text, "--steps=40", f"--out={tmp_path}", *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "tilewright", *map(str, words)],
        stdout=end,
        stderr=end,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal of a process that ended
        while block := os.read(terminal, 4096):
            shown += block
    assert process.wait(timeout=60) == 0
    os.close(terminal)
    for word in ("100%", "bits/byte", "tokens/s", "left"):
        assert word in shown.decode()


def test_without_matplotlib_the_missing_line_is_named(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["train", str(text), "--steps=2", f"--out={tmp_path}", *TINY]) == 0
    assert "python -m pip install 'tilewright[fit]'" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


# Generation and int8 ------------------------------------------------------------------------------


def test_generate_continues_the_prompt_the_same_way_each_time(trained, capsys):
    command = ["generate", str(trained), "--prompt=the qui", "--tokens=24", "--temperature=0"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("the quick brown")
    assert main(command) == 0
    assert capsys.readouterr().out == first


def test_generate_samples_by_seed(trained, capsys):
    texts = []
    for seed in (1, 1, 2):
        options = ["--tokens=30", "--temperature=2", "--top-k=20", "--top-p=0.99", f"--seed={seed}"]
        assert main(["generate", str(trained / "model.safetensors"), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_into_a_closed_pipe_ends_quietly(trained):
    process = start("generate", trained, "--tokens=2000", "--temperature=1")
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == ""


def test_quantize_writes_a_smaller_model_that_generates(trained, text, tmp_path, capsys):
    out = tmp_path / "int8.safetensors"
    assert main(["quantize", str(trained), f"--out={out}", f"--text={text}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    bits = [float(line.split()[3]) for line in lines if line.startswith(("float32", "int8"))]
    assert bits[1] == pytest.approx(bits[0], abs=0.1)
    assert out.stat().st_size < (trained / "model.safetensors").stat().st_size
    assert main(["generate", str(out), "--prompt=the qui", "--tokens=8", "--temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("the quick brown")


def test_quantize_to_four_bits(trained, tmp_path, capsys):
    out = tmp_path / "int4.safetensors"
    command = ["quantize", str(trained), "--bits=4", "--group-size=16", f"--out={out}"]
    assert main(command) == 0
    assert any(line.startswith("int4 ") for line in capsys.readouterr().out.splitlines())
    assert tw.models.load(out).quantized == {"bits": 4, "group_size": 16, "symmetric": True}


# The demo -----------------------------------------------------------------------------------------


def test_the_demo_does_its_whole_job(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_MODEL", {"layers": 1, "heads": 2, "width": 32, "context": 32})
    monkeypatch.setattr(demo, "_HELD_OUT", 1 << 13)
    assert main(["demo", "--steps=40", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    names = {"model.safetensors", "model-int8.safetensors", "loss.png", "sample.txt", "log.jsonl"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert 2 < report["float32"]["bits_per_byte"] < 8
    assert report["int8"]["bits_per_byte"] == pytest.approx(
        report["float32"]["bits_per_byte"], abs=0.1
    )
    assert report["int8"]["bytes"] < report["float32"]["bytes"]
    assert report["training"]["steps"] == 40
    for name, bits in report["baselines"].items():
        assert re.search(rf"^  {name} +{bits:.3f} ", printed, re.MULTILINE)
    assert re.search("does not beat|beats none", printed)  # 40 steps of a tiny model: said
    assert (tmp_path / "sample.txt").read_text().startswith(demo._SAMPLE_PROMPT)


def test_the_demo_overwrites_its_own_folder_and_no_other(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_MODEL", {"layers": 1, "heads": 2, "width": 32, "context": 32})
    monkeypatch.setattr(demo, "_HELD_OUT", 1 << 10)
    before = {path: path.read_bytes() for path in trained.iterdir()}
    assert main(["demo", "--steps=1", f"--out={trained}"]) == 2
    assert "holds checkpoint.safetensors, which is of no demo" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in trained.iterdir()} == before
    (tmp_path / "log.jsonl").write_bytes(b'{"kind": "demo"}\n[1]\n\xff\n' + b"[" * 10**5 + b"\n")
    assert main(["demo", "--steps=1", f"--out={tmp_path}"]) == 2
    assert "holds log.jsonl" in capsys.readouterr().err
    for _ in range(2):
        assert main(["demo", "--steps=1", f"--out={tmp_path / 'new'}"]) == 0


def test_a_folder_of_a_run_that_saved_nothing_starts_anew(trained, text, tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for kind in ("demo", "validation"):
        log.write(kind, 0, bits_per_byte=8.0, bytes=0)
    assert main(["train", str(text), "--steps=2", f"--out={tmp_path}", *TINY]) == 0
    kinds = [entry["kind"] for entry in log.entries() if entry["step"] == 0]
    assert kinds == ["validation"]


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "at least one FILE"),
        ("train {tmp}/missing.txt", "missing.txt: No such file"),
        ("train {tmp}", "Is a directory"),
        ("train {tmp}/empty.txt", "empty.txt: empty"),
        ("train {tmp}/short.txt", "at least 256 bytes"),
        ("train {text} --steps 0", "--steps must be above zero"),
        ("train {text} --minutes -1", "--minutes must be above zero"),
        ("train {text} --batch 0", "batch must be above zero"),
        ("train {text} --width 30 --heads 4", "width"),
        ("train {text} --checkpoint-every 0", "--checkpoint-every must be at least 1"),
        ("train {text} --out {run}", "already holds a run"),
        ("train --resume --out {tmp}", "nothing to resume"),
        ("train --resume --out {run} --width 8", "takes --width from the checkpoint"),
        ("train {tmp}/other.txt --resume --out {run} --steps 999", "not the one this run"),
        ("generate {tmp}/missing", "No such file"),
        ("generate {tmp}", "model.safetensors: No such file"),
        ("generate {text}", "fox.txt"),
        ("generate {tmp}/cut.safetensors", "cut.safetensors"),
        ("generate {run} --tokens 0", "--tokens must be at least 1"),
        ("quantize {text}", "fox.txt"),
        ("quantize {run} --out {tmp}/no/folder.safetensors", "No such file"),
        ("quantize {run} --text {tmp}/missing.txt", "missing.txt: No such file"),
        ("quantize {run} --group-size 0", "--group-size must be at least 1, got 0"),
        ("quantize {run} --bits 4 --group-size -3", "--group-size must be at least 1, got -3"),
        ("quantize {run} --text {tmp}/empty.txt --out {tmp}/q", "empty.txt: empty"),
        ("quantize {tmp}/int8.safetensors --out {tmp}/q", "int8.safetensors: quantized already"),
        ("quantize {tmp}/contradicted.safetensors", "position.weight must have shape (99, 16)"),
        ("generate {tmp}/contradicted.safetensors", "position.weight must have shape (99, 16)"),
        ("generate {tmp}/odd.safetensors", "blocks.0.up.bias must be float32, got int64"),
        ("train --resume --out {tmp}/other", "token.weight must have shape (256, 16)"),
        ("train --resume --out {tmp}/foreign", "unexpected: blocks.0.more"),
        ("train --resume --out {tmp}/lost", "corpus must have files and fingerprint"),
        ("train --resume --out {tmp}/demo", "names no files"),
        ("train {text} --seed -1", "seed must be"),
        ("demo --seed -1 --out {tmp}", "seed must be"),
        ("demo --seconds 0 --out {tmp}", "above zero"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    arguments, message, trained, text, tmp_path, capsys
):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "other.txt").write_text("another text " * 100)
    model = (trained / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(model[: len(model) // 2])
    write_other_files(trained, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = arguments.format(tmp=tmp_path, run=trained, text=text).split()
    if words[0] == "train" and "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tilewright: error: ")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-made is left


def write_other_files(run, folder):
    """Models and checkpoints that are whole files, but not what is asked for."""
    model, checkpoint = run / "model.safetensors", run / "checkpoint.safetensors"
    tensors, metadata = tw.load(model), tw.load_metadata(model)
    tw.models.load(model).quantize().save(folder / "int8.safetensors")
    config = json.loads(metadata["config"]) | {"context": 99}
    contradicted = metadata | {"config": json.dumps(config)}
    tw.save(tensors, folder / "contradicted.safetensors", contradicted)
    odd = tensors | {"blocks.0.up.bias": np.zeros(64, np.int64)}
    tw.save(odd, folder / "odd.safetensors", metadata)

    whole, state = tw.load(checkpoint), json.loads(tw.load_metadata(checkpoint)["run"])
    for name, more, change in [
        ("other", {"model/token.weight": np.zeros((256, 8), np.float32)}, {}),
        ("foreign", {"model/blocks.0.more": np.zeros(1, np.float32)}, {}),
        ("lost", {}, {"corpus": {"fingerprint": "0"}}),
        ("demo", {}, {"corpus": {"files": [], "fingerprint": "0"}}),
    ]:
        (folder / name).mkdir()
        metadata = {"run": json.dumps(state | change)}
        tw.save(whole | more, folder / name / checkpoint.name, metadata)


def test_a_wrong_isa_level_is_named_without_a_traceback():
    done = tilewright(TILEWRIGHT_ISA="mmx")
    assert done.returncode == 2
    assert "mmx" in done.stderr
    assert "Traceback" not in done.stderr
