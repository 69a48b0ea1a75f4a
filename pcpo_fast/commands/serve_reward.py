"""``pcpo-fast serve-reward``: a reward behind HTTP, for runs on other machines."""

import argparse

EXAMPLES = """examples:
  pcpo-fast serve-reward jpeg_compressibility
  pcpo-fast serve-reward my_rewards:Judge model=some/model --host 0.0.0.0 --port 8765

The run names it as a reward (docs/reward_server.md):
  rewards: [{name: remote, options: {url: "http://127.0.0.1:8765"}}]"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "serve-reward",
        help="serve a reward to runs on other machines",
        description="Serve one reward over HTTP; runs use it as the reward named remote.",
        epilog=EXAMPLES,
    )
    parser.add_argument("reward", metavar="REWARD", help="a built-in reward, or module:function")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8765, help="port, 0 for a free one (default: 8765)")
    parser.add_argument(
        "--token-env",
        default="PCPO_REWARD_TOKEN",
        metavar="NAME",
        help="environment variable with the token that clients need; required unless --host is a loopback address",
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="device of the images")
    parser.add_argument("--batch-size", type=int, default=32, help="images per call of the reward (default: 32)")
    parser.add_argument("--most-images", type=int, default=64, help="maximum images per request (default: 64)")
    parser.add_argument("--most-mib", type=int, default=256, help="maximum MiB per request (default: 256)")
    parser.add_argument(
        "--waiting-mib", type=int, default=1024, help="maximum MiB of all waiting requests (default: 1024)"
    )
    parser.add_argument("--json", action="store_true", help="print the address and what is served as JSON")
    parser.add_argument("settings", nargs="*", default=[], metavar="option=value", help="options of the reward")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load the reward and serve it until interrupted."""
    import importlib.util
    import json

    from pcpo_fast.config.arguments import check_least
    from pcpo_fast.errors import UserError

    for library in ("starlette", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise UserError(
                f"serve-reward needs {library}, which is not installed: run `pip install starlette uvicorn`"
            )
    for option in ("batch_size", "most_images", "most_mib", "waiting_mib"):
        check_least(1, **{option: getattr(arguments, option)})

    from pcpo_fast.distributed.collectives import lone_device
    from pcpo_fast.rewards import load_reward
    from pcpo_fast.rewards.options import checked_device
    from pcpo_fast.rewards.serving.app import Limits, RewardServer
    from pcpo_fast.rewards.serving.batching import BatchQueue
    from pcpo_fast.rewards.serving.server import listen, serve, token_for

    token = token_for(arguments.host, arguments.token_env)
    device = checked_device("--device", str(lone_device()) if arguments.device == "auto" else arguments.device)
    bound = listen(arguments.host, arguments.port)
    reward = load_reward(arguments.reward, _options(arguments.settings))
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    url = f"http://{host}:{bound.getsockname()[1]}"

    def ready() -> None:
        needed = f"the token in {arguments.token_env}" if token else "no token"
        if arguments.json:
            print(json.dumps({"url": url, "reward": arguments.reward, "token": token is not None}), flush=True)
        else:
            print(f"serving {arguments.reward} on {url} ({needed} needed); Ctrl-C stops", flush=True)

    limits = Limits(arguments.most_images, arguments.most_mib * 2**20, arguments.waiting_mib * 2**20)
    work = BatchQueue(arguments.reward, reward, device=device, most_images=arguments.batch_size)
    serve(RewardServer(arguments.reward, work, limits, token), bound, ready)
    return 0


def _options(texts: list[str]) -> dict[str, object]:
    from pcpo_fast.config.yaml_text import parse_value
    from pcpo_fast.errors import UserError

    options: dict[str, object] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise UserError(f"command line ({text}): a reward's option must have the form name=value")
        try:
            options[name] = parse_value(value)
        except ValueError as error:
            raise UserError(f"command line ({text}): {value!r} is not a valid YAML value ({error})") from None
    return options
