"""Serve a model over HTTP, in the form of OpenAI's completions.

The server answers from the start, and takes requests when the model is loaded: GET /health says when. SIGTERM and
Ctrl-C let what runs come to its end. A page to try it with is at /. See docs/server.md. Needs pip install ".[server]".
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from based.cli import UsageError, _common

if TYPE_CHECKING:
    from based import Engine, Model

_SIZES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    _common.add_model_arguments(parser)
    parser.add_argument(
        "--served-model-name",
        type=_common.text,
        metavar="NAME",
        help="the model's name to clients (default: what --model says)",
    )
    _common.add_compute_arguments(parser)
    parser.add_argument(
        "--devices",
        type=_devices,
        metavar="LIST",
        help="several, such as cuda:0,cuda:1: a process with the model on each, behind one address",
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="on a GPU: answers do not depend on what else runs; slower"
    )

    group = parser.add_argument_group("where")
    group.add_argument(
        "--host",
        type=_common.text,
        default="127.0.0.1",
        help="address to listen at (default: 127.0.0.1, this machine)",
    )
    group.add_argument("--port", type=_port, default=8000, metavar="N", help="0: any free one (default: 8000)")
    group.add_argument(
        "--api-key",
        type=_common.text,
        action="append",
        default=[],
        metavar="KEY",
        help="clients must send one of these; may be repeated (default: $BASED_API_KEY, if set)",
    )
    group.add_argument(
        "--allowed-host",
        type=_common.text,
        action="append",
        default=[],
        metavar="NAME",
        help="clients may ask by this name (the header Host), too; * for any; may be repeated",
    )
    group.add_argument(
        "--allowed-origin",
        type=_common.text,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages of this origin may ask (CORS), such as https://example.org; * for all; may be repeated",
    )
    group.add_argument("--ssl-certfile", type=_common.path, metavar="FILE", help="serve over TLS with this certificate")
    group.add_argument(
        "--ssl-keyfile", type=_common.path, metavar="FILE", help="its private key (default: in --ssl-certfile)"
    )
    group.add_argument(
        "--ssl-ca-certs",
        type=_common.path,
        metavar="FILE",
        help="clients must have a certificate that these have signed",
    )

    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-batch-size", type=_common.positive, metavar="N", help="sequences that run at once (default: as generate)"
    )
    _common.add_counts(
        group, ("--max-waiting-requests", 1024, "prompts that may wait; more are refused with status 429")
    )
    group.add_argument(
        "--max-waiting-tokens", type=_common.positive, metavar="N", help="tokens of the prompts that may wait"
    )
    group.add_argument(
        "--max-step-tokens", type=_common.positive, metavar="N", help="prompt tokens in one step (default: measured)"
    )
    group.add_argument(
        "--cache-bytes", type=_bytes, metavar="BYTES", help="of states of prompts on the device; 0: none (k, M, G)"
    )
    group.add_argument(
        "--host-cache-bytes", type=_bytes, default=0, metavar="BYTES", help="of more of them in the host's memory"
    )
    group.add_argument("--cache-dir", type=_common.path, metavar="DIR", help="of more of them in files")
    group.add_argument(
        "--cache-dir-bytes", type=_bytes, default=16 << 30, metavar="BYTES", help="of these files (default: 16 GiB)"
    )

    group = parser.add_argument_group("states of clients")
    group.add_argument(
        "--state-dir", type=_common.path, metavar="DIR", help="keep states of clients in files of this folder"
    )
    group.add_argument(
        "--shared-states", action="store_true", help="other servers use the same --state-dir at the same time"
    )
    _common.add_counts(group, ("--max-states", 1024, "states in memory"))
    group.add_argument(
        "--max-state-bytes",
        type=_bytes,
        default=10**9,
        metavar="BYTES",
        help="their bytes; beyond, those used last stay (default: 1G)",
    )
    _common.add_counts(group, ("--max-state-files", 10_000, "files"))

    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-body-bytes", type=_bytes, default=16 << 20, metavar="BYTES", help="of a request (default: 16 MiB)"
    )
    group.add_argument(
        "--max-header-bytes", type=_bytes, default=64 << 10, metavar="BYTES", help="of a request (default: 64 KiB)"
    )
    group.add_argument("--max-prompt-tokens", type=_common.positive, metavar="N", help="of a prompt (default: any)")
    group.add_argument("--max-tokens", type=_common.positive, metavar="N", help="new ones of a sample (default: any)")
    _common.add_counts(
        group,
        ("--max-prompts", 1024, "prompts of a request"),
        ("--max-n", 128, "samples of a prompt"),
        ("--max-logprobs", 20, "likeliest tokens that are given at each place"),
        ("--max-requests", 4096, "requests under way at once; more are refused with status 429"),
    )
    group.add_argument(
        "--read-timeout",
        type=_common.seconds,
        default=60.0,
        metavar="SECONDS",
        help="for a request to arrive (default: 60)",
    )
    group.add_argument(
        "--request-timeout", type=_common.seconds, metavar="SECONDS", help="for a request to be answered (default: any)"
    )
    group.add_argument(
        "--drain-timeout",
        type=_seconds_or_zero,
        default=30.0,
        metavar="SECONDS",
        help="for requests to end after SIGTERM (default: 30)",
    )

    group = parser.add_argument_group("what it tells")
    group.add_argument("--log-json", action="store_true", help="log lines are JSON objects")
    group.add_argument("--no-log-requests", action="store_true", help="no line for each request")
    group.add_argument(
        "--metrics-prefix", type=_prefix, default="based", metavar="NAME", help="of the metrics' names (default: based)"
    )


def _devices(text: str) -> list[str]:
    """Names with commas between them."""
    names = text.split(",")
    for name in names:
        if not re.fullmatch(r"cpu|cuda:\d+", name):
            raise argparse.ArgumentTypeError(f"{name!r} in {text!r} is neither cpu nor cuda:N")
    return names


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 … 65535")
    return value


def _seconds_or_zero(text: str) -> float:
    return 0.0 if float(text) == 0 else _common.seconds(text)


def _bytes(text: str) -> int:
    """A number of bytes, with k, M, G or T behind it for 10³, 10⁶, 10⁹, 10¹²."""
    factor = _SIZES.get(text[-1:].lower())
    value = int(text) if factor is None else round(float(text[:-1]) * factor)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not ≥ 0")
    return value


_bytes.__name__ = "number of bytes"  # in argparse's message


def _prefix(text: str) -> str:
    if not text.isascii() or not text.replace("_", "a").isalnum() or text[0].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no name: expected letters, digits and _")
    return text


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    try:
        from based.server._options import Limits, Options
        from based.server._run import serve
    except ModuleNotFoundError as error:
        raise ImportError(f'based serve needs {error.name}: pip install ".[server]" installs it') from error
    if args.ssl_certfile is None and (args.ssl_keyfile is not None or args.ssl_ca_certs is not None):
        raise UsageError("--ssl-keyfile and --ssl-ca-certs go with --ssl-certfile")
    if args.devices is not None and args.device != "auto":
        raise UsageError(f"--device {args.device} and --devices {','.join(args.devices)}: give one of them")
    if args.shared_states and args.state_dir is None:
        raise UsageError("--shared-states are in files: give --state-dir, the folder that the servers share")
    for file in (args.ssl_certfile, args.ssl_keyfile, args.ssl_ca_certs):
        if file is not None:
            file.open("rb").close()  # its name is in the error
    key = os.environ.get("BASED_API_KEY")
    options = Options(
        model_name=args.served_model_name or args.model,
        host=args.host,
        port=args.port,
        api_keys=args.api_key or ([key] if key else []),
        allowed_hosts=args.allowed_host,
        allowed_origins=args.allowed_origin,
        certificate=args.ssl_certfile,
        key=args.ssl_keyfile,
        ca_certificates=args.ssl_ca_certs,
        metrics_prefix=args.metrics_prefix,
        state_dir=args.state_dir,
        shared_states=args.shared_states,
        max_states=args.max_states,
        max_state_bytes=args.max_state_bytes,
        max_state_files=args.max_state_files,
        drain_seconds=args.drain_timeout,
        log_json=args.log_json,
        log_requests=not args.no_log_requests,
        limits=Limits(
            body_bytes=args.max_body_bytes,
            header_bytes=args.max_header_bytes,
            prompt_tokens=args.max_prompt_tokens,
            new_tokens=args.max_tokens,
            prompts=args.max_prompts,
            n=args.max_n,
            logprobs=args.max_logprobs,
            requests=args.max_requests,
            read_seconds=args.read_timeout,
            request_seconds=args.request_timeout,
        ),
    )
    if args.host not in ("127.0.0.1", "localhost", "::1") and not options.api_keys:
        print(
            f"based: warning: everyone who reaches {args.host} may use this server: --api-key asks for a key",
            file=sys.stderr,
        )

    load: dict[str, Any] = {
        "device": args.device,
        "dtype": args.dtype,
        "num_threads": args.threads,
        "deterministic": args.deterministic,
        "max_context": args.max_context,
        "revision": args.revision,
        "tokenizer": args.tokenizer,
    }
    engine: dict[str, Any] = {
        "max_batch_size": args.max_batch_size,
        "max_waiting_requests": args.max_waiting_requests,
        "max_waiting_tokens": args.max_waiting_tokens,
        "max_step_tokens": args.max_step_tokens,
        "cache_bytes": args.cache_bytes,
        "host_cache_bytes": args.host_cache_bytes,
        "cache_dir": args.cache_dir,
        "cache_dir_bytes": args.cache_dir_bytes,
    }
    if args.devices is None:
        serve(partial(_load, args.model, load, engine), options)
        return
    from based.server._devices import serve_devices

    threads = max(1, len(os.sched_getaffinity(0)) // max(1, args.devices.count("cpu")))
    loads: list[tuple[str, Callable[[], tuple[Model, Engine]]]] = []
    for device in args.devices:
        own = {"device": device} | ({"num_threads": threads} if device == "cpu" and args.threads is None else {})
        loads.append((device, partial(_load, args.model, load | own, engine)))
    serve_devices(loads, partial(_prepare, args.devices, args.model, args.revision, args.tokenizer), options)


def _load(model: str, options: dict[str, Any], engine: dict[str, Any]) -> "tuple[Model, Engine]":
    import based

    loaded = based.load(model, **options)
    return loaded, loaded.engine(**engine)


def _prepare(devices: list[str], model: str, revision: str | None, tokenizer: str | None) -> None:
    """Refuses what no process could do, and fetches and converts the model once for all of them."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    import based
    from based._loading import find_tokenizer, model_directory

    if any(device != "cpu" for device in devices):
        # By a process that ends: who asks a GPU how it is keeps some of its memory.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            if problem := pool.submit(_problem, devices).result():
                raise based.UnsupportedError(f"--devices {','.join(devices)}: {problem}")
    find_tokenizer(model, revision, tokenizer)
    model_directory(model, revision)


def _problem(devices: list[str]) -> str | None:
    """Why one of them cannot be used."""
    import based

    known = {each.device: each.problem for each in based.devices()}
    for device in devices:
        if device not in known:
            return based._core.cuda_problem() or f"there is no {device}, but {', '.join(known)}"
        if problem := known[device]:
            return f"{device}: {problem}"
    return None
