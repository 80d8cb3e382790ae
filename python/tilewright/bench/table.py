"""The table on the terminal, and the same one in the README files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tilewright.bench.targets import geometric_mean

PEERS = {"numpy": "NumPy", "torch": "torch", "torch_packed": "torch, packed", "ort": "ONNX Runtime"}
COLUMNS = {"numpy": "×numpy", "torch": "×torch", "torch_packed": "×packed", "ort": "×ort"}
COLUMNS |= {"f32": "×f32"}


def header(machine: dict[str, Any]) -> str:
    """What was measured, on what."""
    commit = f" at {machine['commit']}" if machine["commit"] else ""
    lines = [
        f"tilewright {machine['version']}{commit} · {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['system']} · load {machine['load']}",
        f"compiler {machine['compiler']}, {machine['build_type']} · Python {machine['python']}",
        *(f"  {line}" for line in machine["flags"]),
        "ms: best round; median and spread over the rounds; ×engine: its best time over ours",
    ]
    return "\n".join(lines)


def run_header(run: dict[str, Any]) -> str:
    """The engines, the limits, the column names."""
    roof = run["roofline"]
    return "\n".join(
        [
            f"\n{run['isa']}, {_threads(run)}, {run['caches']} caches",
            *(f"  {name:13}{text}" for name, text in run["engines"].items()),
            *(f"  {name:13}absent: {why}" for name, why in run["absent"].items()),
            f"  roof         float32 {_float32(roof)} · int8 {roof['int8_gops']:.0f} GOP/s",
            *_roofs(roof),
            _columns(run),
        ]
    )


def _columns(run: dict[str, Any]) -> str:
    names = f"{'op':18} {'shape':25} {'dtype':8} {'isa':11} {'T':>2} {'ms':>9} {'median':>9} "
    names += f"{'spread':>6} {'GFLOP/s':>8} {'GB/s':>7} {'%roof':>6} {'bound':5}"
    return names + "".join(f" {COLUMNS[name]:>7}" for name in _compared(run))


def _compared(run: dict[str, Any]) -> list[str]:
    """The engines that have a column."""
    return [name for name in COLUMNS if name in run["engines"] or name == "f32"]


def _roofs(roof: dict[str, Any]) -> list[str]:
    """GFLOP/s of each level's units by dtype; GB/s of each memory."""
    lines = []
    for key, name in (
        ("fma_gflops", "float32"),
        ("bf16_gflops", "bfloat16"),
        ("int8_gops", "int8"),
    ):
        rates = (f"{level} {u[key]:.0f}" for level, u in roof["units"].items() if u[key])
        lines.append(f"  {'':13}{name:9}G/s   " + " · ".join(rates))
    for name, m in roof["memory"].items():
        ways = " / ".join(f"{m[f'{way}_gbs']:.0f}" for way in ("read", "copy", "streaming"))
        lines.append(f"  {'':13}{name:9}GB/s  {ways} (read / copy / copy past the caches)")
    return lines


def _float32(roof: dict[str, Any]) -> str:
    """And how matrix units have a part in it."""
    text = f"{roof['gflops']:.0f} GFLOP/s"
    if units := roof.get("bf16_gflops"):
        fma = roof["fma_gflops"]
        text += f" (in registers {fma:.0f}; six bfloat16 products) · bfloat16 {units:.0f} GFLOP/s"
    return text


def line(row: dict[str, Any], run: dict[str, Any]) -> str:
    """One case; a failed one has its message in place of numbers."""
    start = f"{row['op']:18} {row['shape']:25} {row['dtype']:8} "
    start += f"{run['isa']:11} {run['threads']:2d} "
    if "error" in row:
        return f"{start}{row['error']}"
    t = row["engines"]["tilewright"]
    ratios = "".join(f" {_ratio(row, name):>7}" for name in _compared(run))
    wrong = "".join(f"  {row[key]}" for key in row if key.endswith("_error"))
    figures: str = (
        f"{t['min'] * 1e3:9.4f} {t['median'] * 1e3:9.4f} {t['spread']:6.0%} {row['gflops']:8.1f} "
        f"{row['gbs']:7.1f} {row['roof']:6.0%} {row['bound']:5}{ratios}{wrong}"
    )
    return f"{start}{figures}"


def _threads(run: dict[str, Any]) -> str:
    return f"{run['threads']} thread" + "s" * bool(run["threads"] > 1)


def _ratio(row: dict[str, Any], engine: str) -> str:
    return f"{row['ratios'][engine]:.2f}" if engine in row["ratios"] else "-"


def means(rows: Iterable[dict[str, Any]]) -> str:
    """Geometric means of the ratios, by op."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for engine, ratio in row.get("ratios", {}).items():
            ratios.setdefault(row["op"], {}).setdefault(engine, []).append(ratio)
    lines = ["geometric means (worst case):"]
    for op, by_engine in ratios.items():
        parts = (f"×{e} {geometric_mean(r):.2f} ({min(r):.2f})" for e, r in by_engine.items())
        lines.append(f"  {op:18} " + "  ".join(parts))
    return "\n".join(lines)


def overhead(result: dict[str, Any]) -> str:
    """Microseconds of tiny calls, and import times."""
    lines = ["overhead, µs a call on tiny plain arrays (whole call, kernel included):"]
    for name, entry in result["calls"].items():
        peers = "".join(f"   {p} {entry[p]:.2f}" for p in ("numpy", "torch") if p in entry)
        kernel = (
            f"   kernel alone {entry['kernel']:.2f}, over it {entry['us'] - entry['kernel']:.2f}"
            if "kernel" in entry
            else ""
        )
        lines.append(f"  {name:20} {entry['us']:6.2f}{kernel}{peers}")
    ours, base = result["import_ms"], result["import_numpy_ms"]
    lines.append(f"  import tilewright {ours:.0f} ms, NumPy {base:.0f}: {ours - base:.0f} over it")
    return "\n".join(lines)


# --- README blocks --------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """The results as Markdown tables, every case."""
    lines = [_machine(results)]
    for run in results["runs"]:
        lines += [
            "",
            f"**{run['isa']}, {_threads(run)}** — "
            + "; ".join(f"{n} {t}" for n, t in run["engines"].items()),
            "",
        ]
        names = ["op", "shape", "ms", "GFLOP/s", "GB/s", "% of roof"]
        names += [f"× {PEERS.get(name, 'own f32')}" for name in _compared(run)]
        lines += ["| " + " | ".join(names) + " |"]
        lines += ["|---|---|--:|--:|--:|---|" + "--:|" * len(_compared(run))]
        lines += [_markdown_row(row, run) for row in run["rows"] if "error" not in row]
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """One Markdown table: each op's ratios over its cases, a column for each run and peer."""
    runs = results["runs"]
    peers = [(run, e) for run in runs for e in PEERS if e in run["engines"]]
    names = [f"{r['isa']}, {r['threads']} T × {PEERS[e]}" for r, e in peers]
    lines = [
        f"{_machine(results)} {_engines(runs[0])}. Geometric mean over the cases (worst); "
        "above 1 tilewright is faster.",
        "",
        "| op | cases | " + " | ".join(names) + " |",
        "|---|--:|" + "--:|" * len(peers),
    ]
    for op in dict.fromkeys(row["op"] for run in runs for row in run["rows"]):
        cells, cases = [], 0
        for run, engine in peers:
            rows = [row for row in run["rows"] if row["op"] == op and "error" not in row]
            ratios = [row["ratios"][engine] for row in rows if engine in row["ratios"]]
            cases = max(cases, len(rows))
            cells.append(f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "-")
        lines.append(f"| {op} | {cases} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, compiler {machine['compiler']}."


def _engines(run: dict[str, Any]) -> str:
    return "; ".join(f"{n} {t.split(',')[0]}" for n, t in run["engines"].items())


def _markdown_row(row: dict[str, Any], run: dict[str, Any]) -> str:
    cells = [row["op"], row["shape"], f"{row['engines']['tilewright']['min'] * 1e3:.3g}"]
    cells += [f"{row['gflops']:.0f}", f"{row['gbs']:.0f}", f"{row['roof']:.0%} {row['bound']}"]
    cells += [_ratio(row, engine) for engine in _compared(run)]
    return "| " + " | ".join(cells) + " |"


def update_readmes(results: dict[str, Any]) -> None:
    """Rewrite the marked blocks of bench/README.md and README.md.

    Raises:
        SystemExit: this is an installed package, not a source checkout.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "bench" / "README.md").is_file():
        raise SystemExit("--update-readme works in a source checkout only")
    replace_block(root / "bench" / "README.md", markdown(results))
    replace_block(root / "README.md", summary(results))


def replace_block(file: Path, text: str) -> None:
    """Put text between <!-- bench --> and <!-- /bench -->, where the file has them."""
    begin, end = "<!-- bench -->", "<!-- /bench -->"
    old = file.read_text() if file.is_file() else ""
    if begin in old and end in old:
        head, rest = old.split(begin, 1)
        file.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}")
