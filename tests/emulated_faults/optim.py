"""Faults of optim.cu, which must show in the parameters or the state after some steps."""

from __future__ import annotations

from emulated_faults.fault import Fault

STEPS = {"source": "optim.cu", "test": "steps_have", "tests": ("emulated",)}
CLIPPED = {"source": "optim.cu", "test": "clipped", "tests": ("emulated",)}
PROGRAM = {"source": "optim.cu", "test": "training", "tests": ("emulated_program",)}
BITS = "test_steps_have_the_bits_of_the_cpu"

FAULTS = [
    Fault(
        "a tensor's first block is taken for the one before",
        "optim.cu",
        "block >= tensors[t + 1].first_block",
        "block > tensors[t + 1].first_block",
        BITS,
        **STEPS,
    ),
    Fault(
        "a tensor with gaps is written as if it had none",
        "optim.cu",
        "of.lists[k].store<Mixed>(of.lists[k].offset(i), x)",
        "of.lists[k].store<Mixed>(i, x)",
        BITS,
        **STEPS,
    ),
    Fault(
        "the largest v is not kept",
        "optim.cu",
        "      e.store(3, below);\n",
        "",
        BITS,
        **STEPS,
    ),
    Fault(
        "nesterov does not look ahead",
        "optim.cu",
        "      if (nesterov) step = fmaf(step, momentum, grad);\n",
        "",
        BITS,
        **STEPS,
    ),
    Fault(
        "sums of squares of a launch overwrite those before",
        "optim.cu",
        "tensors, sums + from",
        "tensors, sums",
        "test_gradients_are_clipped",
        **CLIPPED,
    ),
    Fault(
        "a norm below the limit scales as well",
        "optim.cu",
        "if (!(factor >= 1)) e.store",
        "e.store",
        "test_training",
        **PROGRAM,
    ),
    Fault(
        "the norm's root is forgotten",
        "optim.cu",
        "*norm = sqrt(*total);",
        "*norm = *total;",
        "test_training",
        **PROGRAM,
    ),
]
