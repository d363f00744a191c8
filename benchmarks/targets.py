"""The tables of docs/targets.md: what each target's rules are, and how its kernels round, read off the package.

python benchmarks/targets.py > docs/targets.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.target_table import ALL_KINDS, PORTABLE, TARGETS, Target

HEAD = """# Targets

What each target takes, as `src/edgeqat/target_table.py` has it; written by `python benchmarks/targets.py`. A plan
keeps to the rules of every target it is made for. `portable` is {portable}, in one program.

All take activations with one scale and zero point a tensor, and weights of 2 to 8 bits, symmetric, with a scale for
each channel or one for all; biases are int32 at s_x * s_w. All compute with 8 bits: narrower weights are unpacked when
a file is loaded, narrower activations are 8-bit results that are clamped, in what keeps 8 bits for each.

"""

RULES: Mapping[str, Callable[[Target], str]] = {
    "target": lambda t: f"`{t.name}`",
    "what it is": lambda t: t.note,
    "bits of activations": lambda t: "2 to 8" if len(t.activation_bits) > 1 else "8",
    "weights of up to 4 bits are stored in": lambda t: "4 bits" if t.packs_weights else "8 bits",
    "last layer": lambda t: "may give float" if t.float_logits else "gives integers",
    "not in integers": lambda t: ", ".join(sorted(kind.value for kind in ALL_KINDS - t.kinds)) or "-",
    "convs": lambda t: ", ".join(f"{n}-d" for n in sorted(t.conv_dims)),
    "groups of several inputs and one output": lambda t: "yes" if t.one_output_groups else "float",
    "largest depthwise weight": lambda t: "127" if t.depthwise_limit is None else str(t.depthwise_limit),
    "average pools": lambda t: "keep their input's grid" if t.pools_keep_grid else "have a grid of their own",
    "padding of average pools": lambda t: "always counts" if t.counts_padding else "as the model says",
    "operands of different shapes": lambda t: "yes" if t.broadcasts else "float",
    "height and width may stay open": lambda t: "yes" if t.open_sizes else "no",
}

ROUNDING = """
## Rounding

Each arithmetic, as the head of its module has it. The ranges of scales that XNNPACK takes, and what else a program may
meet elsewhere: `eq.hazards`.

"""


def main() -> None:
    """Prints the page."""
    out = [HEAD.format(portable=", ".join(PORTABLE))]
    out.append(f"| rule | {' | '.join(RULES['target'](t) for t in TARGETS.values())} |\n")
    out.append(f"| {' | '.join('---' for _ in range(len(TARGETS) + 1))} |\n")
    for rule, tell in RULES.items():
        if rule != "target":
            out.append(f"| {rule} | {' | '.join(tell(t) for t in TARGETS.values())} |\n")
    out.append(ROUNDING)
    heads: dict[str, list[str]] = {}
    for name, arithmetic in ARITHMETICS.items():
        heads.setdefault(str(sys.modules[type(arithmetic).__module__].__doc__), []).append(name)
    for text, names in heads.items():
        out.append(f"### {', '.join(f'`{name}`' for name in names)}\n\n```text\n{text.strip()}\n```\n\n")
    print("".join(out).rstrip())


if __name__ == "__main__":
    main()
