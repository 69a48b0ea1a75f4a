"""``pcpo-fast export``: a run's weights for diffusers, ComfyUI and the WebUIs."""

import argparse

from pcpo_fast.commands import values_of

EXAMPLES = """examples:
  pcpo-fast export runs/demo                          newest checkpoint, to runs/demo/export
  pcpo-fast export runs/demo --epoch 20 --output my-lora
  pcpo-fast export runs/demo --format kohya           a LoRA for the WebUIs
  pcpo-fast export runs/demo --pipeline --output my-flux      a whole pipeline folder
  pcpo-fast export runs/demo --output my-lora --push-to-hub ME/my-lora

LoRA weights load with the pipeline's load_lora_weights(FOLDER), and in ComfyUI from models/loras, where any file name
works. At strength 1 they act as they were trained. A full fine-tune is a folder transformer/ or unet/ that the
network's class takes: FluxTransformer2DModel.from_pretrained(FOLDER, subfolder="transformer")."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "export",
        help="write a run's weights for diffusers, ComfyUI and the WebUIs",
        description="Write the weights of a run's checkpoint in a format that other programs load.",
        epilog=EXAMPLES,
    )
    parser.add_argument("run_directory", metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("--epoch", type=int, help="checkpoint after this many epochs (default: the newest)")
    parser.add_argument(
        "--output", metavar="FOLDER", help="where to (default: RUN/export, and RUN/pipeline with --pipeline)"
    )
    parser.add_argument(
        "--pipeline", action="store_true", help="write a complete pipeline that contains the trained weights"
    )
    parser.add_argument(
        "--format",
        metavar="{diffusers,comfyui,kohya}",
        help="naming scheme of the LoRA layers (default: those that diffusers and ComfyUI both read)",
    )
    parser.add_argument(
        "--dtype",
        metavar="{bfloat16,float16,float32}",
        help="dtype of the weights (default: bfloat16 for LoRA with --output, else the run's own)",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="also upload the folder to this model repository of the Hugging Face hub",
    )
    parser.add_argument("--private", action="store_true", help="create that repository as a private one")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the weights of a checkpoint."""
    import json

    from pcpo_fast.interface.exporting import export

    values = values_of(arguments)
    done = export(values.pop("run_directory"), **values)
    if arguments.json:
        record = {"output": str(done.folder), "kind": done.kind, "epoch": done.epoch}
        print(json.dumps(record | ({} if done.address is None else {"address": done.address})))
    else:
        print(f"{done.kind} after {done.epoch} epoch{'s' if done.epoch != 1 else ''}: {done.folder}")
        if done.address is not None:
            print(f"uploaded to {done.address}")
    return 0
