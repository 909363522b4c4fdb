"""Serves a page that tokenizes clips in the browser; `--help` lists the flags."""

import importlib.util
import os

from elastic.cli import app, flags
from elastic.cli.script import Flag, Script

DEMO = Script(
    name="elastictok demo",
    usage="[--load_checkpoint=MODEL]",
    description=(
        "Serves a page for the browser: upload or record a clip or a picture, move a slider, and see original, reconstruction and "
        "tokens side by side; download the tokens, or decode a token file. It listens on this machine alone unless --host says "
        "otherwise. Needs the extra `demo` (pip install 'elastictok[demo]')."
    ),
    groups={
        "Model": (
            Flag("load_checkpoint", "small-fsq", "the model, in any form that tokenizing takes"),
            flags.PRESET,
            flags.UPDATE,
        ),
        "Page": (
            Flag("host", "127.0.0.1", "the address to listen on; 0.0.0.0 lets other machines in"),
            Flag("port", 7860, "the port; 0 takes a free one"),
            Flag("psnr", 25.0, "dB where the slider stands at first"),
            Flag("max_seconds", 10.0, "seconds that are taken of a longer clip"),
            Flag("max_megabytes", 100, "the largest file that may be uploaded"),
        ),
        "Computation": (flags.MESH, flags.DTYPE),
        "Other": flags.OTHER,
    },
)


def demo(values: app.Values) -> int:
    """Loads the model and serves the page until Ctrl-C."""
    if not 0 <= values["port"] < 65536:
        raise ValueError(f"--port={values['port']} must lie in 0 to 65535.")
    for name in ("max_seconds", "max_megabytes", "psnr"):
        if not values[name] > 0:
            raise ValueError(f"--{name}={values[name]} must be above 0.")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("The demo needs Gradio: pip install 'elastictok[demo]' (or gradio>=6).")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it tells nobody

    from elastic.cli import demo_page
    from elastic.distributed import cpu_devices
    from elastic.pipeline import load_model, tokenize_files

    cpu_devices.set_up_cpu()
    spec = values["load_checkpoint"]
    tokenizer = tokenize_files.ElasticTokenizer.from_pretrained(
        spec,
        config=load_model.model_config(
            spec, preset=values["load_elastic_config"], changes=values["update_elastic_config"]
        ),
        dtype=values["dtype"],
        mesh_dim=values["mesh_dim"],
    )
    load_model.log_model(tokenizer)
    page = demo_page.build(
        tokenizer,
        quality=values["psnr"],
        max_seconds=values["max_seconds"],
        examples=demo_page.example_files(),
    )
    page.launch(
        server_name=values["host"],
        server_port=values["port"] or None,
        max_file_size=f"{values['max_megabytes']}mb",
        show_error=True,
    )
    return 0
