"""What several commands do with their arguments."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from importlib.util import find_spec
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from pi_dist.config import Config, ConfigError, UserError

UNFINISHED_RECORD = 3  # exit status: rows are left, run it again
NETWORK_FLAGS = (
    *("network", "gpus_per_node", "node_gbytes_per_s"),
    *("fabric_gbytes_per_s", "adapters_per_node", "fabric_latency_us"),
)


class ConfigFile(ActionConfigFile):
    """The action of --config; it names the file that is not UTF-8, not YAML, or has a key twice."""

    def __call__(self, parser, cfg, values, option_string=None) -> None:
        if os.path.isfile(values):  # else it is the text itself
            _check_yaml(Path(values))
        super().__call__(parser, cfg, values, option_string)


def _check_yaml(path: Path) -> None:
    """Raise ConfigError unless a file is YAML, and no mapping in it has a key twice."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path}: {error}") from error
    nodes = [root]
    for node in nodes:  # it grows by what is below
        below = getattr(node, "value", None)
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in below]
            for number, (key, _) in enumerate(below):
                if key.value in names[:number]:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"config: {path}: line {line}: the key {key.value!r} is there twice")
            below = [value for _, value in below]
        if isinstance(node, yaml.CollectionNode):
            nodes += [child for child in below if child not in nodes]  # an alias may close a circle


def config_of(arguments: Namespace) -> Config:
    """The configuration among a command's arguments."""
    values = arguments.as_dict()
    return Config.from_dict({field.name: values[field.name] for field in dataclasses.fields(Config)})


def sizes(name: str, text: str) -> list[int]:
    """Numbers from 1 on with commas between them."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise ConfigError(f"{name}: numbers from 1 on with commas between them, not {text!r}")
    return [int(part) for part in text.split(",")]


def check_plot(path: str | None) -> None:
    """Refuse, before any work, a figure that could not be drawn in the end.

    Raises:
        ConfigError: its kind or directory is not there. UserError: the extra `plot` is not installed.
    """
    if path is None:
        return
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"plot: suffix of {path!r} in .png, .svg, .pdf does not hold")
    check_written("plot", path)
    if find_spec("matplotlib") is None:
        raise UserError("plot: matplotlib is not installed; pip install 'pi-dist[plot]'")


def check_written(name: str, path: str | None, printed: bool = False) -> None:
    """Refuse, before any work, a file that could not be written in the end.

    Args:
        printed: the path "-" is standard output.

    Raises:
        ConfigError: its directory is not there, it is one, or standard output where that gets no records.
    """
    if path is None or (path == "-" and printed):
        return
    if path == "-":
        raise ConfigError(f"{name}: '-' is no file; what is written there is gone on with")
    if Path(path).is_dir():
        raise ConfigError(f"{name}: {path!r} is a directory")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{name}: {str(Path(path).parent)!r} is not a directory")


def print_or_write(result: dict, path: str | None, words: str) -> None:
    """Words to a person, or JSON to a file or (path "-") standard output."""
    if path is None:
        print(words)
    elif path == "-":
        print(json.dumps(result, indent=1))
    else:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)
        print(f"written to {path}")


def add_network(parser: ArgumentParser) -> None:
    """`NETWORK_FLAGS`, which `network_of` reads."""
    parser.add_argument(
        "--network", type=str, default="infiniband", help="between nodes: infiniband (NDR) or ethernet (100G)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs that NVLink joins")
    parser.add_argument(
        "--node-gbytes-per-s",
        type=float | None,
        default=None,
        help="of a GPU within a node, one way; default: 296, as two H200 with NVLink 4",
    )
    parser.add_argument(
        "--fabric-gbytes-per-s",
        type=float | None,
        default=None,
        help="between nodes, of an adapter, one way; default: the network's",
    )
    parser.add_argument(
        "--adapters-per-node", type=int | None, default=None, help="between nodes; default: the network's"
    )
    parser.add_argument(
        "--fabric-latency-us", type=float | None, default=None, help="of a message between nodes"
    )


def network_of(arguments: Namespace):
    """The network that the flags describe.

    Raises:
        ConfigError: an unknown network, or a size out of its range.
    """
    from pi_dist.measure.profile import NETWORKS

    if arguments.network not in NETWORKS:
        raise ConfigError(f"network: {arguments.network!r} in {', '.join(NETWORKS)} does not hold")
    changes: dict[str, float] = {"gpus_per_node": arguments.gpus_per_node}
    for flag, name, unit in (
        ("node_gbytes_per_s", "node_bytes_per_s", 1e9),
        ("fabric_gbytes_per_s", "fabric_bytes_per_s", 1e9),
        ("fabric_latency_us", "fabric_latency_s", 1e-6),
        ("adapters_per_node", "adapters_per_node", 1),
    ):
        if arguments[flag] is not None:
            changes[name] = arguments[flag] * unit
    for name, value in changes.items():
        if not value > 0:
            raise ConfigError(f"{name}: {name} ({value}) > 0 does not hold")
        if not value < math.inf:
            raise ConfigError(f"{name}: {name} ({value}) < inf does not hold")
    return dataclasses.replace(NETWORKS[arguments.network], **changes)
