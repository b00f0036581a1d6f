"""What `based serve` can be told."""

import re
from dataclasses import dataclass, field
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""The names that states may have: they are names of files, too."""


@dataclass(slots=True)
class Limits:
    """What one request, and all of them together, may take. Beyond that a request is refused, and told the limit."""

    body_bytes: int = 16 << 20
    header_bytes: int = 64 << 10
    prompt_tokens: int | None = None
    """Of one prompt; None: any number."""
    new_tokens: int | None = None
    """max_tokens of a request; None: any number."""
    prompts: int = 1024
    n: int = 128
    logprobs: int = 20
    requests: int = 4096
    """Requests that compute or wait for it at once."""
    read_seconds: float = 60.0
    """Time for a request to arrive as a whole."""
    request_seconds: float | None = None
    """Time for a request to be answered; it then ends with what it has. None: any time."""


@dataclass(slots=True)
class Options:
    """Where and how to serve, but for the model and its engine."""

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: list[str] = field(default_factory=list)
    allowed_hosts: list[str] = field(default_factory=list)
    """Names by which clients may ask, beside `host` and those of this machine; "*": any. Without any, names are checked
    where the host is this machine alone and there are no API keys."""
    allowed_origins: list[str] = field(default_factory=list)
    certificate: Path | None = None
    key: Path | None = None
    ca_certificates: Path | None = None
    """Clients must have a certificate of these."""
    metrics_prefix: str = "based"
    state_dir: Path | None = None
    max_states: int = 1024
    """States in memory."""
    max_state_bytes: int = 1 << 30
    max_state_files: int = 10_000
    shared_states: bool = False
    """Other processes use the same state_dir: it then has all states at all times."""
    states_may_go: bool = False
    """Beyond max_state_files the state that was written first goes; else the new one is refused."""
    drain_seconds: float = 30.0
    log_json: bool = False
    log_requests: bool = True
    worker: str | None = None
    """The name of this process, one of several behind one address, in its log."""
    socket: Path | None = None
    """Where such a process listens, in place of host and port: a Unix socket in a folder that is its owner's alone."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Raises ValueError for an empty key, which everyone has."""
        if "" in self.api_keys:
            raise ValueError("an API key is empty: give keys, or an empty list to ask for none")
