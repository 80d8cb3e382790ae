"""The driver: one process for each ISA level and thread count, one table, one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright import runtime
from tilewright.bench import (
    cases,
    engines,
    measure,
    oracle,
    overhead,
    plot,
    roofline,
    table,
    targets,
)
from tilewright.bench.peers import Peers

SCHEMA = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit status: 1 if a check failed."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parser().parse_args(arguments)
    if options.child:
        report = run_here(options)
        Path(options.json).write_text(json.dumps(report))
        return 0
    if options.results:
        results = merged([json.loads(Path(file).read_text()) for file in options.results])
    else:
        results = run_children(options, arguments)
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if options.summary:
        print("\n".join(targets.table(run) for run in results["runs"]))
    for file in options.plot:
        plot.draw(results, Path(file))
    if options.update_readme:
        table.update_readmes(results)
    failed = [row for run in results["runs"] for row in run["rows"] if "error" in row]
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    all_threads = runtime.get_num_threads()
    p = argparse.ArgumentParser(prog="tilewright bench", description=__doc__)
    p.add_argument("--op", nargs="+", help="only these ops; `overhead` is the time of a tiny call")
    p.add_argument(
        "--shapes", nargs="+", metavar="TEXT", help="only cases whose shape contains one of these"
    )
    p.add_argument(
        "--isa",
        nargs="+",
        default=[engines.best_level()],
        help="ISA levels; the peers are held to them",
    )
    p.add_argument(
        "--target",
        nargs="+",
        metavar="TEXT",
        help="only cases of the goals whose name contains one of these",
    )
    p.add_argument("--threads", nargs="+", type=int, default=sorted({1, all_threads}))
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument(
        "--budget", type=float, default=1.0, help="seconds a case, once it has five rounds"
    )
    p.add_argument("--quick", action="store_true", help="one tiny case of every op: a smoke test")
    p.add_argument("--full", action="store_true", help="every size; without it the usual ones")
    p.add_argument("--cold", action="store_true", help="empty the caches before every sample")
    p.add_argument("--json", metavar="FILE", help="write the results")
    p.add_argument(
        "--summary", action="store_true", help="print what became of every goal (targets.py)"
    )
    p.add_argument(
        "--plot", nargs="+", default=[], metavar="FILE",
        help="draw them: .png, .svg (needs matplotlib)",
    )  # fmt: skip
    p.add_argument(
        "--update-readme", action="store_true", help="rewrite the tables of a source checkout"
    )
    p.add_argument(
        "--results", nargs="+", metavar="JSON", help="measure nothing: show these files' rows"
    )
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return p


def run_children(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """One process for each level and thread count, in turn; they print their own rows."""
    results: dict[str, Any] = {"schema": SCHEMA, "machine": engines.machine(), "runs": []}
    print(table.header(results["machine"]))
    for isa in options.isa:
        for threads in options.threads:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "run.json"
                command = [sys.executable, "-m", "tilewright.bench", *arguments]
                command += ["--isa", isa, "--threads", str(threads), "--child", "--json", str(file)]
                env = engines.child_environment(isa, threads, os.environ)
                env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
                subprocess.run(command, env=env, check=True)
                results["runs"].append(json.loads(file.read_text()))
    return results


def merged(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of several results, a run for each level and thread count; later ones replace."""
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for run in (run for file in files for run in file["runs"]):
        known = runs.setdefault((run["isa"], run["threads"]), {**run, "rows": []})
        replaced = {_key(row) for row in run["rows"]}
        kept = [row for row in known["rows"] if _key(row) not in replaced]
        known["rows"] = kept + run["rows"]
    return {**files[0], "runs": list(runs.values())}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["op"], row["shape"], row["dtype"]


def run_here(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one level and thread count in this process, printing rows as they come."""
    (isa,), (threads,) = options.isa, options.threads
    runtime.set_isa(isa)
    runtime.set_num_threads(threads)
    peers, absent = engines.load_peers(isa, threads)
    roof = roofline.measure(0.02 if options.quick else roofline.SECONDS)
    run: dict[str, Any] = {
        "isa": isa,
        "threads": threads,
        "caches": "cold" if options.cold else "warm",
        "engines": engines.describe(peers),
        "absent": absent,
        "roofline": roof.as_dict(),
        "rows": [],
    }
    print(table.run_header(run), flush=True)
    for plan in cases.plans(quick=options.quick, full=options.full):
        if chosen(plan, options):
            row = bench(plan, peers, roof, options, threads)
            run["rows"].append(row)
            print(table.line(row, run), flush=True)
    print(table.means(run["rows"]), flush=True)
    everything = not options.op and not options.target and not options.shapes
    if threads == 1 and (everything or "overhead" in (options.op or ())):
        run["overhead"] = overhead.measure(quick=options.quick)
        print(table.overhead(run["overhead"]), flush=True)
    return run


def chosen(plan: cases.Plan, options: argparse.Namespace) -> bool:
    """Whether --op, --shapes and --target leave it in; --op attention means attention+grad too."""
    if not cases.exists(plan):
        return False
    by_op = not options.op or {plan.op, plan.op.split("+")[0]} & set(options.op)
    by_shape = not options.shapes or any(text in plan.shape for text in options.shapes)
    by_target = not options.target or any(
        text in name for text in options.target for name in plan.targets
    )
    return bool(by_op and by_shape and by_target)


def bench(
    plan: cases.Plan,
    peers: Peers,
    roof: roofline.Roofline,
    options: argparse.Namespace,
    threads: int,
) -> dict[str, Any]:
    """Check every engine's answer, then time them; one that fails its check gets no number."""
    row: dict[str, Any] = {"op": plan.op, "shape": plan.shape, "dtype": "", "engines": {}}
    row["targets"] = list(plan.targets)
    try:
        case = plan.build(peers)
    except Exception as error:  # as below
        return row | {"error": f"{type(error).__name__}: {error}"}
    row["dtype"] = case.dtype
    calls = dict(case.calls)
    want = case.want()
    for engine, call in case.calls.items():
        if engine in case.loose:
            continue
        try:
            oracle.check(engine, _arrays(call()), want, case.dtype, case.tolerance)
        except Exception as error:  # reported in the row; the other rows are still worth having
            key = "error" if engine == "tilewright" else f"{engine}_error"
            row[key] = f"{type(error).__name__}: {engine}: {error}"
            if isinstance(error, oracle.WrongAnswer):
                row[key] = f"WRONG ANSWER: {error}"
            del calls[engine]
    if "error" in row:
        return row
    flush = _flusher() if options.cold else None
    timings = measure.interleave(
        calls, rounds=options.rounds, budget=options.budget, quiet=threads > 1, flush=flush
    )
    row["engines"] = {name: timing._asdict() for name, timing in timings.items()}
    best = timings["tilewright"].min
    dtype = "int8" if case.integer else case.dtype
    limit, bound = roof.limit(case.cost.flops, case.cost.bytes, dtype)
    row["gflops"], row["gbs"] = case.cost.flops / best / 1e9, case.cost.bytes / best / 1e9
    row["roof"], row["bound"], row["arithmetic"] = limit / best, bound, dtype
    row["roof_traffic"] = roof.traffic(case.cost.bytes)[0] / best
    row["ratios"] = {n: t.min / best for n, t in timings.items() if n != "tilewright"}
    return row


def _arrays(result: Any) -> list[Any]:
    """Whatever an engine returned, as NumPy arrays."""
    many: Iterable[Any] = result if isinstance(result, (list, tuple)) else [result]
    wide = [x.float() if str(x.dtype) == "torch.bfloat16" else x for x in many]
    return [np.asarray(x) for x in wide]


def _flusher() -> Any:
    rubbish = np.zeros(128 << 20, np.uint8)
    return lambda: np.add(rubbish, 1, out=rubbish)
