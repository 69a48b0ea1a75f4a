"""``pcpo-fast configs``: the configurations that come with pcpo-fast."""

import argparse

EXAMPLES = """examples:
  pcpo-fast configs                                list all
  pcpo-fast configs show flux_dev_pcpo_lora        print one: write it to a file (> mine.yaml) and edit it
  pcpo-fast train --config mine.yaml               train with it
  pcpo-fast train --config flux_dev_pcpo_lora prompts.train=P.txt prompts.heldout=H.txt"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "configs",
        help="list the configurations that come with pcpo-fast, or print one",
        description="List the configurations that come with pcpo-fast, or print one to edit.",
        epilog=EXAMPLES,
    )
    parser.add_argument("action", nargs="?", choices=("list", "show"), default="list", help="list (default) or show")
    parser.add_argument("name", nargs="?", metavar="NAME", help="show: which one")
    parser.add_argument("--json", action="store_true", help="list: print names, paths and descriptions as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the list, or a file."""
    import json

    from pcpo_fast.config.shipped import configurations, find_configuration, summary
    from pcpo_fast.errors import UserError

    if (arguments.action == "show") != (arguments.name is not None):
        raise UserError("configs: use `pcpo-fast configs` or `pcpo-fast configs show NAME`")
    if arguments.name is not None:
        print(find_configuration(arguments.name).read_text(encoding="utf-8"), end="")
        return 0
    known = configurations()
    if arguments.json:
        rows = {name: {"path": str(path), "summary": summary(path)} for name, path in known.items()}
        print(json.dumps(rows, indent=1))
        return 0
    width = max(map(len, known), default=0)
    for name, path in known.items():
        print(f"{name:{width}}  {summary(path)}")
    return 0
