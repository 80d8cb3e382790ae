"""The bench measures what it says: right answers only, comparisons that tell noise from change."""

import hashlib
import json
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tilewright
from tilewright import runtime
from tilewright.bench import (
    cases,
    engines,
    measure,
    oracle,
    overhead,
    roofline,
    run,
    table,
    targets,
)
from tilewright.bench.cases import registered
from tilewright.bench.ort import Ort
from tilewright.bench.peers import NO_PEERS, Peers, under
from tilewright.registry import OPS, Op

ROOT = Path(__file__).resolve().parents[1]
ROOF = roofline.Roofline(1e11, 0.0, 1e11, (roofline.Level("DRAM", float("inf"), 1e10),))


# Rows that are a way to use an op.
BESIDES = {"linear", "linear_gelu", "decode", "weight_only", "add_layernorm", "adamw"}


def options(*arguments):
    return run.parser().parse_args(["--rounds", "2", "--threads", "1", *arguments])


def plan(call, want):
    case = cases.Case(
        "matmul", "planted", {"tilewright": call}, lambda: [want], cases.Cost(1e3, 1e3)
    )
    return cases.Plan("matmul", "planted", lambda peers: case)


def test_quick_run_writes_every_op(tmp_path, capfd):
    file = tmp_path / "bench.json"
    level = runtime.isas()[0].name
    status = run.main(
        ["--quick", "--rounds", "1", "--isa", level, "--threads", "1", "--json", str(file)]
    )
    printed = capfd.readouterr().out
    assert status == 0, printed
    results = json.loads(file.read_text())
    assert results["schema"] == run.SCHEMA
    assert results["machine"]["cpu"]
    (only,) = results["runs"]
    assert (only["isa"], only["threads"]) == (level, 1)
    assert {row["op"].split("+")[0] for row in only["rows"]} - BESIDES == set(OPS)
    for row in only["rows"]:
        assert 0 < row["engines"]["tilewright"]["min"] <= row["engines"]["tilewright"]["median"]
        assert row["gbs"] > 0
        assert row["bound"] in ("fma", "int8", "L1", "L2", "L3", "far", "DRAM")
        assert f"{row['op']:18} {row['shape']:25}" in printed
    assert only["overhead"]["calls"]["matmul 4x4"]["us"] > 0


def test_every_op_has_a_row_and_a_tiny_call():
    benched = {p.op.split("+")[0] for p in cases.plans() if cases.exists(p)}
    assert benched - BESIDES == set(OPS)
    assert {name.split()[0] for name in overhead.tiny_calls()} == set(OPS)
    assert all(p.op in OPS for p in registered.plans(()))


def test_a_new_op_needs_no_line_in_the_bench(monkeypatch):
    made = Op(OPS["relu"].definition, ("x",))
    made.name = "newcomer"
    monkeypatch.setitem(OPS, made.name, made)
    (row,) = (p for p in cases.plans() if p.op == made.name)
    assert row.shape == "64,65;sliced"
    found = run.bench(row, NO_PEERS, ROOF, options(), 1)
    assert "error" not in found
    assert found["gbs"] > 0
    monkeypatch.setattr(made, "reference", lambda x: OPS["relu"].reference(x + 0.01))
    assert "WRONG ANSWER" in run.bench(row, NO_PEERS, ROOF, options(), 1)["error"]
    monkeypatch.setattr(made.definition, "bench", ("3, 5", "2,9"), raising=False)
    assert [p.shape for p in cases.plans() if p.op == made.name] == ["3,5", "2,9"]


def test_oracle_gradients_of_rows_follow_differences():
    rng = np.random.default_rng(0)
    x, y, dy, gamma = (
        rng.standard_normal((2, 5)),
        rng.standard_normal((2, 5)),
        rng.standard_normal((2, 5)),
        rng.standard_normal(5),
    )
    step = np.zeros_like(x)
    step[1, 3] = 1e-6
    up, down = (oracle.rmsnorm(x + s, gamma) for s in (step, -step))
    assert np.isclose(((up - down) * dy).sum() / 2e-6, oracle.rmsnorm_grad(x, gamma, dy)[1][1, 3])
    up, down = (oracle.rmsnorm(x, gamma + s) for s in (step[1], -step[1]))
    assert np.isclose(((up - down) * dy).sum() / 2e-6, oracle.rmsnorm_grad(x, gamma, dy)[2][3])
    up, down = (np.mean((x + s - y) ** 2) for s in (step, -step))
    assert np.isclose((up - down) / 2e-6, oracle.mse_grad(x, y)[1][1, 3])


def test_right_answer_is_timed():
    row = run.bench(plan(lambda: np.ones(3, np.float32), np.ones(3)), NO_PEERS, ROOF, options(), 1)
    assert "error" not in row
    assert row["engines"]["tilewright"]["rounds"] == 2


@pytest.mark.parametrize("wrong", [1.001, np.nan], ids=["off by 0.1 %", "NaN"])
def test_wrong_answer_gets_no_number(wrong):
    answer = np.array([1, wrong, 1], np.float32)
    row = run.bench(plan(lambda: answer, np.ones(3)), NO_PEERS, ROOF, options(), 1)
    assert row["engines"] == {}
    assert "gflops" not in row
    line = table.line(row, {"isa": "generic", "threads": 1})
    assert "WRONG ANSWER: tilewright: output 0 at (1,)" in line


def test_a_case_that_raises_leaves_a_row():
    def call():
        raise RuntimeError("planted")

    row = run.bench(plan(call, np.ones(3)), NO_PEERS, ROOF, options(), 1)
    assert row["engines"] == {}
    assert row["error"] == "RuntimeError: tilewright: planted"


def test_a_wrong_peer_loses_its_column_only():
    case = plan(lambda: np.ones(3, np.float32), np.ones(3)).build(None)
    case.calls = {**case.calls, "numpy": lambda: np.zeros(3, np.float32)}
    row = run.bench(cases.Plan("matmul", "x", lambda peers: case), NO_PEERS, ROOF, options(), 1)
    assert set(row["engines"]) == {"tilewright"}
    assert "numpy" in row["numpy_error"]


def test_integers_must_be_equal():
    with pytest.raises(oracle.WrongAnswer, match="is 1000001, expected 1000000"):
        oracle.check("x", [np.array([1_000_001])], [np.array([1_000_000])])


def test_oracle_gradients_follow_differences():
    rng = np.random.default_rng(0)
    q, k, v, do = rng.standard_normal((4, 1, 1, 3, 2))
    _, dq, _, _ = oracle.attention(q, k, v, True, do)
    step = np.zeros_like(q)
    step[0, 0, 2, 1] = 1e-6
    up, down = (oracle.attention(q + s, k, v, True)[0] for s in (step, -step))
    assert np.isclose(((up - down) * do).sum() / 2e-6, dq[0, 0, 2, 1])
    x, dy, gamma, beta = (
        rng.standard_normal((2, 5)),
        rng.standard_normal((2, 5)),
        *rng.standard_normal((2, 5)),
    )
    _, dx, _, _ = oracle.layernorm(x, gamma, beta, dy)
    step = np.zeros_like(x)
    step[1, 3] = 1e-6
    up, down = (oracle.layernorm(x + s, gamma, beta)[0] for s in (step, -step))
    assert np.isclose(((up - down) * dy).sum() / 2e-6, dx[1, 3])


def test_interleave_calls_everybody_equally(monkeypatch):
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.0)
    counts = {"a": 0, "b": 0}

    def call(name):
        counts[name] += 1

    flush = {"n": 0}
    timings = measure.interleave(
        {name: lambda name=name: call(name) for name in counts},
        rounds=3,
        quiet=False,
        flush=lambda: flush.update(n=flush["n"] + 1),
    )
    assert counts == {"a": 10, "b": 10}  # 4 to see how long they take, then warm-up and sample
    assert flush["n"] == 6
    assert timings["a"].rounds == 3


def test_wait_until_quiet_outlasts_a_thread_that_computes():
    """As the workers of other libraries do after a call."""
    hashed, over = threading.Event(), threading.Event()

    def compute():
        hashlib.sha512(bytes(50_000_000))  # without the GIL
        hashed.set()
        over.wait()

    thread = threading.Thread(target=compute)
    thread.start()
    clock = time.pthread_getcpuclockid(thread.ident)
    measure.wait_until_quiet()
    quiet = time.clock_gettime(clock)
    hashed.wait()
    total = time.clock_gettime(clock)
    over.set()
    thread.join()
    assert quiet > 0.9 * total


def test_interleave_calls_an_engine_slower_than_the_budget_once(monkeypatch):
    seconds = {"ours": 1e-3, "slow": 2.0}
    counts = dict.fromkeys(seconds, 0)

    def named(name):
        def call():
            counts[name] += 1

        call.seconds = seconds[name]
        return call

    monkeypatch.setattr(measure, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(measure, "_first", lambda call: call.seconds)
    monkeypatch.setattr(measure, "_repeats", lambda _: 1)
    calls = {name: named(name) for name in seconds}
    timings = measure.interleave(calls, rounds=3, budget=1.0, quiet=False)
    assert counts == {"ours": 6, "slow": 0}  # beside the first call, which is replaced here
    assert timings["slow"] == (2.0, 2.0, 0.0, 1)
    assert timings["ours"].rounds == 3


def test_limit_names_what_binds():
    memory = (roofline.Level("L2", 1e6, 1e11), roofline.Level("DRAM", float("inf"), 1e10))
    roof = roofline.Roofline(1e11, 0.0, 2e11, memory)
    assert roof.limit(1e9, 10) == (1e-2, "fma")
    assert roof.limit(1e9, 10, "int8") == (5e-3, "int8")
    assert roof.limit(1e9, 10, "bfloat16") == (1e-2, "fma")
    assert roof.limit(1, 1e5) == (1e-6, "L2")
    assert roof.limit(1, 1e8) == (1e-2, "DRAM")
    units = roof._replace(bf16=12e11)  # matrix units: of bfloat16, and float32 by six products
    assert units.limit(1e9, 10, "bfloat16") == (1e9 / 12e11, "bf16")
    assert units.limit(1e9, 10) == (5e-3, "terms")


def test_measured_roof_is_plausible():
    roof = roofline.measure(0.01)
    assert roof.fma > 1e8
    assert roof.int8 > 1e8
    assert [level.name for level in roof.memory] == ["L1", "L2", "L3", "far", "DRAM"]
    assert all(min(m.read, m.copy, m.streaming) > 1e6 for m in roof.memory)
    assert roof.units[-1] == (runtime.active_isa(), roof.fma, roof.bf16, roof.int8)


def test_peers_are_held_and_freed():
    env = engines.child_environment("avx2", 3, {"OPENBLAS_CORETYPE": "Prescott", "HOME": "/x"})
    assert env["OPENBLAS_CORETYPE"] == "Haswell"
    assert env["ATEN_CPU_CAPABILITY"] == "avx2"
    assert env["OMP_NUM_THREADS"] == "3"
    env = engines.child_environment("avx512", 1, {"OPENBLAS_CORETYPE": "Prescott", "HOME": "/x"})
    assert env["OPENBLAS_CORETYPE"] == "SkylakeX"
    assert env["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"  # no VNNI, no matrix units
    env = engines.child_environment("amx", 1, {"OPENBLAS_CORETYPE": "Prescott", "HOME": "/x"})
    assert "OPENBLAS_CORETYPE" not in env
    assert env["HOME"] == "/x"


def test_oracle_of_the_optimizer_and_activations_follows_its_definition():
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 2, 5))
    for forward, gradient in (
        (oracle.gelu, oracle.gelu_grad),
        (oracle.softmax, oracle.softmax_grad),
    ):
        step = np.zeros_like(x)
        step[1, 3] = 1e-6
        slope = ((forward(x + step) - forward(x - step)) * dy).sum() / 2e-6
        assert np.isclose(slope, gradient(x, dy)[1][1, 3])
    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.5}
    m, v = 0.1 * dy / (1 - 0.9), 0.05 * dy**2 / (1 - 0.95)  # both means start at zero
    want = x - 0.1 * 0.5 * x - 0.1 * m / (np.sqrt(v) + 1e-8)
    assert np.allclose(oracle.adamw_first_step(x, dy, **options), want, rtol=1e-12)


def result(seconds, spread=0.02):
    timing = {"min": seconds, "median": seconds * (1 + spread), "spread": spread, "rounds": 20}
    row = {"op": "matmul", "shape": "8", "dtype": "float32", "engines": {"tilewright": timing}}
    return {"runs": [{"isa": "avx2", "threads": 1, "rows": [row]}]}


@pytest.mark.parametrize(
    ("before", "after", "spread", "status", "word"),
    [
        (1.0, 2.0, 0.02, 1, "slower"),
        (2.0, 1.0, 0.02, 0, "faster"),
        (1.0, 1.03, 0.02, 0, "same"),
        (1.0, 1.3, 0.5, 0, "same"),
    ],
    ids=["twice as slow", "twice as fast", "within 5 %", "within the noise"],
)
def test_compare_tells_change_from_noise(tmp_path, before, after, spread, status, word):
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for file, seconds in zip(files, (before, after), strict=True):
        file.write_text(json.dumps(result(seconds, spread)))
    command = [sys.executable, str(ROOT / "bench" / "compare.py"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert word in done.stdout.splitlines()[1]


def test_compare_needs_a_common_case(tmp_path, capsys):
    for name, rows in (("a", result(1.0)), ("b", {"runs": []})):
        (tmp_path / name).write_text(json.dumps(rows))
    compare = runpy.run_path(str(ROOT / "bench" / "compare.py"))
    assert compare["main"]([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "no case" in capsys.readouterr().out


def test_readme_block_is_replaced(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    table.replace_block(file, "new")
    assert file.read_text() == "before\n<!-- bench -->\n\nnew\n\n<!-- /bench -->\nafter\n"
    file.write_text("no block")
    table.replace_block(file, "new")
    assert file.read_text() == "no block"


def a_run(rows=(), isa="amx", threads=1):
    """As a child writes it."""
    level = {"size": 1e6, "gbs": 50.0, "read_gbs": 50.0, "copy_gbs": 40.0, "streaming_gbs": 9.0}
    roof = {"gflops": 600.0, "bf16_gflops": 3000.0, "int8_gops": 6000.0, "memory": {"L2": level}}
    return {"isa": isa, "threads": threads, "rows": list(rows), "roofline": roof, "engines": {}}


def a_row(target, ratios, shape="8", roof=0.5, traffic=0.1):
    timing = {"min": 1.0}
    return {
        "op": "matmul", "shape": shape, "dtype": "float32", "targets": [target], "ratios": ratios,
        "engines": {"tilewright": timing}, "gflops": 90.0, "gbs": 3.0, "roof": roof,
        "roof_traffic": traffic, "bound": "fma", "arithmetic": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    from tilewright.bench import plot

    rows = [a_row(targets.MATMUL, {"numpy": 1.1, "f32": 9.0}), a_row(targets.MATMUL, {})]
    rows.append({"op": "x", "shape": "1", "error": "planted"})
    file = tmp_path / f"bench.{suffix}"
    plot.draw({"runs": [a_run(rows)]}, file)
    start = file.read_bytes()[:64]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in start
    plot.draw({"runs": [a_run()]}, file)


def test_targets_are_judged_by_the_best_peer_and_the_worst_case():
    rows = [
        a_row(targets.MATMUL, {"numpy": 2.0, "torch": 1.8, "f32": 0.1}, "large"),
        a_row(targets.MATMUL, {"numpy": 1.7, "torch": 3.0}, "small"),
        a_row(targets.MATMUL, {}, "alone"),  # no peer, no ratio
        a_row(targets.MATMUL, {"numpy": 0.1}, "broken") | {"error": "planted"},
    ]
    (found,) = targets.reached(a_run(rows))
    assert (found.cases, found.worst, found.where) == (2, 1.7, "matmul small")
    assert np.isclose(found.mean, np.sqrt(1.8 * 1.7))
    assert found.met
    assert "met " in targets.table(a_run(rows))
    assert "no answer: matmul broken: planted" in targets.table(a_run(rows))
    rows[0]["ratios"]["torch"] = 9.0
    rows[1]["ratios"]["numpy"] = 0.94  # the mean is above the goal still, a case is behind
    rows[0]["ratios"]["numpy"] = 9.0
    (found,) = targets.reached(a_run(rows))
    assert found.mean > found.goal
    assert not found.met
    assert targets.best_peer(rows[1]) == "numpy"


def test_targets_of_shares():
    row = a_row(targets.BF16_ROOF, {}, roof=0.44)
    assert not targets.reached(a_run([row]))[0].met
    assert targets.reached(a_run([row | {"roof": 0.46}]))[0].met
    assert not targets.reached(a_run([row], isa="avx512"))  # a goal of matrix units
    few = a_row(targets.FEW_ROWS_DEFAULT, {"f32": 1.9})
    assert targets.reached(a_run([few]))[0].met
    few["ratios"]["f32"] = 2.1  # the default takes more than twice as long
    assert not targets.reached(a_run([few]))[0].met
    kernel = a_row(targets.ROWS, {"torch": 1.0}, traffic=0.81)
    assert targets.reached(a_run([kernel]))[0].met
    assert not targets.reached(a_run([kernel | {"roof_traffic": 0.7}]))[0].met
    assert targets.reached(a_run([kernel | {"ratios": {"torch": 1.4}, "roof_traffic": 0.1}]))[0].met


def test_goals_depend_on_level_and_threads():
    goal = targets.TARGETS[targets.BF16].goal
    assert (goal("amx", 1), goal("amx", 2), goal("avx2", 2)) == (1.3, 1.8, 1.0)


def test_every_target_has_cases_and_the_usual_run_most_of_them():
    usual = {name for p in cases.plans(full=False) for name in p.targets}
    assert {name for p in cases.plans() for name in p.targets} == set(targets.TARGETS)
    assert usual == set(targets.TARGETS)
    assert len(list(cases.plans(full=False))) < len(list(cases.plans()))
    names = [(p.op, p.shape) for p in cases.plans()]
    assert len(names) == len(set(names)), "two rows of one name"
    assert max(len(shape) for _, shape in names) <= 25


def test_rows_are_chosen_by_op_shape_and_target():
    def ops(*arguments):
        return {p.op for p in cases.plans() if run.chosen(p, options(*arguments))}

    assert ops("--target", "attention") == {"attention", "attention+grad", "decode"}
    assert ops("--op", "softmax") == {"softmax", "softmax+grad"}
    assert ops("--op", "softmax", "--target", "bf16") == set()
    assert ops("--shapes", "128256") == {"cross_entropy", "cross_entropy+grad"}


def test_results_of_parts_are_merged():
    old, new = a_row(targets.MATMUL, {"numpy": 1.0}), a_row(targets.MATMUL, {"numpy": 2.0})
    other = a_row(targets.MATMUL, {"numpy": 3.0}, "other")
    parts = [{"runs": [a_run([old, other])]}, {"runs": [a_run([new]), a_run([old], threads=2)]}]
    one, two = run.merged(parts)["runs"]
    assert one["rows"] == [other, new]
    assert two["rows"] == [old]


def test_calls_run_under_their_options():
    calls = [under(tilewright.get_num_threads, threads=n) for n in (1, 2)]
    assert [call() for call in calls] == [1, 2]
    assert under(runtime.active_isa, isa="generic")() == "generic"
    assert under(lambda: 7)() == 7


def test_missing_peers_are_named(monkeypatch):
    def missing(name, *_):
        raise ImportError(name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    peers, absent = engines.load_peers(engines.best_level(), 1)
    assert peers == NO_PEERS
    assert absent == {"torch": "not installed", "ort": "onnxruntime is not installed"}
    assert "holds it to generic" in engines.load_peers("generic", 1)[1]["ort"]
    header = table.run_header(
        {"isa": "x", "threads": 1, "caches": "warm", "engines": {}, "absent": absent}
        | {"roofline": roofline.measure(0.01).as_dict()}
    )
    assert "absent: onnxruntime is not installed" in header


def test_onnxruntime_answers_every_quick_case():
    for module in ("onnxruntime", "onnx"):
        pytest.importorskip(module)
    peers = Peers(ort=Ort(1))
    answered = set()
    for quick in cases.plans(quick=True):
        row = run.bench(quick, peers, ROOF, options("--rounds", "1"), 1)
        assert "ort_error" not in row, row
        if "ort" in row["engines"]:
            answered.add(quick.op)
    assert answered >= {"matmul", "linear", "linear_gelu", "int8_matmul", "qmatmul", "weight_only"}
    assert answered >= {"attention", "decode", "layernorm", "add_layernorm", "softmax", "gelu"}


def test_torch_answers_every_quick_case():
    torch = pytest.importorskip("torch")
    for quick in cases.plans(quick=True):
        row = run.bench(quick, Peers(torch), ROOF, options("--rounds", "1"), 1)
        assert not [key for key in row if key.endswith("error")], row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "gap"),
    [((), 1e-3), (("--bf16",), 2.0**-8)],  # of losses near 5, in nats
    ids=["float32", "bfloat16"],
)
def test_training_follows_torch(tmp_path, flags, gap):
    pytest.importorskip("torch")
    file = tmp_path / "train.json"
    command = [sys.executable, str(ROOT / "bench" / "train_vs_torch.py"), "--model", "demo"]
    command += ["--threads", "1", "--steps", "5", "--json", str(file), *flags]
    subprocess.run(command, check=True)
    (result,) = json.loads(file.read_text())
    losses = np.array([result["losses"]["tilewright"], result["losses"]["torch"]])
    assert losses[0, -1] < losses[0, 0] - 0.1
    assert np.abs(losses[0] - losses[1]).max() < gap
