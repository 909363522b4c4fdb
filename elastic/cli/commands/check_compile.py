"""Compiles training and inference for hardware one does not have; `--help` lists the flags."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

from elastic.aot import targets
from elastic.cli import app
from elastic.cli.flags_train import TRAIN
from elastic.cli.script import Flag, Script
from elastic.io.literals import parse_dict

DOES_NOT_FIT = 2

CHECK = Script(
    name="scripts/check_compile.py",
    usage="--target=v4:4x4x4 [the flags of scripts/train.py]",
    description=(
        "Compiles the training step and the block step of inference, as they are run, for TPUs and GPUs "
        "that need not be there, and prints what each device needs of its memory, the arithmetic, and "
        "which sends of the ring run beside a kernel. Takes the flags of scripts/train.py; reads no data, "
        f"writes no checkpoint. Exit code {DOES_NOT_FIT}: something does not fit."
    ),
    groups={
        "Compiling": (
            Flag(
                "target",
                "cpu",
                "chips to compile for: v4:4x4x4, v5p-128chips, v5e:16x16, v6e, h100:8, h200, cpu:8",
            ),
            Flag("program", "train", "what to compile", choices=("train", "inference", "both")),
            Flag(
                "max_blocks_per_chunk",
                0,
                "for inference: blocks held in one context; 0: as many as the model was trained with",
            ),
            Flag("json", "", "a file that gets one line of JSON for each program, appended"),
            Flag("hlo", "", "a folder that gets the text of each compiled program"),
            Flag(
                "table",
                False,
                "compile the 200m models at 4K to 1M tokens on slices of 64 to 512 chips, each in a "
                "process of its own, and go on where an interrupted table stands in the --json file",
            ),
        ),
        **{
            title: tuple(dataclasses.replace(flag, required=False) for flag in group)
            for title, group in TRAIN.groups.items()
        },
    },
)

# What training at length takes: layers recomputed, feed-forward in pieces.
_LONG = dict(lpips_loss_ratio=0.0, remat_block="nothing_saveable", scan_mlp=True)
_MODELS: dict[str, dict[str, Any]] = {
    "fsq": _LONG,
    "vae": _LONG
    | dict(bottleneck_type="vae", patch_size=(2, 8, 8), max_toks=2048, min_toks=128, theta=5e6),
}
_LENGTHS = {"4K": 4096, "128K": 131_072, "512K": 524_288, "1M": 1_048_576}
_ONLY = {"512K": "vae", "1M": "fsq"}
_SLICES = (
    "v4-64chips", "v4-128chips", "v4-256chips", "v4-512chips",
    "v5p-64chips", "v5p-128chips", "v5p-256chips", "v5p-512chips", "v5e-256chips",
)  # fmt: skip
# Devices that share a sequence of 128K tokens: whole axes of the slice's torus.
_RING = {"v4-64chips": 16, "v5p-64chips": 16, "v4-512chips": 64, "v5p-512chips": 64, "v5e-256chips": 16}  # fmt: skip


def check_compile(flags: app.Values) -> int:
    """Compiles for one target, or the whole table."""
    if flags["table"]:
        return table(flags)
    target = targets.parse_target(flags["target"])
    targets.prepare(target)
    rows = reports(flags, target)
    if flags["json"]:
        with open(flags["json"], "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(layout(rows))
    print("args, out, temp, total, limit: GiB of each device; s: seconds of compiling.")
    return DOES_NOT_FIT if any(row["memory"]["fits"] is False for row in rows) else 0


def reports(flags: app.Values, target: targets.Target) -> list[dict[str, Any]]:
    """One record for each program asked for."""
    devices = targets.devices(target)

    from elastic.aot import compile
    from elastic.cli import train_config
    from elastic.distributed.mesh import make_mesh

    model_config = train_config.model_of(flags)
    config = train_config.run_of(flags, model_config, only_compiled=True)
    mesh = make_mesh(config.mesh_dim, devices)
    rows = []
    if flags["program"] != "inference":
        rows.append(compile.report_train(config, model_config, mesh, target))
    if flags["program"] != "train":
        window = flags["max_blocks_per_chunk"] or (
            model_config.max_sequence_length // model_config.tokens_per_block
        )
        rows.append(
            compile.report_inference(
                model_config, mesh, target, dtype=config.dtype, window_blocks=window
            )
        )
    for row in rows:
        text = row.pop("text")
        if flags["hlo"]:
            name = f"{target}-{row['program']}.txt".replace(":", "-")
            path = pathlib.Path(flags["hlo"], name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    command = [f"--{name}={flags[name]}" for name in _names(flags)]
    return [{"command": command} | row for row in rows]


def _names(flags: app.Values) -> list[str]:
    """Flags on the command line that decide what is compiled."""
    return [
        flag.name
        for flag in CHECK.flags
        if flags.given(flag.name) and flag.name not in ("json", "hlo", "table", "verbose", "debug")
    ]


def layout(rows: list[dict[str, Any]]) -> str:
    """The records in aligned columns, in GiB (2**30 bytes) per device."""
    head = "target program model tokens batch mesh attention tiles args out temp total limit fits PFLOP overlap even s"
    lines = [[str(name) for name in head.split()]]
    for row in rows:
        memory, permutes, even = row["memory"], row["permutes"], row["evenness"]
        gib = [
            "-" if memory.get(part) is None else f"{memory[part] / targets.GIB:.2f}"
            for part in ("arguments", "outputs", "temporaries", "total", "limit")
        ]
        fits = {
            None: "-",
            True: "yes",
            False: f"no, by {(memory['excess'] or 0) / targets.GIB:.2f}",
        }[memory["fits"]]
        lines.append([
            row["target"], row["program"], row["bottleneck"], str(row["tokens"]), str(row["batch"]),
            ",".join(str(size) for size in row["mesh"].values()), row["attention"], "x".join(map(str, row["tiles"])),
            *gib, fits, f"{row['flops'] / 1e15:.3g}",
            "-" if permutes is None else f"{permutes['ring']['overlapped']}/{permutes['ring']['pairs']}",
            "-" if even is None else " ".join(f"{name} {value['max_over_mean']:.2f}" for name, value in even.items()),
            str(row["seconds"]),
        ])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def table(flags: app.Values) -> int:
    """Compiles every case that the --json file does not hold yet, each in a process of its own; prints the table."""
    if not flags["json"]:
        raise ValueError("--table needs --json=FILE: it goes on from what stands there.")
    file = pathlib.Path(flags["json"])
    done = [row["command"] for row in _rows(file)]
    failed = 0
    for case in _cases(flags):
        if case in done:
            continue
        command = [sys.executable, "-m", "elastic.cli", "check-compile", *case, f"--json={file}"]
        print(" ".join(case), flush=True)
        failed += subprocess.run(command).returncode not in (0, DOES_NOT_FIT)
    print(layout(_rows(file)))
    return 1 if failed else 0


def _rows(file: pathlib.Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _cases(flags: app.Values) -> list[list[str]]:
    """The command lines of the table. Flags given besides --table replace its own, and --target its slices."""
    given = {name: flags[name] for name in _names(flags)}
    changes = parse_dict(given.pop("update_elastic_config", "dict()"))
    slices = [given.pop("target")] if "target" in given else _SLICES
    order = [flag.name for flag in CHECK.flags]
    cases = []
    for target in slices:
        chips = targets.parse_target(target).num_chips
        for label, length in _LENGTHS.items():
            ring = {"4K": 1, "128K": _RING.get(target, min(32, chips))}.get(label, chips)
            for name, model in _MODELS.items():
                if _ONLY.get(label, name) != name:
                    continue
                values = {
                    "target": target,
                    "load_elastic_config": "200m",
                    "update_elastic_config": str(
                        model | dict(max_sequence_length=length) | changes
                    ),
                    "train_dataset.vision_dataset.batch_size": chips // ring,
                    "mesh_dim": f"1,-1,1,{ring}",
                    "dtype": "bf16",
                } | given
                named = sorted(values.items(), key=lambda item: order.index(item[0]))
                cases.append([f"--{key}={value}" for key, value in named])
    return cases
